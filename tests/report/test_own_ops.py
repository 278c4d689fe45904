"""What is told of inputs whose class has a say in what ops do: packed calls run dense for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx.measure import saved_bytes


class Named(Tensor):
    """A name, and nothing else."""


class Seen(Tensor):
    """Sees each op."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Block(nn.Module):
    """A small block: one part reads ``x``, one reads ``y`` alone, and one may be checkpointed."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(64, 128), nn.Linear(64, 128)
        self.rest = nn.Sequential(nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 8))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts."""
        h = self.first(x)
        h = checkpoint(self.rest, h, use_reentrant=False) if self.checkpointed else self.rest(h)
        return h, self.rest(self.other(y))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("preset", ["balanced", "lossless"])
@pytest.mark.parametrize("kind", [Named, Seen])
def test_the_report_says_that_they_stay_dense(
    kind: type[Tensor], preset: str, checkpointed: bool
) -> None:
    model = Block(checkpointed)
    x, y = torch.randn(256, 64).as_subclass(kind), torch.randn(256, 64)
    made = dropit_fx.transform(model, preset=preset, example_args=(x, y))
    report = dropit_fx.report(made)
    assert report.kept_bytes == saved_bytes(made, x, y)
    assert report.dense_bytes == saved_bytes(model, x, y)
    assert any(kind.__name__ in row.reason for row in report.rows)
    if preset == "balanced":
        assert any(row.codec != "keep" for row in report.rows)  # what is made of `y` alone
    for a, b in zip(made(x, y), model(x, y), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b)
