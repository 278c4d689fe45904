"""What a tracer may lose is carried over into the graph, or refused; the model is as it was."""

from __future__ import annotations

import copy
import random
import threading
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import differing, step
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from dropit_fx import CaptureError, transform
from dropit_fx.capture.faithful import difference, meaning
from dropit_fx.private import FakeTensorMode

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Two linears with something between them; what it is may be replaced."""

    between: Forward = staticmethod(lambda model, h: model.act(h))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)
        self.act = nn.GELU()
        self.register_buffer("ema", torch.zeros(32))
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[Any] = []
        self.cache: dict[str, Any] = {}
        self.aux: Any = None
        self.calls = 0
        self.offset = torch.ones(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(type(self).between(self, self.a(x)))


def net(between: Forward = Net.between) -> Net:
    torch.manual_seed(0)
    model = type("Net", (Net,), {"between": staticmethod(between)})()
    return model.train()


X = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))


# --- what the forward does, and what becomes of it


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


class Both(torch.autograd.Function):
    """Two results, and a tensor that is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * one + other * x


def two_results(model: Any, h: Tensor) -> Tensor:
    one, other = Both.apply(h)
    return one * other


def halved_through_a_view(model: Any, h: Tensor) -> Tensor:
    v = h.view(-1)
    v *= 0.5
    return h * 1


def added_through_a_transpose(model: Any, h: Tensor) -> Tensor:
    h.t().add_(1.0)
    return F.gelu(h)


def a_row_scaled(model: Any, h: Tensor) -> Tensor:
    h = h * 1
    h[0] *= 2
    h[1:3] = h[3:5] + 1
    return h


def slices_written(model: Any, h: Tensor) -> Tensor:
    h = h * 1
    one, other = h[:, :16], h[:, 16:]
    one += other
    other -= 1
    return torch.cat([other, one], -1)


def power_in_place(model: Any, h: Tensor) -> Tensor:
    y = h.sigmoid() + 1
    z = y
    z **= 2
    z /= 3
    return y


def written_out(model: Any, h: Tensor) -> Tensor:
    y = torch.empty(12, 32)
    with torch.no_grad():
        torch.mul(h.detach(), 2, out=y)
    return h + y


def own_tensor_filled(model: Any, h: Tensor) -> Tensor:
    return torch.zeros(4, 32).index_add_(0, torch.arange(12) % 4, h).repeat(3, 1)


def own_tensor_assigned(model: Any, h: Tensor) -> Tensor:
    out = torch.zeros(2, 12, 32)
    out[0] = h
    out[1] += F.gelu(h)
    return out.sum(0)


def own_noise(model: Any, h: Tensor) -> Tensor:
    return h + torch.randn(32) * torch.rand(12, 1)


def own_permutation(model: Any, h: Tensor) -> Tensor:
    return h[:, torch.randperm(32)]


def own_coins(model: Any, h: Tensor) -> Tensor:
    return h * torch.bernoulli(torch.full((32,), 0.5))


def plain_tensor_drawn_into(model: Any, h: Tensor) -> Tensor:
    return h + model.offset.normal_()


def counted(model: Any, h: Tensor) -> Tensor:
    model.count += 1
    return h * model.count


