"""``dropit_fx.pointwise``: a function of one's own as an op of the table."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.ops.step_tables import TableError, table
from dropit_fx.ops.table import RULES
from dropit_fx.runtime.packed_call import VERSIONS


@dropit_fx.pointwise("quick_gelu")
def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(quick_gelu(self.up(x)))
        return out


@pytest.fixture
def model() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


X = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, run: nn.Module | None = None) -> list[Tensor]:
    model.zero_grad()
    out = (model if run is None else run)(X)
    out.tanh().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_it_is_one_op_and_keeps_its_input_packed(model: Mlp) -> None:
    packed = dropit_fx.transform(model, example_args=(X,))
    assert torch.equal(packed(X), model(X))
    report = dropit_fx.report(packed)
    assert {(r.op, r.codec) for r in report.rows if r.codec != "drop"} == {
        ("quick_gelu", "quant(bits=5)"),
        ("linear", "derived"),
    }
    assert measure.saved_bytes(packed, X) == report.kept_bytes


def test_few_bit_multiplies_by_levels_of_its_own_table(model: Mlp) -> None:
    rules = [{"op": "quick_gelu", "codec": "few_bit", "bits": 2}]
    packed = dropit_fx.transform(model, example_args=(X,), config={"preset": None, "rules": rules})
    packed(X).tanh().sum().backward()
    assert model.up.bias.grad is not None

    hidden = model.up(X).detach()
    steps = table("quick_gelu", 2)
    slopes = torch.tensor(steps.levels)[
        torch.bucketize(hidden, torch.tensor(steps.borders), right=True)
    ]
    out = model.down(quick_gelu(hidden))
    through = (1 - out.tanh() ** 2) @ model.down.weight * slopes
    torch.testing.assert_close(model.up.bias.grad, through.sum(0), rtol=1e-4, atol=1e-4)


def test_lossless_gives_the_same_bits(model: Mlp) -> None:
    config = {"preset": None, "rules": [{"codec": "quant", "bits": None}], "force": True}
    packed = dropit_fx.transform(model, example_args=(X,), config=config)
    for mine, dense in zip(gradients(model, packed), gradients(model), strict=True):
        assert torch.equal(mine, dense)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_plug_in_sees_one_op_too(model: Mlp, inner: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dropit", options={"preset": "fewbit", "inner": inner})
    eager = dropit_fx.transform(model, example_args=(X,), preset="fewbit")
    for mine, other in zip(gradients(model, compiled), gradients(model, eager), strict=True):
        torch.testing.assert_close(mine, other)
    assert measure.saved_bytes(compiled, X) == measure.saved_bytes(eager, X)


def test_a_rewritten_model_is_copied_with_it(model: Mlp) -> None:
    packed = deepcopy(dropit_fx.transform(model, example_args=(X,)))
    assert torch.equal(packed(X), model(X))
    assert all(torch.isfinite(g).all() for g in gradients(packed))


@pytest.mark.parametrize(
    ("name", "f", "message"),
    [
        ("gelu", F.gelu, "is an op already"),
        ("quick_gelu", F.silu, "is registered with another function"),
        ("quick_gelu", lambda x: quick_gelu(x) + 1, "is another function already"),
        ("sigmoid_of_mine", lambda x: x.softmax(0), "is not pointwise"),
        ("roots", torch.sqrt, "is not finite"),
    ],
)
def test_what_is_not_accepted(name: str, f: object, message: str) -> None:
    before = dict(RULES)
    with pytest.raises(TableError, match=message):
        dropit_fx.pointwise(name)(f)  # type: ignore[arg-type]
    assert before == RULES


def test_declared_again_it_is_the_same_op() -> None:
    @dropit_fx.pointwise("quick_gelu")
    def again(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    assert again is quick_gelu


def test_compile_caches_tell_two_functions_apart() -> None:
    from dropit_fx.pointwise import _version

    assert _version(lambda x: x * 2.0) != _version(lambda x: x * 3.0)
    assert VERSIONS["quick_gelu"]
    assert not VERSIONS["gelu"]


def test_a_jump_of_the_slope_at_zero_is_found() -> None:
    for name, f, expected in (
        ("leaks", lambda x: torch.where(x > 0, x, 0.1 * x), True),
        ("at zero alone", lambda x: torch.where(x == 0, x, 2 * x), True),
        ("steep", lambda x: torch.tanh(100 * x), False),
        ("bends", lambda x: torch.where(x > 0, x + x * x, x), False),
    ):
        dropit_fx.pointwise(name)(f)
        read = RULES[name].read("input")
        assert read is not None
        assert read.jumps is not None
        assert read.jumps({}) is expected, name


JUMPING = {
    "twice above": lambda x: torch.where(x > 1, 2 * x, x),
    "three from two on": lambda x: torch.where(x >= 2, 3 * x - 4, x),
    "of others": lambda x: x * F.relu6(x + 3) / 6,
    "three pieces": lambda x: torch.where(x > 1.5, -x, torch.where(x < -1, 2 * x, x)),
    "sawtooth": lambda x: x * torch.round(x),
    "corner": lambda x: (x - 2).abs(),
}


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("twice above", [(1.0, False)]),
        ("three from two on", [(2.0, True)]),
        ("of others", [(-3.0, False), (3.0, True)]),
        ("three pieces", [(-1.0, True), (1.5, False)]),
        ("sawtooth", []),
        ("corner", []),
    ],
)
def test_jumps_elsewhere_are_found(name: str, places: list[tuple[float, bool]]) -> None:
    from dropit_fx.pointwise import _jumps_elsewhere

    jumps, why_exact = _jumps_elsewhere(JUMPING[name])
    assert [(j.at, j.as_above) for j in jumps] == places
    assert bool(places) is not bool(why_exact)
    for smooth in (F.gelu, torch.exp, lambda x: x**3, lambda x: torch.tanh(100 * x), F.relu):
        assert _jumps_elsewhere(smooth) == ((), "")


@pytest.mark.parametrize("preset", ["balanced", "gact"])
@pytest.mark.parametrize("name", JUMPING)
def test_the_slope_is_that_of_the_exact_value(name: str, preset: str) -> None:
    """Behind a norm, at the places where it jumps; and no step of the result is read rounded."""
    op = dropit_fx.pointwise(name)(JUMPING[name])

    class Jumping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 8, 1)
            self.norm.eps = 0.0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(op(self.norm(x)))
            return out

    model, found = Jumping(), []
    x = torch.randint(-3, 4, (16, 8, 8, 8)).float().requires_grad_()
    packed = dropit_fx.transform(model, preset=preset, example_args=(x,))
    for run in (model, packed):
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        found.append(grad)
    if name == "of others":  # between its jumps, rounding is read
        assert (found[0] - found[1]).abs().max() < (found[0] - found[0].mean()).abs().max() / 4
    else:
        assert torch.equal(*found)
    report = dropit_fx.report(packed)
    codec = {r.op: r for r in report.rows if r.kept_bytes or r.codec == "derived"}
    exact = name in ("sawtooth", "corner")
    assert bool(codec[name].reason) is exact
    assert measure.saved_bytes(packed, x) == report.kept_bytes
    if name in ("twice above", "three pieces", "sawtooth"):
        assert codec["conv2d"].codec != "derived"
