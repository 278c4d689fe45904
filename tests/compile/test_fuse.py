"""Fused packing: the partition, report and gradients of the kernels, and no op to dispatch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from dropit_fx.codecs import CODECS
from dropit_fx.compile import backend, fuse
from dropit_fx.compile.fuse import FORMS, FusePacking
from dropit_fx.compile.inner import INNER, aot
from dropit_fx.compile.partition import KeepPacked
from dropit_fx.private import (
    CustomGraphPass,
    FakeTensorMode,
    make_boxed_func,
    make_fx,
    select_decomp_table,
)
from dropit_fx.private_inductor import told_of_a_gpu
from dropit_fx.runtime.regions import overload_name

WIDTH = 48


class Left(CustomGraphPass):
    """Notes the ops of namespace dropit that inductor is left with."""

    def __init__(self) -> None:
        self.ops: list[str] = []

    def uuid(self) -> None:
        return None

    def __call__(self, graph: fx.Graph) -> None:
        names = [overload_name(n) for n in graph.nodes]
        self.ops += [n.partition("::")[2] for n in names if n.startswith("dropit::")]


class Block(nn.Module):
    """A norm, a GELU, a ReLU, dropout, a transposed operand, and sizes that fill no block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.mid = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.mid(nn.functional.gelu(self.up(self.norm(x)))))
        y = nn.functional.hardtanh(x + self.down(h))
        return y + nn.functional.silu(y.mT @ y).mean()


def pool() -> nn.Module:
    """Channels around their mean, and places in pooling windows."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Hardtanh(),
        nn.MaxPool2d(3),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
    )


def unfused(job: Any) -> Callable[..., Any]:
    """Stands for inductor: decompositions, the guard and the passes, but graphs run as they are."""

    def run(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if job.fuse:
            FusePacking()(graph.graph)
        graph.graph.lint()
        job.options["post_grad_custom_post_pass"](graph.graph)
        graph.recompile()
        boxed: Callable[..., Any] = make_boxed_func(graph.forward)
        return boxed

    return aot(True, run)(job)


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is generated, which would take minutes."""
    monkeypatch.setitem(INNER, "inductor", unfused)


