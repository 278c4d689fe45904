"""What users do to a rewritten model, and what their models do to it."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import Replicate, distribute_tensor

import dropit_fx
from dropit_fx import measure
from dropit_fx.capture.trace import CaptureError
from dropit_fx.capture.untouched import untouched
from dropit_fx.report.rows import Row

# Loses no bit. Operands packed at gamma = 0 take as much room as dense, so that has to be forced.
LOSSLESS = {
    "preset": None,
    "force": True,
    "rules": [{"op": ["linear", "conv*", "matmul"], "codec": "mink", "gamma": 0.0}],
}
MINK = {"preset": "lossless", "rules": [{"codec": "mink", "gamma": 0.9}]}


def mlp(width: int = 64, depth: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 8))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    )


def grads(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Gradients of every parameter that requires grad, for the sum of the squared outputs."""
    outs = model(*args, **kwargs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(sum(o.square().sum() for o in outs), wanted))


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def rows(model: nn.Module) -> dict[str, Row]:
    return {r.name: r for r in dropit_fx.report(model).rows}


def packs(model: nn.Module) -> list[str]:
    return [n.name for n in model.graph.nodes if n.target is dropit_fx.runtime.packed_call.pack]


def check(model: nn.Module, *args: Tensor, config: Any = LOSSLESS) -> Any:
    """Rewrites, and asserts that result and gradients have the same bits; returns the rewritten."""
    packed = dropit_fx.transform(model, config, example_args=args)
    assert packs(packed)
    assert_same(packed(*args), model(*args))
    assert_same(grads(packed, *args), grads(model, *args))
    return packed


# --- what requires a gradient changes


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.mul(1).detach_(),
        lambda h: (h * 1).detach_() + h,
        lambda h: torch.zeros_like(h).add_(h),
        lambda h: (h.detach() * 2).mul_(h),
        lambda h: h.detach().clone().requires_grad_(),
    ],
    ids=["detached", "detached and added", "added to", "multiplied", "a new leaf"],
)
@pytest.mark.parametrize("way", ["transform", "dropit_eager", "dropit"])
def test_a_value_that_stops_or_begins_to_require_a_gradient(way: str, change: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.a(x))
            before = F.silu(h)
            u = h * 1
            before = before * u
            changed = change(u)
            return self.b(h * changed + before)

    model, x = Model(), torch.randn(32, 64)
    if way == "transform":
        packed: Any = dropit_fx.transform(model, preset="balanced", example_args=(x,))
    else:
        options = {"preset": "balanced"} | ({"inner": "aot_eager"} if way == "dropit" else {})
        packed = torch.compile(model, backend=way, options=options)
    assert_same(packed(x), model(x))
    for got, wanted in zip(grads(packed, x), grads(model, x), strict=True):
        assert (got - wanted).norm() <= 0.1 * wanted.norm()


# --- backward


def test_retain_graph_gives_the_same_gradients_twice() -> None:
    x = torch.randn(32, 64)
    packed = dropit_fx.transform(mlp(), MINK, example_args=(x,))
    loss = packed(x).sum()
    wanted = list(packed.parameters())
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert_same(torch.autograd.grad(loss, wanted), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted)


def test_double_backward_is_refused_with_the_op_and_the_way_out() -> None:
    x = torch.randn(32, 64)
    packed = dropit_fx.transform(mlp(), MINK, example_args=(x,))
    text = r"packed_linear: double backward \(create_graph=True\) is not supported.*dense model"
    with pytest.raises(RuntimeError, match=text):
        torch.autograd.grad(packed(x).sum(), list(packed.parameters()), create_graph=True)


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_many_gradients_at_once_are_refused_with_the_op_and_the_way_out(way: str) -> None:
    x, model = torch.randn(16, 8, requires_grad=True), mlp(8, 2)
    if way == "transform":
        packed = dropit_fx.transform(model, example_args=(x,))
    else:
        torch._dynamo.reset()
        packed = torch.compile(model, backend="dropit_eager")
    out = packed(x).sum(0)
    each = torch.eye(len(out))
    text = r"packed_linear: many gradients at once \(is_grads_batched=True.*one by one.*dense model"
    with pytest.raises(RuntimeError, match=text):
        torch.autograd.grad(out, x, each, is_grads_batched=True)
    one_by_one = torch.stack([torch.autograd.grad(packed(x).sum(0), x, e)[0] for e in each])
    jacobian = torch.func.jacrev(lambda t: model(t).sum(0))(x)
    torch.testing.assert_close(one_by_one, jacobian, rtol=0.1, atol=0.1)  # as formats round
    if way == "transform":
        assert_same(torch.func.jacrev(lambda t: packed(t).sum(0))(x), jacobian)


