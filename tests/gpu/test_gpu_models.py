"""Whole models on CUDA, rewritten and plugged in: forward, gradients, saved bytes, CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from models import CASE, Case, every_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import dropit_fx
from dropit_fx import measure
from dropit_fx.compile import backend


def prepared(case: Case, device: torch.device) -> tuple[nn.Module, Any, Any]:
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), case.inputs())
    return case.model().to(device), args, kwargs


@every_model
def test_the_forward_of_a_rewritten_model_has_the_bits_of_the_dense_one(
    case: Case, device: torch.device
) -> None:
    model, args, kwargs = prepared(case, device)
    packed = dropit_fx.transform(model, example_args=args, example_kwargs=kwargs)
    inputs = args, kwargs
    dense = case.dense(model, "gradients", like=inputs) if case.exported else copy.deepcopy(model)
    mine, theirs = (models.step(m, args, kwargs) for m in (packed, dense))
    assert models.differing(mine.output, theirs.output) == []
    assert models.differing(mine.buffers, theirs.buffers) == []
    assert error(*(list(g.gradients.values()) for g in (mine, theirs))) < 0.6


def error(mine: list[Tensor | None], theirs: list[Tensor | None]) -> float:
    """Of all gradients as one vector, relative."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (apart / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


@pytest.fixture(autouse=True)
def quicker_to_compile(rehearsal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What inductor does on CPUs is tested elsewhere."""
    if rehearsal:
        monkeypatch.setenv("DROPIT_INNER", "aot_eager_decomp_partition")


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256)),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)),
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        return torch.relu(self.b(nn.functional.max_pool2d(x, 2))).mean((2, 3))


BUILDS = {"mlp": (mlp, (512, 64)), "convolutions": (Convolutions, (8, 3, 32, 32))}


def steps(run: Any, model: nn.Module, batches: list[Tensor], autocast: bool) -> list[list[Tensor]]:
    """The gradients of each step; the parameters move, so that a stale buffer would show."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = []
    for x in batches:
        if x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            out = run(x)
        out.float().square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return found


@pytest.mark.parametrize("graphs", [False, True], ids=["", "cudagraphs"])
@pytest.mark.parametrize(("preset", "limit"), [("lossless", 1e-4), ("balanced", 0.6)])
@pytest.mark.parametrize("build", BUILDS)
def test_steps_of_the_plug_in_have_the_gradients_of_the_dense_model(
    build: str, preset: str, limit: float, graphs: bool, device: torch.device
) -> None:
    make, shape = BUILDS[build]
    dense = make().to(device)
    model = copy.deepcopy(dense)
    batches = [torch.randn(shape, device=device) for _ in range(4)]
    options = {"preset": preset} | ({"triton.cudagraphs": True} if graphs else {})
    torch._dynamo.utils.counters.clear()
    with torch.compiler.config.patch(force_disable_caches=True):
        fast = torch.compile(model, backend="dropit", fullgraph=True, options=options)
        mine = steps(fast, model, batches, autocast=False)
    if graphs and device.type == "cuda":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    theirs = steps(dense, dense, batches, autocast=False)
    assert max(error(a, b) for a, b in zip(mine, theirs, strict=True)) < limit
    if not graphs:
        partition = backend.compiled_graphs()[-1].partitions[-1]
        assert partition.packs_in_backward == partition.unpacks_in_forward == ()
        assert measure.saved_bytes(fast, batches[0]) == partition.saved_bytes


def test_reduce_overhead_is_a_mode_of_the_plug_in(device: torch.device) -> None:
    dense = mlp().to(device)
    model = copy.deepcopy(dense)
    batches = [torch.randn(512, 64, device=device) for _ in range(4)]
    fast = torch.compile(model, backend="dropit", mode="reduce-overhead")
    mine = steps(fast, model, batches, autocast=True)
    theirs = steps(dense, dense, batches, autocast=True)
    assert max(error(a, b) for a, b in zip(mine, theirs, strict=True)) < 0.6


def test_a_model_of_another_device_than_the_current_one(other_device: torch.device) -> None:
    case = CASE["deit_tiny_patch16_224"]
    model, args, kwargs = prepared(case, other_device)
    model.eval()  # no dropout: nothing is drawn
    packed = dropit_fx.transform(model, example_args=args, example_kwargs=kwargs)
    mine, theirs = (models.step(m, args, kwargs) for m in (packed, model))
    assert models.differing(mine.output, theirs.output) == []


def test_what_waits_on_the_host_comes_back_as_it_was(device: torch.device, rehearsal: bool) -> None:
    torch.manual_seed(0)
    layers, rows = (3, 256) if rehearsal else (24, 16384)
    blocks = (
        nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256), nn.Tanh()) for _ in range(layers)
    )
    model = nn.Sequential(*blocks).to(device)
    x = torch.randn(rows, 256, device=device)

    def step(packed: nn.Module) -> tuple[int, list[Tensor]]:
        model.zero_grad()
        loss = packed(x).square().mean()
        level = 0 if rehearsal else torch.cuda.memory_allocated(device)
        loss.backward()
        return level, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    stays, away = (
        dropit_fx.transform(model, {"offload": offload}, example_args=(x,))
        for offload in (False, True)
    )
    step(stays)  # what libraries take for themselves is there
    level, expected = step(stays)
    for _ in range(10):  # memory of the step before is used again
        lower, found = step(away)
        assert error(found, expected) < 1e-6
    told = dropit_fx.report(away)
    assert (told.host_bytes > 0) != rehearsal
    # the bytes of two layers may be under way
    assert lower <= level - told.host_bytes * (1 - 4 / layers) or rehearsal