def step(
    model: nn.Module, x: Tensor, options: dict[str, Any], dynamic: bool | None = None
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Output, gradients, and the ops of namespace dropit that inductor gets."""
    left, own = Left(), copy.deepcopy(model)
    torch._dynamo.reset()
    options = {**options, "post_grad_custom_post_pass": left}
    with torch.compiler.config.patch(force_disable_caches=True):
        run = torch.compile(own, backend="dropit", options=options, dynamic=dynamic)
        x = x.clone().requires_grad_(x.is_floating_point())
        out = run(x)
        out.square().mean().backward()
    grads = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
    return out.detach(), grads | {"x": x.grad}, left.ops


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        error = (grad - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)
        assert error <= bound, f"{name} differs by {error}"


TIES = 1e-4  # relative, of a gradient: codes at ties may differ, sums may be made in another order


def quant(**options: Any) -> dict[str, Any]:
    return {"rules": [{"codec": "bitmask"}, {"op": "*", "codec": "quant", **options}]}


SELECTS = {"sparsify", "unsparsify"}  # with gamma > 0
CONFIGS: dict[str, tuple[dict[str, Any], set[str]]] = {  # options, and ops that may stay
    "lossless": ({"preset": "lossless"}, set()),
    "fewbit": ({"preset": "fewbit"}, set()),
    "balanced": ({"preset": "balanced"}, SELECTS),
    "max": ({"preset": "max"}, SELECTS),
    **{
        f"{range_}, {bits} bits": ({"config": quant(bits=bits, range=range_, block=256)}, set())
        for range_, bits in [("symmetric", 2), ("symmetric", 7), ("affine", 4), ("uniform", 3)]
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_bytes_and_report_are_those_of_the_kernels(no_code: None, name: str) -> None:
    torch.manual_seed(0)
    (options, stay), model, x = CONFIGS[name], Block(), torch.randn(3, 37, WIDTH)
    out, grads, ops = step(model, x, {**options, "fuse": False})
    record = backend.compiled_graphs()[-1]
    fused_out, fused_grads, fused_ops = step(model, x, {**options, "fuse": True})
    fused_record = backend.compiled_graphs()[-1]
    assert torch.equal(out, fused_out)
    bits = options.get("config", quant(bits=8))["rules"][-1]["bits"]
    # which processor computes it decides whether a code lies at a tie: of each tensor, one may
    one_level = (
        3 * 2 ** (1 - bits) / (3 * 37 * 2 * WIDTH) ** 0.5
    )  # a block's largest is 3 deviations
    assert_close(fused_grads, grads, 0 if name == "lossless" else max(TIES, one_level))
    assert fused_record.report == record.report
    assert fused_record.partitions == record.partitions
    assert set(ops) & {op.removeprefix("dropit::") for op in FORMS}
    assert {op for op in fused_ops if f"dropit::{op}" in FORMS} <= stay
    assert len(fused_ops) < len(ops)


def test_channels_and_windows_fuse(no_code: None) -> None:
    torch.manual_seed(0)
    model, x = pool(), torch.randn(4, 3, 14, 14).contiguous(memory_format=torch.channels_last)
    options = {"config": {"preset": "max"}}
    out, grads, ops = step(model, x, {**options, "fuse": False})
    fused_out, fused_grads, fused_ops = step(model, x, {**options, "fuse": True})
    assert torch.equal(out, fused_out)
    assert_close(fused_grads, grads, TIES)
    assert ops
    assert not fused_ops


def test_on_a_cpu_kernels_stay_unless_they_are_asked_to_go(no_code: None) -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(64, 8)
    _, _, ops = step(model, x, {})
    assert "sparsify" in ops or "encode_steps" in ops


def test_sizes_may_be_symbolic(no_code: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 24), nn.ReLU())
    x = torch.randn(37, 8)
    found = [
        step(model, x, {"config": quant(bits=5), "fuse": f}, dynamic=True) for f in (False, True)
    ]
    (out, grads, ops), (fused_out, fused_grads, fused_ops) = found
    assert ops
    assert not fused_ops
    assert torch.equal(out, fused_out)
    assert_close(fused_grads, grads, TIES)


def test_checkpointed_regions_and_stochastic_rounding(no_code: None) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mlp = nn.Linear(WIDTH, WIDTH), mlp

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.mlp, torch.relu(self.first(x)), use_reentrant=False)

    x = torch.randn(64, WIDTH)
    rule = {"op": "*", "codec": "quant", "bits": 4}
    for rounding in ("nearest", "stochastic"):
        config = {"rules": [{**rule, "rounding": rounding}, {"module": "*", "codec": "keep"}]}
        (_, _, ops), (_, grads, fused_ops) = (
            step(Region(), x, {"config": config, "fuse": f}) for f in (False, True)
        )
        assert "sparsify" in ops
        assert ("sparsify" in fused_ops) == (rounding == "stochastic")
        assert "unsparsify" not in fused_ops
        assert all(g.isfinite().all() for g in grads.values())


def test_a_rewritten_model_is_given_the_pass() -> None:
    import dropit_fx

    torch.manual_seed(0)
    x, left = torch.randn(32, 8), Left()
    model = dropit_fx.transform(
        nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4)),
        preset="max",
        example_args=(x,),
    )
    options: dict[str, Any] = {
        "custom_partitioner_fn": KeepPacked(),
        "post_grad_custom_pre_pass": FusePacking(),
        "post_grad_custom_post_pass": left,
    }
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.compile(model, options=options)(x).sum().backward()
    assert not left.ops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse": "yes"}, "fuse='yes': must be True, False, or None"),
        ({"fuse": True, "inner": "aot_eager"}, "inner backend 'aot_eager' fuses nothing"),
    ],
)
def test_the_option_is_checked(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(nn.Linear(4, 4), backend="dropit", options=options)
    with pytest.raises(Exception, match="ConfigError") as caught:
        compiled(torch.randn(4, 4))
    assert message in str(caught.value)


def test_the_environment_says_it_too(no_code: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.Hardtanh(), nn.Linear(32, 8)), torch.randn(64, 8)
    monkeypatch.setenv("DROPIT_FUSE", "1")
    assert not step(model, x, {"preset": "lossless"})[2]
    assert step(model, x, {"preset": "lossless", "fuse": False})[2]
    monkeypatch.setenv("DROPIT_FUSE", "perhaps")
    with pytest.raises(Exception, match="DROPIT_FUSE='perhaps' is not true or false"):
        step(model, x, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_over_rows_are_those_of_one_step(dtype: torch.dtype) -> None:
    """In another order of the summands, and rounded to the dtype once."""

    def gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        grad = (2 * x).transpose(1, 2).contiguous()  # (8, 96, 3, 16)
        rows = grad.view(8 * 96, 48)
        return rows @ weight, rows.sum([0], keepdim=True), grad.sum([1, 0])

    def sums(graph: fx.Graph) -> list[fx.Node]:
        return graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)

    given = torch.randn(8, 3, 96, 16).to(dtype), torch.randn(48, 4).to(dtype)
    with told_of_a_gpu(), FakeTensorMode() as mode:
        on_gpu = [mode.from_tensor(t).to("cuda") for t in given]
        graph = make_fx(gradients, select_decomp_table(), tracing_mode="fake")(*on_gpu)
    before = gradients(*given)
    FusePacking()(graph.graph)
    assert len(sums(graph.graph)) == 2, "nothing is unpacked: dense is followed to the last bit"
    for node in sums(graph.graph):
        fuse._sum_where_made(graph.graph, node)
    graph.recompile()
    assert [len(n.args[1]) for n in sums(graph.graph)] == [1, 1, 1, 1]
    for ours, theirs in zip(graph(*given), before, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_codecs_that_share_an_op_offer_one_form_of_it() -> None:
    found: dict[str, Callable[..., Any]] = {}
    for codec in CODECS:
        for name, form in codec.fused.items():
            assert hasattr(torch.ops.dropit, name), f"{codec.name} names no op: {name}"
            assert found.setdefault(name, form) is form