@pytest.mark.parametrize("inside", [False, True])
def test_second_derivatives_of_compiled_code_are_refused(inside: bool) -> None:
    x, model = torch.randn(32, 64, requires_grad=True), mlp()

    def slope(run: Any) -> Tensor:
        return torch.autograd.grad(run(x).sum(), x, create_graph=True)[0]

    torch._dynamo.reset()
    options = {"config": MINK}
    compiled = torch.compile(
        (lambda: slope(model)) if inside else model, backend="dropit_eager", options=options
    )
    with pytest.raises(RuntimeError, match=r"create_graph=True.*call the original, dense model"):
        compiled() if inside else slope(compiled)
    assert slope(model).requires_grad


@pytest.mark.parametrize("inside", [False, True])
def test_second_derivatives_of_a_rewritten_model_that_is_compiled_are_refused(
    inside: bool,
) -> None:
    x, model = torch.randn(64, 8, requires_grad=True), mlp(8, 2)
    packed = dropit_fx.transform(model, example_args=(x,), preset="max")

    def slope(run: Any) -> Tensor:
        return torch.autograd.grad(run(x).sum(), x, create_graph=True)[0]

    torch._dynamo.reset()
    compiled = torch.compile((lambda: slope(packed)) if inside else packed, backend="eager")
    with pytest.raises(RuntimeError, match=r"create_graph=True.*call the original, dense model"):
        compiled() if inside else slope(compiled)
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert_same(grads(compiled, x), grads(packed, x))
    with pytest.raises(RuntimeError):  # in PyTorch's words
        slope(compiled).square().sum().backward()


def _per_sample(model: nn.Module, x: Tensor) -> Any:
    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (one[None],))
        return out.square().sum()

    parameters = {k: v.detach() for k, v in model.named_parameters()}
    return list(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values())


def _forward_mode(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent.clone()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda model, x: torch.func.grad(lambda t: model(t).square().sum())(x),
    "vmap": lambda model, x: torch.vmap(model)(x.view(2, 4, 64)),
    "vmap of grad": _per_sample,
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](torch.ones(8, 8)),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x[:2]),
    "hessian": lambda model, x: torch.func.hessian(lambda t: model(t).square().sum())(x[:2]),
    "forward mode": _forward_mode,
}


COMPILED = [(name, "aot_eager") for name in ("grad", "jvp")]


@pytest.mark.parametrize(("transform", "backend"), [*((t, None) for t in TRANSFORMS), *COMPILED])
def test_transforms_of_functions_see_the_dense_ops(transform: str, backend: str | None) -> None:
    x, model = torch.randn(8, 64), mlp()
    packed = dropit_fx.transform(model, MINK, example_args=(torch.randn(32, 64),))
    assert packs(packed)
    if backend is not None:
        torch._dynamo.reset()
        packed = torch.compile(packed, backend=backend)  # type: ignore[assignment]
    found, expected = (TRANSFORMS[transform](m, x) for m in (packed, model))
    torch.testing.assert_close(found, expected)


def test_subclasses_with_ops_of_their_own_and_meta_tensors_run_dense() -> None:
    class Named(Tensor):
        pass

    x, model = torch.randn(32, 64), mlp()
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    out = packed(x.as_subclass(Named))
    assert type(out) is Named
    out.sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert_same(found, [p.grad for p in model.parameters()])
    out = packed.to("meta")(x.to("meta"))
    out.sum().backward()
    assert out.shape == (32, 8)


def test_gradients_accumulate() -> None:
    x = torch.randn(32, 64)
    model = mlp()
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    for part in x.split(8):
        packed(part).sum().backward()
    many = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in x.split(8):
        model(part).sum().backward()
    assert_same(many, [p.grad for p in model.parameters()])


def test_hooks_and_offloading_see_the_packed_tensors() -> None:
    x = torch.randn(32, 64)
    packed = dropit_fx.transform(mlp(), MINK, example_args=(x,))
    seen: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append(tensor.nbytes)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = packed(x)
    assert_same(torch.autograd.grad(out.sum(), list(packed.parameters())), grads_of_sum(packed, x))
    assert seen


def grads_of_sum(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(x).sum(), list(model.parameters()))


