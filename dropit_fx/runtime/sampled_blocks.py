"""Blocks whose gradients flow through some rows alone: what a rewritten graph calls around one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropit_fx.kernels.rows import UNIFORM


def draw_rows(x: Tensor, reads: tuple[Tensor, ...], share: float, dim: int) -> Tensor:
    """The rows of ``x`` along ``dim`` that gradients flow through, ascending, int32.

    Args:
        x: The input of the block.
        reads: What else it reads that may want a gradient.
        share: Of the rows, in (0, 1): so many, rounded up, drawn anew in each call.
        dim: Of ``x``.

    Returns:
        One row only, where no gradient is asked for.
    """
    rows = x.shape[dim]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *reads))
    count = kept_count(rows, share) if wanted else min(rows, 1)
    ones = torch.ones((rows, 1), device=x.device)
    index: Tensor = torch.ops.dropit.select_rows(ones, count, UNIFORM)[0]
    return index


def kept_count(rows: int, share: float) -> int:
    """How many rows a share is, at least one where there are any."""
    return min(rows, max(1, -int(-rows * share // 1)))


def flow_through(y: Tensor, some: Tensor, index: Tensor, dim: int) -> Tensor:
    """``y``, whose gradient goes to ``some``: ``y.index_select(dim, index)``, made again.

    Args:
        y: What the block gives for all rows; it wants no gradient.
        some: What it gives for the rows that gradients flow through.
        index: Which these are.
        dim: Of ``y``.
    """
    out: Tensor = _Flow.apply(y, some, index, dim)
    return out


class _Flow(torch.autograd.Function):
    """``apply(y, some, index, dim)``: the value of ``y``, with the gradient of ``some``."""

    @staticmethod
    def forward(y: Tensor, some: Tensor, index: Tensor, dim: int) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, index, ctx.dim = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return None, grad.index_select(ctx.dim, index), None, None
