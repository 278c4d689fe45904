"""Option hadamard of quant: rotated, rounded, rotated back; less error, unbiased where asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import T, assert_same, case, cotangent, graph_of, pack_graph, run
from torch import Tensor, fx, nn

import dropit_fx
from dropit_fx import ConfigError, measure
from dropit_fx.codecs import CODEC
from dropit_fx.compile import backend
from dropit_fx.kernels.hadamard import SIZE, rotate

QUANT = CODEC["quant"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def options_of(**options: Any) -> dict[str, Any]:
    return QUANT.defaults() | {"hadamard": True} | options


def rule(**options: Any) -> dict[str, Any]:
    return {"codec": "quant", "hadamard": True, **options}


def config(**options: Any) -> dict[str, Any]:
    return {"preset": None, "force": True, "rules": [rule(**options)]}


def matrix() -> Tensor:
    """By Sylvester's construction, in double precision."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return h / 4


def by_matrix(x: Tensor) -> Tensor:
    whole = len(x) // SIZE * SIZE
    turned = (x[:whole].double().view(-1, SIZE) @ matrix()).view(-1)
    return torch.cat((turned, x[whole:].double()))


# --- the rotation


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 1000])
def test_each_16_values_are_multiplied_by_the_matrix(numel: int) -> None:
    x = torch.randn(numel)
    turned = rotate(x)
    torch.testing.assert_close(turned.double(), by_matrix(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotate(turned), x, rtol=1e-5, atol=1e-6)
    assert turned.norm() == pytest.approx(x.norm().item(), rel=1e-5)


def test_autocast_does_not_lower_it() -> None:
    x, options = torch.randn(4096), options_of(bits=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = QUANT.pack(x, options)
        back = QUANT.unpack(parts, options, 4096, x.dtype)
    assert_same(parts, QUANT.pack(x, options))
    assert_same(back, QUANT.unpack(parts, options, 4096, x.dtype))
    assert back.dtype == x.dtype


# --- the codec


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_rounds_what_the_matrix_gives_and_turns_it_back(given: torch.dtype, bits: int) -> None:
    options = options_of(bits=bits, block=64)
    for numel in (0, 1, 15, 16, 17, 100, 1000):
        x = torch.randn(numel).to(given)
        parts = QUANT.pack(x, options)
        back = QUANT.unpack(parts, options, numel, given)
        assert back.dtype == given
        assert sum(t.nbytes for t in parts) == QUANT.nbytes(numel, given, options)
        assert QUANT.nbytes(numel, given, options) == QUANT.nbytes(
            numel, given, options | {"hadamard": False}
        )
        form = 10_000, 64, bits, 0
        turned = by_matrix(x).to(torch.float32)
        rounded = torch.ops.dropit.unsparsify(
            *torch.ops.dropit.sparsify(turned, *form, False), numel, torch.float32, *form
        )
        off = (back.double() - by_matrix(rounded)).abs() > 0.02
        assert off.sum() <= 0.02 * numel + 1  # but where a value lies between two levels


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_stochastic_rounding_the_mean_of_2000_draws_is_the_exact_gradient(bits: int) -> None:
    x, w = torch.randn(48, 8) * torch.logspace(-1, 1, 48)[:, None], torch.randn(5, 8)
    call = case("linear", T((48, 8)), T((5, 8)))
    rounded, _ = pack_graph(
        graph_of(F.linear, call),
        [x, w.requires_grad_()],
        config(bits=bits, block=64, rounding="stochastic"),
    )
    exact = cotangent(torch.empty(48, 5)).t() @ x
    draws = []
    for seed in range(2000):
        grad = run(rounded, [x, w], seed)[1][1]
        assert grad is not None
        draws.append(grad - exact)
    away = torch.stack(draws)
    variance = float(away.square().sum((1, 2)).mean())
    assert variance > 0
    assert away.mean(0).norm() < 3 * math.sqrt(variance / len(away))


@pytest.mark.parametrize("given", DTYPES)
def test_no_finite_half_becomes_nan_or_infinity(given: torch.dtype) -> None:
    top = torch.finfo(given).max if given == torch.float16 else 1e37
    x = torch.full((64,), top, dtype=given)
    x[1::3] *= -1
    for bits in (2, 4, 8):
        options = options_of(bits=bits)
        back = QUANT.unpack(QUANT.pack(x, options), options, 64, given)
        assert back.isfinite().all()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_it_is(odd: float) -> None:
    x, options = torch.randn(256), options_of(block=64, bits=8)
    x[70] = odd
    back = QUANT.unpack(QUANT.pack(x, options), options, 256, x.dtype)
    torch.testing.assert_close(back, x, atol=0.2, rtol=0.0, equal_nan=True)


def test_where_all_bits_are_kept_nothing_is_turned() -> None:
    x, options = torch.randn(100), options_of(bits=None)
    assert QUANT.lossless(options)
    assert_same(QUANT.unpack(QUANT.pack(x, options), options, 100, x.dtype), x)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_channels_are_standardised_and_then_turned(given: torch.dtype) -> None:
    """As a GPU packs them: the kernels that standardise cannot rotate."""
    x, mean = torch.randn(6 * 4 * 20).to(given), torch.randn(4)
    deviation = torch.rand(4) + 0.5
    inverse, options = deviation.reciprocal(), options_of(bits=8, block=64)
    assert QUANT.pack_channels is not None
    assert QUANT.unpack_channels is not None
    parts = QUANT.pack_channels(x, mean, inverse, 20, options)
    runs = x.view(-1, 4, 20)
    standard = ((runs.float() - mean[:, None]) * inverse[:, None]).to(given).view(-1)
    assert_same(parts, QUANT.pack(standard, options))
    back = QUANT.unpack_channels(parts, mean, deviation, 20, options, x.numel(), given)
    assert (back - x).norm() < 0.02 * x.norm()


# --- in graphs


def network() -> nn.Module:
    layers = nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 96), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(96, 8))