def test_a_training_loop_learns() -> None:
    x, y = torch.randn(64, 64), torch.randint(8, (64,))
    model = mlp()
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    optimizer = torch.optim.Adam(packed.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(packed(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert_same(packed(x), model(x))  # the same parameters, updated in place


def test_inputs_that_require_grad_get_exact_gradients() -> None:
    x = torch.randn(32, 64, requires_grad=True)
    model = mlp()
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    dx = torch.autograd.grad(packed(x).sum(), x)
    assert_same(dx, torch.autograd.grad(model(x).sum(), x))


# --- modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_packed_where_no_gradients_are_wanted(
    mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(32, 64)
    model = mlp()
    packed = dropit_fx.transform(model, MINK, example_args=(x,))

    def refuse(*args: Any) -> Any:
        raise AssertionError("packed something")

    monkeypatch.setattr(dropit_fx.runtime.packed_call.PackedFunction, "apply", refuse)
    monkeypatch.setattr(dropit_fx.runtime.copies, "in_order", refuse)
    with mode():
        assert_same(packed(x), model(x))
    with pytest.raises(AssertionError, match="packed something"):
        packed(x)


def test_eval_and_train_follow_the_model() -> None:
    x = torch.randn(32, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    for training in (False, True):
        model.train(training)
        packed.train(training)
        torch.manual_seed(1)
        out = packed(x)
        torch.manual_seed(1)
        assert_same(out, model(x))


# --- frozen, unfrozen, shared weights


def test_a_weight_frozen_afterwards_saves_nothing() -> None:
    x = torch.randn(512, 64)
    packed = dropit_fx.transform(mlp(), MINK, example_args=(x,))
    before = measure.saved_bytes(packed, x)
    packed.get_submodule("2").weight.requires_grad_(False)
    after = measure.saved_bytes(packed, x)
    dense = 512 * 64 * 4
    assert before - after == pytest.approx(dense * (0.1 + 1 / 32), rel=0.02)


def test_predicted_bytes_are_the_measured_ones_where_a_convolution_is_frozen() -> None:
    x = torch.randn(4, 3, 16, 16)
    model = nn.Sequential(convnet(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model[1].weight.requires_grad_(False)
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    report = dropit_fx.report(packed)
    assert measure.saved_bytes(model, x) == report.dense_bytes
    assert measure.saved_bytes(packed, x) == report.kept_bytes
    model[1].weight.requires_grad_(True)
    assert measure.saved_bytes(packed, x) > report.kept_bytes  # packed again, now that it is read


def test_a_rewritten_model_is_not_rewritten_again() -> None:
    x = torch.randn(32, 64)
    packed = dropit_fx.transform(mlp(), MINK, example_args=(x,))
    for model in (packed, nn.Sequential(packed, nn.ReLU(), nn.Linear(8, 8))):
        with pytest.raises(
            CaptureError, match=r"'\w+' of \w+ is packed already: transform the model"
        ):
            dropit_fx.transform(model, MINK, example_args=(x,))


def test_a_weight_unfrozen_afterwards_gets_its_gradient() -> None:
    x = torch.randn(32, 64)
    model = mlp()
    model[2].weight.requires_grad_(False)
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    model[2].weight.requires_grad_(True)
    assert_same(grads(packed, x), grads(model, x))


def test_a_frozen_model_with_a_trained_head_packs_nothing_before_the_head() -> None:
    x = torch.randn(32, 64)
    model = mlp()
    model[:-1].requires_grad_(False)
    packed = dropit_fx.transform(model, MINK | {"rules": []}, example_args=(x,), strategy=None)
    assert {r.op for r in rows(packed).values()} == {"linear"}
    assert len(rows(packed)) == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.two = nn.Linear(64, 64)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.tanh(x)))) * 2


def test_tied_weights() -> None:
    packed = check(Tied(), torch.randn(32, 64))
    assert packed.one.weight is packed.two.weight


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(x))))


def test_a_module_called_twice() -> None:
    packed = check(Twice(), torch.randn(32, 64))
    assert len(packs(packed)) == 2


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 8)
        self.norm = nn.BatchNorm1d(64)
        self.body = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64))
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(x) * self.scale)))


def test_parameters_come_in_the_models_order() -> None:
    # optimizers number them: state saved for one order would be loaded into another
    model = Backwards()
    packed = dropit_fx.transform(model, MINK, example_args=(torch.randn(32, 64),))
    names = [n for n, _ in model.named_parameters()]
    assert [n for n, _ in packed.named_parameters()] == names
    assert [n for n, _ in packed.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert list(packed.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(packed.parameters(), model.parameters(), strict=True))


# --- who else holds the tensor


class Attention(nn.Module):
    """q, k and v of one x, which a residual adds again."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.inp(x))
        return self.q(h) + self.k(h) + self.v(h) + h


def test_three_linears_and_a_residual_share_one_copy() -> None:
    x = torch.randn(128, 64)
    model = Attention()
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    assert len(packs(packed)) == 1
    assert_same(packed(x), model(x))
    predicted = dropit_fx.report(packed).kept_bytes
    assert measure.saved_bytes(packed, x) == predicted
    assert predicted < 0.2 * dropit_fx.report(packed).dense_bytes


def test_readers_share_the_most_accurate_packing() -> None:
    x = torch.randn(128, 64)
    rules = [{"module": "k", "codec": "mink", "gamma": 0.5}, {"codec": "mink", "gamma": 0.9}]
    packed = dropit_fx.transform(
        Attention(), {"preset": "lossless", "rules": rules}, example_args=(x,)
    )
    (row,) = rows(packed).values()
    assert row.codec == "bitmask(bits=1)+mink(gamma=0.5)"
    assert len(packs(packed)) == 1


class TwoKinds(nn.Module):
    """A linear layer and a norm read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.q, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.q(h) + self.norm(h)


def test_a_shared_packing_serves_every_reader() -> None:
    """Dropped elements would do for the linear layer, and take more room, but not for the norm."""
    rules = [
        {"op": "linear", "codec": "mink", "gamma": 0.1, "bits": 8},
        {"op": "layer_norm", "codec": "quant", "bits": 5, "block": 256},
    ]
    config = {"preset": None, "rules": rules}
    packed = dropit_fx.transform(TwoKinds(), config, example_args=(torch.randn(128, 64),))
    shared = [r for r in rows(packed).values() if r.op == "linear+layer_norm"]
    assert [r.codec for r in shared] == ["quant(bits=5)"]
    assert len(packs(packed)) == 1


class Hidden(nn.Module):
    """Returns what its last layer saves."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.one(x))
        return self.two(h), h


def test_a_saved_tensor_that_the_model_returns_is_kept() -> None:
    x = torch.randn(64, 64)
    model = Hidden()
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    (row,) = rows(packed).values()
    assert row.reason == "stays in memory anyway: 'relu' is a model output"
    assert packs(packed) == []
    assert_same(packed(x), model(x))
    assert_same(grads(packed, x), grads(model, x))


class Softmax(nn.Module):
    """A softmax keeps its result, which a product reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.softmax(self.one(x), -1)) * 2


