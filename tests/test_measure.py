"""Byte counts worked out by hand, and measured ones that have to agree with them."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx.holders import storages_alive
from dropit_fx.measure import peak_memory, saved_bytes, saved_tensors
from dropit_fx.private import storage_id

FLOAT = 4


def mlp(*, frozen: int | None = None) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    if frozen is not None:
        model[frozen].requires_grad_(False)
    return model


# --- saved_bytes: counts by hand


def test_lazy_modules_elsewhere_do_not_matter() -> None:
    lazy = nn.LazyLinear(4)  # its parameters have no storage yet
    assert saved_bytes(nn.Linear(8, 16), torch.randn(4, 8)) == 0
    assert isinstance(lazy.weight, nn.UninitializedParameter)


def test_linear_saves_only_its_input() -> None:
    x = torch.randn(32, 8)
    assert saved_bytes(nn.Linear(8, 16), x) == 0  # x existed before
    assert saved_bytes(lambda t: nn.Linear(8, 16)(t + 1), x) == 32 * 8 * FLOAT


def test_relu_output_is_one_storage_for_two_readers() -> None:
    # relu saves its result, the second linear its input: the same tensor.
    (saved,) = saved_tensors(mlp(), torch.randn(32, 8))
    assert saved.nbytes == 32 * 16 * FLOAT
    assert (saved.shape, saved.dtype) == ((32, 16), torch.float32)
    assert set(saved.saved_by) == {"ReluBackward0.result", "AddmmBackward0.mat1"}


def test_one_x_for_q_k_and_v() -> None:
    q, k, v = (nn.Linear(8, 8) for _ in range(3))
    norm = nn.LayerNorm(8)

    def attend(x: Tensor) -> Tensor:
        h = norm(x)
        return q(h) + k(h) + v(h)

    # the normalised x once, and a mean and a reciprocal deviation for each of 32 rows
    assert saved_bytes(attend, torch.randn(32, 8)) == 32 * 8 * FLOAT + 2 * 32 * FLOAT


def test_a_view_counts_as_the_storage_that_it_keeps() -> None:
    weight = nn.Parameter(torch.randn(8))
    x = torch.randn(100, 8)
    assert saved_bytes(lambda: (x * 2)[3] * weight) == 100 * 8 * FLOAT
    assert saved_bytes(lambda: (x * 2).t()[:, ::7].t() * weight) == 100 * 8 * FLOAT
    assert saved_bytes(lambda: (x[:1] * 2).expand(50, 8) * weight) == 8 * FLOAT


def test_an_input_counts_nowhere_not_even_a_view_of_it() -> None:
    weight = nn.Parameter(torch.randn(8))
    x = torch.randn(100, 8)
    assert saved_bytes(lambda t: t[:50] * weight, x) == 0
    assert (
        saved_bytes(lambda *, batch: batch["x"].view(50, 16)[:, :8] * weight, batch={"x": x}) == 0
    )


def test_what_existed_keeps_its_key_when_its_data_is_replaced() -> None:
    x = torch.ones(64)
    before, key = storages_alive(), storage_id(x)
    assert key in before
    x.data = torch.zeros(64)
    assert key not in map(storage_id, [torch.ones(64) for _ in range(64)])


def test_no_gradient_nothing_saved() -> None:
    model = mlp().requires_grad_(False)
    assert saved_bytes(model, torch.randn(32, 8)) == 0
    assert saved_bytes(torch.no_grad()(mlp()), torch.randn(32, 8)) == 0
    assert saved_bytes(lambda: None) == 0


def test_counts_under_grad_whatever_the_caller_has_switched_off() -> None:
    x = torch.randn(32, 8)
    model = mlp()
    with torch.no_grad():
        assert saved_bytes(model, x) == 32 * 16 * FLOAT
    with torch.inference_mode():
        assert saved_bytes(model, x) == 32 * 16 * FLOAT


class _BeginsAnew(nn.Module):
    """Cuts its input off, and differentiates from there on."""

    def forward(self, x: Tensor) -> Tensor:
        anew = F.relu(x).detach() * 1.0
        anew.requires_grad_()
        return anew.amax(-1)


def test_a_leaf_that_the_forward_makes_is_kept_like_any_activation() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    model = _BeginsAnew()
    assert saved_bytes(model, x) == 4 * 8 * 4 + 4 * 4  # what amax reads, and its result
    packed = dropit_fx.transform(model, example_args=(x,))
    told = dropit_fx.report(packed)
    assert (told.dense_bytes, told.kept_bytes) == (saved_bytes(model, x), saved_bytes(packed, x))


def test_frozen_weights_are_parameters_too() -> None:
    # A frozen last layer saves its weight, for the gradient of its input, and not its input.
    # relu keeps its own result all the same.
    assert saved_bytes(mlp(frozen=2), torch.randn(32, 8)) == 32 * 16 * FLOAT
    # GELU saves its input. What the frozen linear after it would save, its own input, goes.
    gelu = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    assert saved_bytes(gelu, torch.randn(32, 8)) == 2 * 32 * 16 * FLOAT
    gelu[2].requires_grad_(False)
    assert saved_bytes(gelu, torch.randn(32, 8)) == 32 * 16 * FLOAT


FROZEN = mlp().requires_grad_(False)


class Trainer:
    """Holds a model where no look at a function's closure finds it."""

    def __init__(self) -> None:
        self.parts = {"model": nn.Linear(8, 8).requires_grad_(False)}

    def step(self, x: Tensor) -> Tensor:
        return self.parts["model"](x)