def gradients(run_it: Callable[..., Any], model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run_it(x).square().sum(), list(model.parameters()))


WAYS: dict[str, dict[str, Any]] = {
    "transform": {},
    "dropit_eager": {},
    "aot_eager": {"inner": "aot_eager"},
    "inductor": {"inner": "inductor"},
    "inductor, fused": {"inner": "inductor", "fuse": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_saves_what_is_reported_and_has_the_gradient_of_eager_mode(way: str) -> None:
    model, x = network(), torch.randn(50, 64)
    chosen = {"preset": None, "rules": [rule(bits=4)]}
    eager: Any = dropit_fx.transform(model, chosen, example_args=(x,))
    torch._dynamo.reset()
    if way == "transform":
        ours, report = eager, dropit_fx.report(eager)
    else:
        name = "dropit_eager" if way == "dropit_eager" else "dropit"
        ours = torch.compile(model, backend=name, options={"config": chosen} | WAYS[way])
        ours(x)
        report = backend.compiled_graphs()[-1].report
    assert_same(ours(x), model(x)) if "inductor" not in way else None
    found, expected = gradients(ours, model, x), gradients(eager, model, x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-1)
    for grad, dense in zip(found, gradients(model, model, x), strict=True):
        assert (grad - dense).norm() < 0.2 * dense.norm()
    turned = [row for row in report.rows if row.codec == "quant(bits=4, hadamard=True)"]
    assert turned
    if way in ("transform", "dropit_eager"):
        assert report.kept_bytes == measure.saved_bytes(ours, x) < 0.3 * report.dense_bytes
    else:
        (partition,) = backend.compiled_graphs()[-1].partitions
        assert partition.packed_bytes == sum(row.kept_bytes for row in turned)
        assert partition.packs_in_backward == partition.unpacks_in_forward == ()


def test_where_a_slope_jumps_at_0_nothing_is_turned() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.selu(x * 1.0)

    x = torch.randint(-1, 2, (64, 64)).float().requires_grad_()
    made: Any = dropit_fx.transform(
        Model(), {"preset": None, "rules": [rule(bits=4)]}, example_args=(x,)
    )
    exact = torch.autograd.grad(Model()(x).sum(), x)[0]
    assert_same(torch.autograd.grad(made(x).sum(), x)[0], exact)
    (row,) = (row for row in dropit_fx.report(made).rows if row.op == "selu")
    assert "hadamard" not in row.codec
    assert row.note.endswith("in four bits or more, not rotated")


def test_readers_of_one_value_share_a_copy_unless_one_needs_its_zeros() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.q, self.k = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.q(h) + self.k(h) + F.selu(h)

    def packs(*rules: dict[str, Any]) -> list[fx.Node]:
        made: Any = dropit_fx.transform(
            Model(), {"preset": None, "rules": [*rules]}, example_args=(torch.randn(80, 64),)
        )
        report = dropit_fx.report(made)
        assert report.kept_bytes == measure.saved_bytes(made, torch.randn(80, 64))
        return [n for n in made.graph.nodes if n.name.startswith("pack")]

    assert len(packs(rule())) == 2
    assert len(packs({"op": "selu", "codec": "quant"}, rule())) == 2
    assert len(packs({"codec": "quant"})) == 1


def test_what_is_wrong_in_a_rule_is_said() -> None:
    with pytest.raises(ConfigError, match="hadamard = 16 for codec 'quant': true: each 16 values"):
        dropit_fx.load_config(config(hadamard=16))
    with pytest.raises(ConfigError, match="no key 'hadamard' for codec 'mink'"):
        dropit_fx.load_config({"rules": [{"codec": "mink", "hadamard": True}]})