def test_a_tensor_that_another_op_keeps_whole_is_kept_and_the_reader_named() -> None:
    x = torch.randn(64, 64)
    packed = dropit_fx.transform(Softmax(), MINK | {"preset": None}, example_args=(x,))
    row = next(r for r in rows(packed).values() if r.op == "softmax+linear")
    assert (row.op, row.reason) == ("softmax+linear", "no rule of the config names it")
    assert packs(packed) == []


class FirstToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))[:, 0])


def test_a_view_of_part_of_a_storage() -> None:
    x = torch.randn(4, 16, 64)
    check(FirstToken(), x)
    packed = dropit_fx.transform(FirstToken(), MINK | {"preset": None}, example_args=(x,))
    # tanh keeps the whole of it: packing the first token would free nothing
    (row,) = rows(packed).values()
    assert row.dense_bytes == x.nbytes
    assert (row.op, row.reason) == ("tanh+linear", "no rule of the config names it")


class InPlace(nn.Module):
    """Writes into a tensor between two readers of it, or through a view."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two, self.three = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        if self.how == "relu of a view":
            view = h.view(-1)
            F.relu(h, inplace=True)
            return self.two(view.view(h.shape)) + self.three(h)
        if self.how == "relu, result unused":
            F.relu(h, inplace=True)
            return self.two(h) + self.three(h)
        if self.how == "relu between readers":
            a = h * 2
            F.relu(a, inplace=True)
            return self.two(a) + self.three(h)
        a = self.two(h)
        h.add_(1.0)
        return a + self.three(h)


@pytest.mark.parametrize("how", ["relu of a view", "relu, result unused", "relu between readers"])
def test_in_place_writes_change_nothing(how: str) -> None:
    x = torch.randn(64, 64)
    config = LOSSLESS | {"rules": [*LOSSLESS["rules"], {"codec": "bitmask"}]}
    check(InPlace(how), x, config=config)


def test_an_in_place_op_whose_tensor_others_see_is_kept_with_the_reason() -> None:
    x = torch.randn(64, 64)
    config = {"preset": "lossless", "rules": []}
    packed = dropit_fx.transform(InPlace("relu of a view"), config, example_args=(x,))
    reasons = {r.reason for r in rows(packed).values()}
    assert any("it writes into a tensor that 'view_1' sees through 'view'" in r for r in reasons)


def test_a_write_between_two_readers_gives_no_wrong_gradient() -> None:
    # dense, autograd refuses: the first reader's tensor is gone
    x = torch.randn(64, 64)
    model = InPlace("add")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(model, x)
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    clean = InPlace("add")
    clean.load_state_dict(model.state_dict())

    def forward(x: Tensor) -> Tensor:
        h = clean.one(x)
        return clean.two(h) + clean.three(h + 1.0)

    # packed before the write, it is not
    found = grads(packed, x)
    clean.forward = forward  # type: ignore[method-assign]
    assert_same(found, grads(clean, x))


# --- values, layouts, dtypes, sizes


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_in_a_packed_tensor_reach_the_gradient_as_dense(value: float) -> None:
    x = torch.randn(64, 64)
    x[3, 5] = value
    layer = nn.Linear(64, 8)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * 1.0)

    config = {"preset": None, "rules": [{"codec": "mink"}]}
    packed = dropit_fx.transform(Scaled(), config, example_args=(x,))
    assert packs(packed)
    cotangent = torch.randn(64, 8)
    ours = torch.autograd.grad(packed(x), layer.weight, cotangent)[0]
    dense = torch.autograd.grad(layer(x), layer.weight, cotangent)[0]
    special = ~dense.isfinite()
    assert special.sum() == 8  # the column of the element
    assert torch.equal(special, ~ours.isfinite())
    assert_same(ours[special], dense[special])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(16, 3, 12, 12, dtype=dtype)
    packed = check(convnet().to(dtype), x)
    assert {r.dtype for r in rows(packed).values()} == {str(dtype).removeprefix("torch.")}


def test_channels_last() -> None:
    x = torch.randn(8, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    check(convnet().to(memory_format=torch.channels_last), x)


def test_other_layouts_than_the_examples() -> None:
    x = torch.randn(8, 3, 12, 12)
    model = convnet()
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3),
        torch.randn(8, 3, 12, 24)[..., ::2],
        torch.randn(1, 3, 12, 12).expand(8, -1, -1, -1),
    ):
        assert_same(packed(other), model(other))
        assert_same(grads(packed, other), grads(model, other))


@pytest.mark.parametrize("batch", [0, 1, 7, 33])
def test_other_batch_sizes_than_the_examples(batch: int) -> None:
    model = mlp()
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(torch.randn(32, 64),))
    x = torch.randn(batch, 64)
    assert_same(packed(x), model(x))
    assert_same(grads(packed, x), grads(model, x))


@pytest.mark.parametrize("batch", [0, 1, 7, 33])
def test_lossy_packing_of_other_batch_sizes(batch: int) -> None:
    model = mlp()
    packed = dropit_fx.transform(model, MINK, example_args=(torch.randn(32, 64),))
    x = torch.randn(batch, 64)
    assert_same(packed(x), model(x))
    for p, d in zip(grads(packed, x), grads(model, x), strict=True):
        assert p.shape == d.shape
        assert p.isfinite().all()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)], ids=["batch", "group"])
def test_an_empty_batch_is_packed_by_channel(norm: nn.Module) -> None:
    """No element has a mean: the dense model runs in eval mode, and so does the packed one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.SiLU(), nn.Conv2d(8, 4, 3)).eval()
    packed = dropit_fx.transform(model, example_args=(torch.randn(2, 3, 12, 12),))
    assert "by_channel" in str(packed.graph)
    x = torch.randn(0, 3, 12, 12)
    assert_same(packed(x), model(x))
    assert_same(grads(packed, x), grads(model, x))