@pytest.mark.parametrize("where", ["argument", "closure", "partial", "default", "global", "object"])
def test_models_are_found_wherever_they_are(where: str) -> None:
    head, x = nn.Linear(8, 8), torch.randn(32, 8)  # head's output requires grad: weights are saved
    frozen = nn.Linear(8, 8).requires_grad_(False)

    def run(inner: Callable[[Tensor], Tensor]) -> Tensor:
        return inner(head(x))

    def by_default(model: nn.Module = frozen) -> Tensor:
        return run(model)

    ways: dict[str, Callable[[], int]] = {
        "argument": lambda: saved_bytes(run, frozen),
        "closure": lambda: saved_bytes(lambda: run(frozen)),
        "partial": lambda: saved_bytes(functools.partial(run, frozen)),
        "default": lambda: saved_bytes(by_default),
        "global": lambda: saved_bytes(lambda: run(lambda h: FROZEN[0](h))),
        "object": lambda: saved_bytes(lambda: run(trainer.step)),
    }
    trainer = Trainer()
    assert ways[where]() == 0


def test_autocast_counts_the_low_precision_tensors() -> None:
    model, x = mlp(), torch.randn(32, 8)

    def step() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    # In bfloat16: x, which is a copy, the hidden layer, and the copy of the second weight,
    # which the gradient of the hidden layer reads.
    assert saved_bytes(step) == 2 * (32 * 8 + 32 * 16 + 4 * 16)


def test_what_is_freed_before_the_end_is_not_kept() -> None:
    weight = nn.Parameter(torch.randn(64))

    def step() -> Tensor:
        (weight.exp() * 2).sum()  # its result is dropped, and its graph with it
        return weight.sin().exp().sum()  # sin keeps the weight, exp its result

    assert saved_bytes(step) == 64 * FLOAT


def test_checkpointing_keeps_the_input_of_the_region_only() -> None:
    block = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)))
    x = torch.randn(32, 8)
    once = 32 * 8 * FLOAT
    assert saved_bytes(lambda: block(x * 2)) == 6 * once
    assert saved_bytes(lambda: checkpoint(block, x * 2, use_reentrant=False)) == once


def test_hooks_of_the_function_itself_are_seen_through() -> None:
    weight = nn.Parameter(torch.randn(64))

    def with_hooks() -> Tensor:
        with saved_tensors_hooks(lambda t: (t.half(), "packed"), lambda p: p[0].float()):
            return weight.exp()

    assert saved_bytes(with_hooks) == 64 * 2

    def offloaded() -> Tensor:
        with save_on_cpu():
            return weight.exp()

    assert saved_bytes(offloaded) == 64 * FLOAT


class StashesOnContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.stash = {"x": x * 2}
        y = x * 3
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_tensors_that_a_function_stashes_are_counted() -> None:
    weight = nn.Parameter(torch.randn(64))
    saved = saved_tensors(StashesOnContext.apply, weight)
    assert sorted(s.nbytes for s in saved) == [256, 256]
    assert {s.saved_by for s in saved} == {("StashesOnContextBackward",)}


def test_an_earlier_graph_is_not_counted_nor_disturbed() -> None:
    backbone, head = mlp(), nn.Linear(4, 4)
    features = backbone(torch.randn(32, 8))
    # tanh keeps its result; what the backbone keeps was kept before
    assert saved_bytes(lambda: head(features).tanh()) == 32 * 4 * FLOAT
    # what is handed over is the head's alone to keep, as inside of one model
    assert saved_bytes(lambda f: head(f).tanh(), features) == 2 * 32 * 4 * FLOAT
    assert saved_bytes(lambda f: head(f).tanh(), features.detach()) == 32 * 4 * FLOAT
    features.sum().backward()
    assert backbone[0].weight.grad is not None