def averaged_in_place(model: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        model.ema.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return h + model.ema


def gradients_off_and_on(model: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        rest = h.round() - h
    return F.gelu(h + rest)


def checkpointed(model: Any, h: Tensor) -> Tensor:
    return checkpoint(model.act, h, use_reentrant=False)


CARRIED: tuple[Forward, ...] = (
    lambda model, h: Straight.apply(h),
    lambda model, h: Reverse.apply(h, 0.5),
    two_results,
    halved_through_a_view,
    added_through_a_transpose,
    a_row_scaled,
    slices_written,
    power_in_place,
    own_tensor_filled,
    own_tensor_assigned,
    own_noise,
    own_permutation,
    own_coins,
    counted,
    averaged_in_place,
    gradients_off_and_on,
    checkpointed,
)


def averaged_anew(model: Any, h: Tensor) -> Tensor:
    model.ema = model.ema * 0.9 + h.detach().mean(0) * 0.1
    return h + model.ema


def aux_loss(model: Any, h: Tensor) -> Tensor:
    model.aux = h.square().mean()
    return h


def aux_loss_of_a_parameter(model: Any, h: Tensor) -> Tensor:
    model.a.weight.aux = h.square().mean()
    return h


def aux_loss_of_a_tensor(model: Any, h: Tensor) -> Tensor:
    model.offset.aux = h.square().mean()
    return h


def counter(model: Any, h: Tensor) -> Tensor:
    model.calls += 1
    return h * (1.0 if model.calls < 3 else 0.5)


def appended(model: Any, h: Tensor) -> Tensor:
    model.seen.append(h)
    return h


def cached(model: Any, h: Tensor) -> Tensor:
    if "table" not in model.cache:
        model.cache["table"] = torch.arange(32) / 32
    return h * model.cache["table"]


def hook_of_a_tensor(model: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda grad: grad * 2)
    return F.gelu(h)


def hook_if_it_requires_a_gradient(model: Any, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda grad: None)
    return F.gelu(h)


def scaled_by_python(model: Any, h: Tensor) -> Tensor:
    return h * random.uniform(0.5, 1.5)


def left_out_by_python(model: Any, h: Tensor) -> Tensor:
    return h if random.random() < 0.5 else F.gelu(h)


def scaled_by_numpy(model: Any, h: Tensor) -> Tensor:
    return h * float(np.random.beta(1.0, 1.0))


def noise_of_numpy(model: Any, h: Tensor) -> Tensor:
    return h + torch.tensor(np.random.randn(32), dtype=torch.float32)


HELD = random.Random(0), np.random.default_rng(0)


def scaled_by_a_generator(model: Any, h: Tensor) -> Tensor:
    return h * HELD[0].random()


def scaled_by_a_generator_of_numpy(model: Any, h: Tensor) -> Tensor:
    return h * float(HELD[1].random())


def decided_by_torch(model: Any, h: Tensor) -> Tensor:
    return h if torch.rand(1).item() < 0.5 else F.gelu(h)


def rolled_by_torch(model: Any, h: Tensor) -> Tensor:
    return h.roll(int(torch.randint(0, 32, (1,))), 1)


def reentrant(model: Any, h: Tensor) -> Tensor:
    return checkpoint(model.act, h, use_reentrant=True)


# (what it does, what the message says of it)
REFUSED: tuple[tuple[Forward, str], ...] = (
    (aux_loss, "'aux'"),
    (aux_loss_of_a_parameter, "a.weight.aux"),
    (aux_loss_of_a_tensor, "offset.aux"),
    (counter, "'calls'"),
    (appended, "seen"),
    (cached, "cache"),
    (hook_of_a_tensor, "hook"),
    (hook_if_it_requires_a_gradient, "hook"),
    (scaled_by_python, "Python's random"),
    (left_out_by_python, "Python's random"),
    (scaled_by_numpy, "NumPy's random"),
    (noise_of_numpy, "NumPy's random"),
    (scaled_by_a_generator, "random.Random"),
    (scaled_by_a_generator_of_numpy, "Generator"),
    (decided_by_torch, "test_faithful.py"),
    (rolled_by_torch, "test_faithful.py"),
)

# carried or refused, as the installed PyTorch's tracers have it
EITHER: tuple[Forward, ...] = (
    written_out,
    plain_tensor_drawn_into,
    averaged_anew,
    reentrant,
    lambda model, h: torch.autocast("cpu", torch.bfloat16)(F.gelu)(h),
    lambda model, h: h.data.mul_(2) + h,
)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that could be damaged."""
    found: dict[str, Any] = {"training": [m.training for m in model.modules()]}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = copy.copy(value) if isinstance(value, dict | list | set) else value
            found[f"{name}.{key}"] = held
            if isinstance(value, Tensor):
                found[f"attributes of {name}.{key}"] = dict(vars(value))
    found |= {f"value of {n}": b.clone() for n, b in model.named_buffers()}
    found["random"] = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    return found


def assert_undamaged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        now = after[key]
        if isinstance(value, Tensor):
            assert type(now) is type(value), key
            assert torch.equal(now, value), key
        elif isinstance(value, dict):
            assert list(now) == list(value), key
            assert all(now[k] is value[k] for k in value), key
        elif key == "random":
            assert torch.equal(now[1], value[1])
            assert (now[0], now[2]) == (value[0], value[2])
        else:
            assert now == value, key


def does_the_same(made: nn.Module, model: nn.Module) -> None:
    """In three calls: output, gradients and buffers; with the same random numbers."""
    dense = copy.deepcopy(model)
    for seed in range(3):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        want = step(dense, (x,), {})
        torch.manual_seed(seed)
        got = step(made, (x,), {})
        assert differing(want.gradients, got.gradients) == []
        assert differing(dict(dense.named_buffers()), dict(made.named_buffers())) == []
    for seed in range(2):
        torch.manual_seed(seed)
        want_out = dense(X)
        torch.manual_seed(seed)
        assert torch.equal(made(X), want_out)


def carried_or_refused(model: nn.Module) -> str:
    """Transforms a model; "" where the result does the same, else the refusal."""
    own = copy.deepcopy(model)
    before = state_of(model)
    try:
        made = transform(model, example_args=(X,), preset="lossless")
    except CaptureError as error:
        assert_undamaged(model, before)
        return str(error)
    assert_undamaged(model, before)
    does_the_same(made, own)
    return ""


@pytest.mark.parametrize("between", CARRIED, ids=lambda f: f.__name__)
def test_what_a_graph_can_do_is_carried_over(between: Forward) -> None:
    assert carried_or_refused(net(between)) == ""


@pytest.mark.parametrize(("between", "told"), REFUSED, ids=lambda f: getattr(f, "__name__", ""))
def test_what_no_graph_does_is_refused_before_anything_is_touched(
    between: Forward, told: str
) -> None:
    message = carried_or_refused(net(between))
    assert told in message
    assert "test_faithful.py" in message
    assert 'torch.compile(model, backend="dropit")' in message


@pytest.mark.parametrize("which", ["input 0", "output 0", "linear.weight", "scale"])
def test_attributes_that_a_caller_could_read_are_refused(which: str) -> None:
    class Attached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 8)
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) * self.scale
            among = {"input 0": x, "output 0": y, "linear.weight": self.linear.weight}
            given: Any = among.get(which, self.scale)
            given.seen = getattr(given, "seen", 0) + 1
            return y

    model = Attached()
    with pytest.raises(CaptureError, match=f"{which}.seen"):
        transform(model, example_args=(X,))
    assert not any(hasattr(t, "seen") for t in (X, model.scale, *model.parameters()))


class Seen:
    """In which code of models keeps something; no model is, or holds, one of these."""

    last: Any = None
    calls = 0
    all: ClassVar[list[Any]] = []


class Counts(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counts.calls += 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    ("between", "told"),
    [
        (lambda model, h: setattr(Seen, "calls", Seen.calls + 1) or h, "Seen.calls"),
        (lambda model, h: setattr(Seen, "last", h.detach()) or h, "Seen.last"),
        (lambda model, h: Seen.all.append(h.detach()) or h, "Seen.all"),
        (lambda model, h: Counts.apply(h), "Counts.calls"),
    ],
    ids=["a number", "a tensor", "a list", "of a function's class"],
)
def test_what_code_keeps_in_a_class_is_refused(between: Any, told: str) -> None:
    assert told in carried_or_refused(net(between))
    assert (Seen.last, Seen.calls, Seen.all, Counts.calls) == (None, 0, [], 0)


def by_vmap(model: Any, h: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: F.gelu(row) * 2)(h)


def by_jvp(model: Any, h: Tensor) -> Tensor:
    along: Tensor = torch.func.jvp(torch.tanh, (h,), (torch.ones_like(h),))[1]
    return along


def by_dual_numbers(model: Any, h: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(h, torch.ones_like(h))
        along: Tensor = forward_ad.unpack_dual((dual @ model.b.weight.T).tanh()).tangent
    return along @ model.b.weight


@pytest.mark.parametrize("between", [by_vmap, by_jvp, by_dual_numbers], ids=lambda f: f.__name__)
def test_a_part_that_torch_func_transforms_is_refused_and_nothing_stays_at_work(
    between: Forward,
) -> None:
    message = carried_or_refused(net(between))
    assert "torch.func" in message or "forward_ad" in message
    assert 'torch.compile(model, backend="dropit")' in message
    nn.Linear(2, 2)  # raises where vmap is at work: it draws


@pytest.mark.parametrize("way", ["script", "trace"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_modules_of_torchscript_are_refused_and_stay_in_their_mode(way: str) -> None:
    inner = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5))
    made = {
        "script": lambda: torch.jit.script(inner),
        "trace": lambda: torch.jit.trace(inner, X @ torch.ones(16, 32), check_trace=False),
    }
    model = net()
    model.act = made[way]()
    with pytest.raises(CaptureError, match="act"):
        transform(model, example_args=(X,))
    assert all(m.training for m in model.modules())


def test_attributes_that_parameters_have_already_stay() -> None:
    model: Any = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 8))
    model[0].weight.no_decay = True
    assert transform(model, example_args=(X,)).get_parameter("0.weight").no_decay


@pytest.mark.parametrize("between", EITHER, ids=lambda f: f.__name__)
def test_what_only_some_tracers_can_do_is_the_same_or_refused(between: Forward) -> None:
    message = carried_or_refused(net(between))
    assert not message or "test_faithful.py" in message or "faithful" in message


# --- what stands around the forward


def doubled(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x) * 2


def with_root_pre_hook(model: Net) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))


def with_root_hook(model: Net) -> None:
    model.register_forward_hook(lambda module, args, out: out * 3)


def with_root_backward_hook(model: Net) -> None:
    model.register_full_backward_hook(lambda module, gin, gout: (gin[0],))


def with_own_forward(model: Net) -> None:
    old = model.forward
    model.forward = lambda x: old(x) * 2  # type: ignore[method-assign]


def with_bound_forward(model: Net) -> None:
    model.forward = types.MethodType(  # type: ignore[method-assign]
        lambda self, x: self.b(self.act(self.a(x) * 2)), model
    )


def with_own_forward_inside(model: Net) -> None:
    old = model.a.forward
    model.a.forward = lambda x: old(x) * 2  # type: ignore[method-assign]


def with_autocast_around(model: Net) -> None:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]


def with_weight_norm(model: Net) -> None:
    parametrizations.weight_norm(model.a)


def pruned_inside(model: Net) -> None:
    prune.l1_unstructured(model.b, "weight", 0.5)


AROUND: tuple[Callable[[Net], None], ...] = (
    with_root_pre_hook,
    with_root_hook,
    with_root_backward_hook,
    with_own_forward,
    with_bound_forward,
    with_own_forward_inside,
    with_autocast_around,
    with_weight_norm,
)


@pytest.mark.parametrize("change", AROUND, ids=lambda f: f.__name__)
def test_what_stands_around_the_forward_is_carried_over_or_refused(change: Any) -> None:
    model, own = net(), net()
    change(model)
    change(own)
    before = state_of(model)
    try:
        made = transform(model, example_args=(X,), preset="lossless")
    except CaptureError:
        assert_undamaged(model, before)
        if change not in (with_autocast_around, with_own_forward, with_bound_forward):
            raise
        return
    assert_undamaged(model, before)
    x = X.clone().requires_grad_()
    for module in (own, made):
        module.zero_grad()
        module(x).square().sum().backward()
    assert torch.equal(made(X), own(X))
    assert (
        differing(
            {n: p.grad for n, p in own.named_parameters()},
            {n: p.grad for n, p in made.named_parameters()},
        )
        == []
    )


def test_pruned_layers_inside_follow_their_masks() -> None:
    model = net()
    pruned_inside(model)
    before = dict(vars(model.b))
    made = transform(model, example_args=(X,), preset="lossless")
    assert vars(model.b)["weight"] is before["weight"]
    assert torch.equal(made(X), model(X))
    made(X).sum().backward()
    assert model.b.weight_orig.grad is not None
    assert not model.b.weight_orig.grad[model.b.weight_mask == 0].any()


@pytest.mark.parametrize(
    "hooked",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,  # which writes into buffers in each call
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore")
def test_pytorchs_own_hooks_are_a_part_of_the_graph(hooked: Any) -> None:
    model, own = net(), net()
    for one in (model, own):
        torch.manual_seed(2)
        hooked(one.b)
    before = state_of(model.b)
    transform(model, example_args=(X,), preset="lossless", modules="b")
    assert set(model.state_dict()) == set(own.state_dict())
    assert before["._forward_pre_hooks"]
    for _ in range(3):
        want, got = step(own, (X,), {}), step(model, (X,), {})
        assert differing(want.gradients, got.gradients) == []
        assert differing(dict(own.named_buffers()), dict(model.named_buffers())) == []
        with torch.no_grad():
            for p, q in zip(own.parameters(), model.parameters(), strict=True):
                p.sub_(p.grad, alpha=0.01)
                q.sub_(q.grad, alpha=0.01)


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *args: None),
        lambda m: m.register_forward_pre_hook(lambda *args: None),
        lambda m: m.register_full_backward_hook(lambda *args: None),
        lambda m: m.register_full_backward_pre_hook(lambda *args: None),
        lambda m: m.register_forward_hook(lambda *args, **kw: None, with_kwargs=True),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre", "with_kwargs"],
)
@pytest.mark.parametrize("modules", [None, "*act*", "a"], ids=["whole", "itself", "another"])
def test_hooks_of_submodules_are_refused_where_they_would_be_lost(
    register: Any, modules: str | None
) -> None:
    model = net()
    fired: list[int] = []
    register(model.act)
    before = state_of(model)
    if modules is None:
        told = r"module 'act' \(GELU\) has a .*hook.*test_faithful"
        with pytest.raises(CaptureError, match=told):
            transform(model, example_args=(X,), preset="lossless")
        assert_undamaged(model, before)
        return
    model.act.register_forward_hook(lambda *args: fired.append(1))
    transform(model, example_args=(X,), preset="lossless", modules=modules)
    fired.clear()
    model(X).sum().backward()
    assert fired == [1]


def test_hooks_for_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(CaptureError, match="registered for all modules"):
            transform(net(), example_args=(X,))
    finally:
        handle.remove()


def test_hooks_of_the_model_are_its_own_still() -> None:
    model, fired = net(), list[str]()
    handle = model.register_forward_hook(lambda *args: fired.append("model"))
    made = transform(model, example_args=(X,))
    made.register_forward_hook(lambda *args: fired.append("graph"))
    model(X)
    assert fired == ["model"]
    made(X)
    assert fired == ["model", "model", "graph"]
    handle.remove()
    fired.clear()
    model(X)
    assert fired == []


class Twice(nn.Parameter):
    """Says itself what a linear layer does with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]
        return result * 2 if func is nn.functional.linear else result


def test_a_parameter_that_says_what_ops_do_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU())
    weight = model[0].weight.detach().clone()
    model[0].weight = torch.Tensor._make_subclass(Twice, weight, True)  # type: ignore[attr-defined]
    with pytest.raises(CaptureError, match=r"'0.weight' is a Twice: .*__torch_function__.*ops do"):
        transform(model, example_args=(torch.randn(8, 16),), preset="lossless")