def test_complex_tensors_are_kept_with_the_reason() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x * 2, self.weight).abs()

    x = torch.randn(8, 16, dtype=torch.complex64)
    model = Complex()
    config = {"preset": None, "rules": [{"op": "matmul", "codec": "mink"}]}
    packed = dropit_fx.transform(model, config, example_args=(x,))
    assert "the row of matmul is for real numbers" in {r.reason for r in rows(packed).values()}
    assert_same(grads(packed, x), grads(model, x))


# --- autocast


def test_autocast_packs_the_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 64)
    model = mlp()
    packed = dropit_fx.transform(model, MINK, example_args=(x,))
    dtypes: list[torch.dtype] = []
    real = dropit_fx.runtime.copies.in_order

    def note(x: Tensor, order: list[int] | None) -> Tensor:
        if x.is_floating_point():
            dtypes.append(x.dtype)
        return real(x, order)

    monkeypatch.setattr(dropit_fx.runtime.copies, "in_order", note)

    def packed_bytes() -> int:
        # what is packed is flat, weights are not
        return sum(s.nbytes for s in measure.saved_tensors(packed, x) if len(s.shape) == 1)

    # three packed inputs of linears, each behind a ReLU with a mask
    kept, mask = 4 * 102, 64 * 64 // 8
    assert packed_bytes() == 3 * (kept * 4 + 2 * mask)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_bytes() == 3 * (kept * 2 + 2 * mask)
        assert set(dtypes) == {torch.bfloat16}
        assert_same(packed(x), model(x))


def test_autocast_gradients_are_those_of_the_dense_model() -> None:
    x = torch.randn(64, 64)
    model = mlp()
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = packed(x).float().sum(), model(x).float().sum()
    wanted = list(model.parameters())
    assert_same(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted))


@pytest.mark.parametrize("preset", ["balanced", "max"])
def test_autocast_lowers_what_is_made_again_for_a_linear(preset: str) -> None:
    # layer_norm's result is derived in float32; the backward of the linear multiplies in bfloat16
    class Residual(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    x = torch.randn(64, 64)
    model = nn.Sequential(
        Residual(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )
    packed = dropit_fx.transform(model, preset=preset, example_args=(x,))
    assert "derived" in {row.codec for row in rows(packed).values()}
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(packed(x), model(x))
        ours, theirs = grads(packed, x), grads(model, x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.2 * b.norm()


# --- ways of calling


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor, *, scale: Tensor, shift: float = 0.5) -> dict[str, Tensor]:
        h = torch.tanh(self.one(x) * scale) + shift
        return {"out": self.two(h), "norm": h.square().mean()}


def test_keyword_arguments_and_named_outputs() -> None:
    x, scale = torch.randn(32, 64), torch.randn(64)
    model = Named()
    packed = dropit_fx.transform(
        model, LOSSLESS, example_args=(x,), example_kwargs={"scale": scale}
    )
    wanted = list(model.parameters())
    results = []
    for function in (packed, model):
        out = function(x, scale=scale)
        assert list(out) == ["out", "norm"]
        loss = out["out"].square().sum() + out["norm"]
        results.append([out["out"], out["norm"], *torch.autograd.grad(loss, wanted)])
    assert_same(*results)


def test_functional_call_uses_the_given_parameters() -> None:
    x = torch.randn(32, 64)
    model = mlp()
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    other = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters()}
    results = []
    for function in (packed, model):
        out = torch.func.functional_call(function, other, (x,))
        results.append([out, *torch.autograd.grad(out.square().sum(), list(other.values()))])
    assert_same(*results)


def test_copies_and_pickles_train_on_their_own(tmp_path: Any) -> None:
    x = torch.randn(32, 64)
    packed = dropit_fx.transform(mlp(), LOSSLESS, example_args=(x,))
    expected = grads(packed, x)
    path = tmp_path / "model.pt"
    torch.save(packed, path)
    for other in (copy.deepcopy(packed), torch.load(path, weights_only=False)):
        assert_same(grads(other, x), expected)
        assert str(dropit_fx.report(other)) == str(dropit_fx.report(packed))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in packed.parameters()}