def test_second_order_functions_run_under_the_count() -> None:
    weight = nn.Parameter(torch.randn(64))

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(weight.exp().sum(), weight, create_graph=True)
        return (grad**2).sum()

    # exp's result, the gradient of sum (one number, expanded), and their product, which is squared
    assert saved_bytes(penalty) == 64 * FLOAT + FLOAT + 64 * FLOAT


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_nested_and_empty_tensors() -> None:
    weight = nn.Parameter(torch.randn(8, 4))
    indices, values = torch.tensor([[0, 1, 1], [2, 0, 2]]), torch.randn(3)

    def sparse() -> Tensor:
        return torch.sparse.mm(torch.sparse_coo_tensor(indices, values * 2, (2, 8)), weight)

    assert saved_bytes(sparse) == 3 * FLOAT  # the values; the indices existed before
    ragged = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    assert saved_bytes(lambda: nn.Linear(8, 4)(ragged * 2)) == 8 * 8 * FLOAT
    assert saved_bytes(mlp(), torch.randn(0, 8)) == 0


# --- saved_bytes: compiled


class OfOnesOwn(nn.Sequential):
    """Older PyTorch leaves a Sequential that is compiled in place as it is."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out


@pytest.mark.parametrize(
    ("backend", "wrap"),
    [
        ("aot_eager", "module"),
        ("aot_eager", "in place"),
        ("aot_eager", "closure"),
        ("inductor", "module"),
    ],
)
def test_compiled_counts_what_the_partition_saves(backend: str, wrap: str) -> None:
    model, x = OfOnesOwn(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(32, 8)
    run: Callable[..., Any] = model
    if wrap == "in place":
        model.compile(backend=backend)
    else:
        run = torch.compile(model, backend=backend)
    if wrap == "closure":
        compiled = run
        run = lambda t: compiled(t)  # noqa: E731
    # what GELU and the second linear read
    both = 2 * 32 * 16 * FLOAT
    assert saved_bytes(run, x) == both
    assert all(s.saved_by == ("CompiledFunctionBackward",) for s in saved_tensors(run, x))


def test_compiling_and_measuring_compiles_once() -> None:
    compiles = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiles.append(gm)
        return gm.forward

    model = torch.compile(mlp(), backend=backend)
    x = torch.randn(32, 8)
    assert saved_bytes(model, x) == 32 * 16 * FLOAT
    assert peak_memory(model, x) > 0
    model(x)
    assert len(compiles) == 1


# --- peak_memory


MIB = 2**20


def slack(allocations: int) -> int:
    """The profiler reports exact sizes; scalars (seeds of the backward, sums) come on top."""
    return 64 * allocations


def test_peak_of_known_allocations() -> None:
    def step() -> Tensor:
        a = torch.empty(MIB, dtype=torch.uint8)
        b = torch.empty(2 * MIB, dtype=torch.uint8)
        del a
        c = torch.empty(MIB // 2, dtype=torch.uint8)
        del b
        return c

    assert peak_memory(step) == 3 * MIB


def test_peak_of_forward_and_backward() -> None:
    x = torch.randn(MIB // FLOAT, requires_grad=True)
    # forward: exp's result is kept, sum is a scalar; backward: the expanded gradient times it
    forward, gradient = MIB, MIB
    peak = peak_memory(lambda: x.exp().sum())
    assert 0 <= peak - (forward + gradient) <= slack(8)
    with_history = peak_memory(lambda: x.exp().exp().exp())
    assert with_history > 4 * MIB  # three results, and at least a gradient


def test_peak_without_gradients_is_the_forward() -> None:
    x = torch.randn(MIB // FLOAT)
    assert peak_memory(lambda: x.exp()) == MIB
    assert peak_memory(lambda: (x.exp(), x.sin())) == 2 * MIB
    assert peak_memory(lambda: None) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_peak_sees_what_is_saved(compiled: bool) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    run = torch.compile(model) if compiled else model
    x = torch.randn(4096, 64)
    activation = 4096 * 64 * FLOAT
    saved, peak = saved_bytes(run, x), peak_memory(run, x)
    # each GELU saves its input, and the linears after the first save theirs
    assert saved == 7 * activation
    # the output and, in the backward, a few gradients come on top
    assert saved + activation <= peak <= saved + 4 * activation


def test_peak_sees_checkpointing() -> None:
    blocks = [nn.Sequential(*(nn.Tanh() for _ in range(4))) for _ in range(4)]
    x = torch.randn(MIB // FLOAT, requires_grad=True)

    def chain(call: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: functools.reduce(lambda h, block: call(block, h), blocks, x)

    plain = chain(lambda block, h: block(h))
    saving = chain(lambda block, h: checkpoint(block, h, use_reentrant=False))
    # 16 results and one or two gradients, against 4 outputs of regions, 3 more within one of them
    assert 17 * MIB <= peak_memory(plain) <= 18 * MIB + slack(40)
    assert 7 * MIB <= peak_memory(saving) <= 10 * MIB + slack(40)


class Output(dict[str, Tensor]):
    """Like a Hugging Face output: a mapping with attributes."""

    @property
    def loss(self) -> Tensor:
        return self["loss"]


def test_results_of_many_kinds_are_differentiated() -> None:
    x = torch.randn(MIB // FLOAT, requires_grad=True)
    seen: list[str] = []

    def result(name: str) -> Tensor:
        y = x * 1
        y.register_hook(lambda grad: seen.append(name))
        return y

    def counted(make: Callable[[], Any]) -> list[str]:
        seen.clear()
        peak_memory(make)
        return sorted(set(seen))

    assert counted(lambda: (result("a"), [result("b")], 3)) == ["a", "b"]
    assert counted(lambda: {"a": result("a"), "ids": torch.arange(3)}) == ["a"]
    assert counted(lambda: Output(loss=result("loss").mean(), logits=result("logits"))) == ["loss"]
    assert counted(lambda: torch.view_as_complex(result("z").view(-1, 2))) == ["z"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_on_cuda() -> None:
    x = torch.randn(MIB // FLOAT, device="cuda", requires_grad=True)
    peak = peak_memory(lambda: x.exp().sum())
    assert 0 <= peak - 2 * MIB <= 512 * 8  # the allocator rounds to 512


# --- both


@pytest.mark.parametrize("measure", [saved_bytes, peak_memory])
@pytest.mark.parametrize("compiled", [False, True])
def test_measuring_leaves_no_trace(measure: Callable[..., int], compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    run = torch.compile(model, backend="aot_eager") if compiled else model
    model(torch.randn(4, 8)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    values = [g.clone() for g in grads]
    pending = model[:2](torch.randn(4, 8)).sum()  # batch_norm saves its buffers
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()

    assert measure(run, torch.ones(16, 8)) > 0

    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True))
    pending.backward()  # the graph from before is still valid


@pytest.mark.parametrize("measure", [saved_bytes, peak_memory])
def test_unrelated_backwards_still_run(measure: Callable[..., int]) -> None:
    other = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    pending = other(torch.randn(4, 8)).sum()  # keeps the buffers, whose version must not change
    measure(mlp(), torch.randn(4, 8))
    pending.backward()
    assert other[0].weight.grad is not None


@pytest.mark.parametrize("measure", [saved_bytes, saved_tensors, peak_memory])
def test_what_cannot_be_called_is_refused(measure: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"got a Tensor\. .*{measure.__name__}\(model, x\)"):
        measure(torch.ones(3))


def test_peak_refuses_an_argument_with_a_history() -> None:
    h = torch.ones(3, requires_grad=True) * 2
    with pytest.raises(ValueError, match=r"shape \(3,\) is itself the result of MulBackward0"):
        peak_memory(torch.exp, h)
    h.sum().backward()


def test_peak_says_what_to_do_about_a_function_that_calls_backward() -> None:
    x = torch.ones(3, requires_grad=True)

    def step() -> Tensor:
        loss = F.mse_loss(x.exp(), x)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError) as caught:
        peak_memory(step)
    assert "without having called backward" in caught.value.__notes__[0]


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = x.exp()
        return ctx.kept * 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return ctx.kept * grad


@pytest.mark.parametrize("function", [_Square, _Exp])
@pytest.mark.parametrize("backend", ["eager", "dropit_eager", "aot_eager"])
def test_custom_functions_count_in_compiled_graphs(function: Any, backend: str) -> None:
    layer, x = nn.Linear(16, 1024), torch.randn(64, 16)
    torch._dynamo.reset()
    run = torch.compile(lambda x: function.apply(layer(x)).sum(), backend=backend, fullgraph=True)
    assert saved_bytes(run, x) == 64 * 1024 * 4