# --- what only the other mode does


def cached_in_eval(model: Any, h: Tensor) -> Tensor:
    if model.training:
        return h * 2
    model.cache["twice"] = h
    return h * 2


def test_a_cache_of_the_other_mode_is_left_out_with_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net(cached_in_eval)
    made = transform(model, example_args=(X,), preset="lossless")
    assert "in eval mode" in caplog.text
    assert "cache" in caplog.text
    assert model.cache == {}
    for training in (True, False):
        made.train(training)
        model.train(training)
        assert torch.equal(made(X), model(X))


# --- the proof itself: it sees what differs, and nothing else


def numbers(model: nn.Module, forward: Any = None) -> Any:
    return meaning(model, forward or model.forward, (X,), {})


def test_the_order_and_the_names_of_ops_do_not_count() -> None:
    model = net(lambda m, h: h.sin() + h.cos())
    other = net(lambda m, h: torch.add(torch.cos(h), torch.sin(h)))
    assert difference(numbers(model), numbers(other)) == ""


@pytest.mark.parametrize(
    "other",
    [
        lambda m, h: h.sin() + h.cos().detach(),
        lambda m, h: h.sin() + h.cos() * 1,
        lambda m, h: h.sin() - h.cos(),
        lambda m, h: h.sin() + h.cos().add_(torch.rand(32)),
        lambda m, h: (h.sin() + h.cos()).t().contiguous().t(),
        lambda m, h: h.sin() + h.cos() + m.count.add_(1) * 0,
        lambda m, h: h.sin() + h.flip(0).cos(),
        lambda m, h: torch.add(h.sin(), h.cos(), alpha=2),
    ],
    ids=["detach", "one more", "sign", "chance", "layout", "buffer", "place", "number"],
)
def test_another_computation_has_another_meaning(other: Forward) -> None:
    model = net(lambda m, h: h.sin() + h.cos())
    assert difference(numbers(model), numbers(net(other))) != ""