def twice(module: nn.Module, args: Any) -> Any:
    return tuple(2 * a for a in args)


def thrice(module: nn.Module, grads: Any) -> Any:
    return tuple(3 * g for g in grads)


def test_copies_and_pickles_have_the_hooks_of_the_model() -> None:
    x, model = torch.randn(32, 64), mlp()
    model.register_forward_pre_hook(twice)
    model.register_full_backward_pre_hook(thrice)
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    expected = grads(model, x)
    for other in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert_same(grads(other, x), expected)


class Says(nn.Parameter):
    """Says itself what an op does with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]
        return result * 2 if func in (F.linear, torch._C._nn.linear) else result


def test_parameters_that_say_what_ops_do_are_asked() -> None:
    x, model = torch.randn(32, 64), mlp()
    packed = dropit_fx.transform(model, example_args=(x,))  # it packs what the weight is read with
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    weight: Tensor = state["2.weight"]
    state["2.weight"] = torch.Tensor._make_subclass(Says, weight, True)  # type: ignore[attr-defined]
    other = torch.func.functional_call(packed, state, (x,))
    assert torch.equal(other, torch.func.functional_call(model, state, (x,)))
    usual = torch.func.functional_call(model, state | {"2.weight": weight}, (x,))
    assert not torch.equal(other, usual)


SEEN: list[Any] = []


class Remembers(nn.Module):
    """Keeps what it sees in attributes, containers, objects and defaults."""

    shared: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.cache: dict[str, list[Any]] = {"a": [1]}
        self.plain, self.steps = torch.zeros(3), 0
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor, held: list[Any] = []) -> Tensor:  # noqa: B006
        self.steps += 1
        self.last, self.count = x, self.count + 1
        self.plain.add_(1)
        self.cache["a"].append(x)
        for place in (held, SEEN):
            place.append(x)
        self.shared["x"] = x
        random.random()
        return self.linear(x)


def remembered(model: Remembers) -> Any:
    state = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    extra = (list(SEEN), dict(Remembers.shared), Remembers.forward.__defaults__)
    return copy.deepcopy((state, extra, model.plain._version)), random.getstate()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_what_it_was_after_a_run(fails: bool) -> None:
    model = Remembers()
    before, count = remembered(model), model.count
    with suppress(ZeroDivisionError), untouched(model) as seen:
        model(torch.randn(2, 16))
        if fails:
            raise ZeroDivisionError
    assert str(remembered(model)) == str(before)
    assert model.count is count
    changed = {c.attribute for c in seen.changes}
    assert {"steps", "last", "cache['a'][1]", "plain", "_buffers['count']"} <= changed
    assert "Python's random" in seen.chance


def test_modules_leave_the_rest_of_the_model_as_it_was() -> None:
    model = nn.Sequential(Remembers(), nn.GELU(), nn.Linear(16, 8))
    before = remembered(model[0])
    dropit_fx.transform(model, modules="2", example_args=(torch.randn(4, 16),))
    assert str(remembered(model[0])) == str(before)


def test_a_batch_norm_with_a_cumulative_average() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None))
    made = dropit_fx.transform(
        copy.deepcopy(model), preset="lossless", example_args=(torch.ones(4, 3, 8, 8),)
    )
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8)
        assert torch.equal(made(x), model(x))
    for ours, theirs in zip(made.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("batch", "shift"), [(1, 0), (5, 2)])
def test_a_function_under_fx_wrap_is_opened(batch: int, shift: int) -> None:
    window = pytest.importorskip("torchvision.models.swin_transformer").ShiftedWindowAttention
    model, x = nn.Sequential(window(32, [4, 4], [shift, shift], 4)), torch.randn(2, 8, 8, 32)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    assert measure.saved_bytes(packed, x) < measure.saved_bytes(model, x) / 5
    made = dropit_fx.transform(copy.deepcopy(model), preset="lossless", example_args=(x,))
    x = torch.randn(batch, 8, 8, 32)
    for training in (True, False):
        ours, theirs = made.train(training)(x), model.train(training)(x)
        assert torch.equal(ours, theirs)
        for module, out in ((made, ours), (model, theirs)):
            module.zero_grad()
            out.square().sum().backward()
        for p, q in zip(made.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    with pytest.raises(ValueError, match=r"size\(\)\[1\] == 8 of shifted_window_attention"):
        made(torch.randn(2, 12, 12, 32))


class Attentions(nn.Module):
    """Attention over inputs of three kinds, with its options spread over some modules."""

    def __init__(self, *options: tuple[dict[str, Any], dict[str, Any]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.MultiheadAttention(16, 4, kdim=12, vdim=8, **made) for made, _ in options
        )
        self.given = [given for _, given in options]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = ()
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        for part, given in zip(self.parts, self.given, strict=True):
            out, weights = part(q, k, v, **given, **masks)
            found += (out,) if weights is None else (out, weights)
        return found


UNWEIGHTED, EACH_HEAD = {"need_weights": False}, {"average_attn_weights": False}
BIASED = {"add_bias_kv": True}
ATTENTION = {
    "batch first": ((5, 7, 16), (5, 4, 12), {"batch_first": True}, {}),
    "batch second": ((7, 5, 16), (4, 5, 12), {}, {}),
    "no batch": ((7, 16), (4, 12), {}, {}),
    "masks": (
        (5, 7, 16),
        (5, 4, 12),
        {"batch_first": True},
        {
            "key_padding_mask": torch.arange(4).expand(5, 4) > 2,
            "attn_mask": torch.arange(4) > torch.arange(7)[:, None],
        },
    ),
    "dropout": ((5, 7, 16), (5, 4, 12), {"batch_first": True, "dropout": 0.1}, {}),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "dropit_eager") for name in ATTENTION), ("masks", "transform")],
)
def test_attention_over_other_inputs_than_its_own(name: str, way: str) -> None:
    query, key, made, masks = ATTENTION[name]
    model = Attentions((made, EACH_HEAD), (made | BIASED, UNWEIGHTED))
    args = (torch.randn(query), torch.randn(key), torch.randn(*key[:-1], 8))
    if way == "transform":
        ours = dropit_fx.transform(
            copy.deepcopy(model), preset="lossless", example_args=args, example_kwargs=masks
        )
    else:
        torch._dynamo.reset()
        ours = torch.compile(copy.deepcopy(model), backend=way, options={"preset": "lossless"})
    found = []
    for one in (model, ours):
        torch.manual_seed(0)
        outs = one(*args, **masks)
        torch.autograd.backward([out.square().sum() for out in outs])
        found.append((outs, [p.grad for p in one.parameters()]))
    assert_same(*found)


class WritesOfANorm(nn.Module):
    """A norm of which autograd keeps no input, which is written to behind it."""

    def __init__(self, others: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.norm, self.others = nn.RMSNorm(64), others

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        y = self.norm(h)
        self.others(h)
        return y


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
@pytest.mark.parametrize("before", [False, True])
def test_data_counts_anew_and_hides_no_write(before: bool, way: str) -> None:
    def others(h: Tensor) -> None:
        alias = h.data if before else None
        h.relu_()
        alias = h.data if alias is None else alias
        torch.sin(alias * 2)

    model, x = WritesOfANorm(others), torch.randn(64, 64)
    for preset in ("lossless", "balanced"):
        if way == "transform":
            run: Any = dropit_fx.transform(model, preset=preset, example_args=(x,))
        else:
            torch._dynamo.reset()
            run = torch.compile(model, backend="dropit_eager", options={"preset": preset})
        ours, theirs = grads(run, x), grads(model, x)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("write", [F.relu_, lambda h: F.dropout(h, 0.5, True, inplace=True)])
def test_a_part_of_a_larger_tensor_that_is_written_to_is_counted_as_it_is(
    write: Callable[[Tensor], Tensor],
) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:  # the mean lies in the memory of all losses
            loss = F.binary_cross_entropy(x.sigmoid(), torch.full_like(x, 0.5))
            return torch.view_as_real(write(loss) * torch.complex(self.scale, self.scale)).sum()

    x = torch.randn(64, 64, requires_grad=True)
    packed = dropit_fx.transform(Loss(), example_args=(x,))
    assert measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes


class UnseenWrites(nn.Module):
    """What autograd does not count: writes through ``.data``, before and after others read it."""

    def __init__(self, write: Callable[[UnseenWrites, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("average", torch.ones(16))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self, x) * self.scale


def after_its_reader(model: UnseenWrites, x: Tensor) -> Tensor:
    h = torch.tanh(model.a(x))
    y = model.b(h)
    h.data.mul_(2)
    return y * 2 + h


def between_two_readers(model: UnseenWrites, x: Tensor) -> Tensor:
    h = torch.sin(model.a(x))
    y = model.b(h)
    h.data.copy_(torch.zeros_like(h))
    return y + model.b(h)


def into_what_another_is_made_from(model: UnseenWrites, x: Tensor) -> Tensor:
    h = model.a(x)
    y = model.b(torch.relu(torch.sin(h) * model.average))
    model.average.data.mul_(0.5)
    h.data.add_(1)
    return y


def into_a_parameter(model: UnseenWrites, x: Tensor) -> Tensor:
    model.scale.data.clamp_(0, 0.5)
    return model.b(torch.relu(model.a(x)) * model.scale)


WRITES = (after_its_reader, between_two_readers, into_what_another_is_made_from, into_a_parameter)


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_that_autograd_does_not_see_change_what_they_change_in_the_dense_model(
    write: Any, way: str
) -> None:
    model, x = UnseenWrites(write), torch.randn(64, 16)
    dense = copy.deepcopy(model)
    # what is packed loses little; what is read after the write would be another value altogether
    config = {"preset": "balanced", "rules": [{"codec": "quant", "bits": 8}]}
    if way == "transform":
        run: Any = dropit_fx.transform(model, config, example_args=(x,))
        kept = [r.reason for r in dropit_fx.report(run).rows if ".data" in r.reason]
        assert bool(kept) == (write is not into_a_parameter)
        assert all(f"{__file__}:" in reason for reason in kept)
    else:
        torch._dynamo.reset()
        run = torch.compile(model, backend="dropit_eager", options={"config": config})
    for _ in range(2):
        ours, theirs = grads(run, x), grads(dense, x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_data_that_is_assigned_is_refused_with_the_line() -> None:
    def assign(model: UnseenWrites, x: Tensor) -> Tensor:
        model.scale.data = model.scale.data * 0.5
        return model.b(model.a(x) * model.scale)

    model = UnseenWrites(assign)
    with pytest.raises(CaptureError, match=r"test_robust.py:\d+: model.scale.data = .*\n.*: data"):
        dropit_fx.transform(model, example_args=(torch.randn(4, 16),))
    assert torch.equal(model.scale, torch.ones(16))


class Graph(nn.Module):
    """Sums over neighbours, by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.eye(8).to_sparse()
        return torch.sparse.mm(near, F.gelu(self.linear(x)))


