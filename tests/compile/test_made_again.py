"""What packed calls make again of tensors that are kept is not saved beside these."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropit_fx.compile.backend import compiled_graphs

WIDTH = 64
INNERS = ("aot_eager", "aot_eager_decomp_partition")
# What the first layers read is an input; of what a config keeps, others are made again
CONFIGS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "kept": {"rules": [{"op": op, "codec": "keep"} for op in ("gelu", "layer_norm")]},
}


def blocks() -> nn.Module:
    def block() -> nn.Module:
        wide = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        return nn.Sequential(nn.LayerNorm(WIDTH), *wide)

    torch.manual_seed(0)
    return nn.Sequential(block(), block())


def step(model: nn.Module, x: Tensor, backend: str, options: dict[str, Any], cast: bool) -> Tensor:
    """The gradient of a training step."""
    model = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        out = torch.compile(model, backend=backend, options=options)(x)
    out.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("inner", INNERS)
def test_what_is_saved_is_what_is_said(inner: str, config: str, cast: bool) -> None:
    model, x = blocks(), torch.randn(512, WIDTH)
    options = {"config": CONFIGS[config]}
    found = step(model, x, "dropit", {**options, "inner": inner}, cast)
    record = compiled_graphs()[-1]
    (partition,) = record.partitions
    # Of a norm in half precision, one that is decomposed keeps the statistics in that too
    narrow = 2 * 2 * len(x) if cast and inner != "aot_eager" else 0
    assert record.report.kept_bytes - partition.saved_bytes == narrow
    assert not partition.packs_in_backward
    eager = step(model, x, "dropit_eager", options, cast)
    assert (found - eager).norm() < (0.02 if cast else 1e-4) * eager.norm()


def test_a_parameter_that_the_forward_writes_into_is_cast_once() -> None:
    """Its copy is saved: cast again, it would be another."""

    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            with torch.no_grad():
                self.weight.mul_(2.0)
            return out

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), Centred(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.tanh(self.first(x)))
            return out

    torch.manual_seed(0)
    model, x = Model(), torch.randn(64, WIDTH)
    lossless = {"preset": "lossless"}
    found = step(model, x, "dropit", {**lossless, "inner": "aot_eager"}, cast=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().mean().backward()
    dense = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (found - dense).norm() < 0.01 * dense.norm()