def test_a_backward_alone_may_differ() -> None:
    one, other = net(lambda m, h: h.round()), net(lambda m, h: Straight.apply(h))
    told = difference(numbers(other), numbers(one))
    assert "gradient of" in told
    assert "Straight" in told


# --- two threads


def test_two_threads_transform_at_once() -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            torch.manual_seed(seed)
            model = net()
            for _ in range(3):
                made = transform(model, example_args=(X,), preset="lossless")
                assert torch.equal(made(X), model(X))
        except BaseException as error:  # a thread's own is lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_one_model_may_be_transformed_by_two_threads() -> None:
    model = net()
    made: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: made.append(transform(model, example_args=(X,), preset="lossless"))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    assert all(torch.equal(m(X), model(X)) for m in made)


def test_another_model_is_trained_while_a_thread_transforms() -> None:
    other, stop = net(), threading.Event()
    want, errors = other(X), list[BaseException]()

    def train() -> None:
        while not stop.is_set():
            try:
                out = other(X)
                out.sum().backward()
                assert torch.equal(out, want)
            except BaseException as error:  # a thread's own is lost
                errors.append(error)
                return

    thread = threading.Thread(target=train)
    thread.start()
    model = net()
    made = [transform(model, example_args=(X,), preset="lossless") for _ in range(3)]
    stop.set()
    thread.join()
    assert errors == []
    assert torch.equal(made[-1](X), model(X))