def test_sparse_tensors_are_refused_with_the_line() -> None:
    with pytest.raises(CaptureError, match=r"test_robust\.py.*layout sparse_coo, whose bytes"):
        dropit_fx.transform(Graph(), example_args=(torch.randn(8, 16),))


def test_distributed_tensors_run_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    packed = dropit_fx.transform(model, MINK, example_args=(torch.ones(32, 64),))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        local = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = {
            n: distribute_tensor(t, mesh, [Replicate()]).requires_grad_() for n, t in local.items()
        }
        x = torch.randn(32, 64)
        whole = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
        out = torch.func.functional_call(packed, state, (whole,))
        (grad,) = torch.autograd.grad(out.sum(), [whole])
        x.requires_grad_()
        expected = torch.func.functional_call(model, local, (x,))
        assert torch.equal(out.to_local(), expected)
        assert torch.equal(grad.to_local(), torch.autograd.grad(expected.sum(), [x])[0])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("made", [lambda y: y, lambda y: y.view(-1), lambda y: (y.T, {"y": y})])
@pytest.mark.parametrize("inner", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_second_derivatives_are_refused_with_the_way_out(inner: str, made: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    fast = torch.compile(lambda x: made(model(x)), backend="dropit", options={"inner": inner})
    x = torch.randn(32, 16, requires_grad=True)
    out = fast(x)
    loss = (out[1]["y"] if isinstance(out, tuple) else out).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.allclose(grad, torch.autograd.grad(model(x).sum(), x)[0], rtol=0.1, atol=0.1)
    with pytest.raises(
        RuntimeError, match=r"backend='dropit': double backward.*the original, dense"
    ):
        grad.square().sum().backward()


# --- what the forward differentiates itself


class Slopes(nn.Module):
    """Returns a derivative of its loss: forces of a potential, a penalty of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 16))
        self.energy = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
        self.weigh = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 3))

    def forward(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        moved = h.detach().requires_grad_()
        energy = F.cross_entropy(self.energy(moved), classes)
        (slope,) = torch.autograd.grad(energy, moved, create_graph=self.training)
        return self.weigh(h), slope


@pytest.mark.parametrize("training", [True, False])
def test_what_the_forward_differentiates_is_dense_and_the_rest_is_packed(training: bool) -> None:
    torch.manual_seed(0)
    model = Slopes().train(training)
    args = torch.randn(256, 3), torch.arange(256) % 32
    # its logits would be fused with their loss, too
    packed = dropit_fx.transform(model, {"loss_classes": 8}, example_args=args)
    found = []
    for run in (model, packed):
        model.zero_grad()
        weights, slope = run(*args)
        (weights.square().mean() + slope.square().sum() * training).backward()
        found.append((weights, slope, [p.grad for p in model.energy.parameters()]))
    assert_same(found[1], found[0])
    told = dropit_fx.report(packed).rows
    assert {r.module.partition(".")[0] for r in told if not r.reason} == {"embed", "weigh"}
    if training:
        assert any("the forward differentiates it" in r.reason for r in told)
        assert measure.saved_bytes(packed, *args) == dropit_fx.report(packed).kept_bytes
