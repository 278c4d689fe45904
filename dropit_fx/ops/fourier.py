"""Fourier transforms of real values: their backward reads the shape of the input alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropit_fx.ops.rule import OpRule, shape_only

aten = torch.ops.aten


def _of_one_dimension(name: str) -> OpRule:
    op: Callable[..., Tensor] = getattr(torch.fft, name)

    def run(input: Tensor, n: Any = None, dim: int = -1, norm: str | None = None) -> Tensor:
        return op(input, n, dim, norm)

    return shape_only(f"fft_{name}", run, op, getattr(aten, f"fft_{name}").default)


def _of_several(name: str, dims: Any) -> OpRule:
    op: Callable[..., Tensor] = getattr(torch.fft, name)

    def run(input: Tensor, s: Any = None, dim: Any = dims, norm: str | None = None) -> Tensor:
        return op(input, s, dim, norm)

    return shape_only(f"fft_{name}", run, op, getattr(aten, f"fft_{name}").default)


# Those of all values in several dimensions are complex from the first on, and keep nothing
ROWS = (
    *map(_of_one_dimension, ("rfft", "fft")),
    *(_of_several(name, dims) for name, dims in (("rfft2", (-2, -1)), ("rfftn", None))),
)