def test_a_graph_traced_twice_is_the_same_graph() -> None:
    for between in (Net.between, own_noise, slices_written, two_results):
        one, two = (transform(net(between), example_args=(X,)) for _ in range(2))
        assert one.code == two.code
        assert str(one.graph) == str(two.graph)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_weight_that_tracing_forgets_is_no_graph() -> None:
    """PyTorch hands whoever traces ``F.l1_loss`` all of its arguments but the weight."""

    class Weighted(nn.Module):
        def __init__(self, weighted: bool = True) -> None:
            super().__init__()
            self.inner, self.weighted = nn.Linear(8, 8), weighted

        def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return F.l1_loss(self.inner(x), y, weight=weight if self.weighted else None)

    x, y, weight = torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, 8)
    with pytest.raises(CaptureError, match=r"F\.l1_loss forgets its weight.*test_faithful\.py:"):
        transform(Weighted(), example_args=(x, y, weight))
    model = Weighted(weighted=False)
    assert torch.equal(transform(model, example_args=(x, y, weight))(x, y, weight), model(x, y, x))
    run = torch.compile(Weighted(), backend="dropit_eager")
    assert torch.equal(run(x, y, weight), run._orig_mod(x, y, weight))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(19, 23, batch_first=True), nn.Linear(23, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(torch.tanh(x))[0])
        return out


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_is_cached_of_fake_tensors_refuses_no_graph(kind: type[nn.RNNBase]) -> None:
    FakeTensorMode.cache_clear()
    made = transform(Recurrent(kind), example_args=(torch.randn(4, 7, 19),))
    assert made(torch.randn(5, 11, 19)).shape == (5, 11, 3)  # no size is fixed, as in exports
