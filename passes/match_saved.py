"""Which read of a row each tensor is that autograd keeps for a call of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dropit_fx.ops.rule import INSIDE, Read, Use
from dropit_fx.private import storage_id


def match_saved(
    tensors: list[Tensor],
    reads: tuple[Read, ...],
    operands: Mapping[str, Any],
    unwanted: Collection[str] = (),
    lowered: torch.dtype | None = None,
) -> list[Read | None]:
    """The row's read that each tensor is, or None.

    It may have the operand's storage, be made inside the op, or be a copy of an operand; what is
    certain is settled first, since under autocast a weight may have the shape of an input. A copy
    is rather of an operand that a gradient asks for than of an unwanted one: what is written in
    place is saved as it was.

    Args:
        tensors: What autograd keeps.
        reads: Of the row.
        operands: Of the call, by name.
        unwanted: Operands that no gradient asks for.
        lowered: The dtype in which autocast hands its operands to the op: copies of them, which are
            not what the op makes inside. None: it does not.
    """
    wanted = [read for read in reads if read.operand not in unwanted]
    likely = [*wanted, *(read for read in reads if read.operand in unwanted)]
    found = _of_their_size(tensors, reads, operands)
    taken = {read.operand for read in found if read is not None}
    for fits in _WAYS:
        if fits is _is_copy and any(r.operand == INSIDE for r in reads):
            continue  # what is computed inside may look like an operand
        among = reads if fits is _is_it else wanted if fits is _is_copy else likely
        for i, tensor in enumerate(tensors):
            if not operands or found[i] is not None:
                continue
            if fits is _is_cast and tensor.dtype != lowered:
                continue
            for read in among:
                x = operands.get(read.operand, _MADE_INSIDE)
                if read.operand not in taken and fits(tensor, x):
                    found[i] = read
                    taken |= {read.operand} - {INSIDE}
                    break
    return found


def _of_their_size(
    tensors: list[Tensor], reads: tuple[Read, ...], operands: Mapping[str, Any]
) -> list[Read | None]:
    """The reads of which the row knows the shape, each with the first tensor made in that size."""
    found: list[Read | None] = [None] * len(tensors)
    outside = {storage_id(x) for x in operands.values() if isinstance(x, Tensor)}
    for read in (r for r in reads if r.shape is not None and operands):
        assert read.shape is not None
        numel = math.prod(read.shape(operands))
        for i, tensor in enumerate(tensors):
            inside = storage_id(tensor) not in outside
            if found[i] is None and inside and tensor.numel() == numel:
                found[i] = read
                break
    return found


_MADE_INSIDE = object()  # in the place of an operand


def _is_copy(tensor: Tensor, x: Any) -> bool:
    """A contiguous one, as cuDNN's batch norm makes of its input."""
    if not isinstance(x, Tensor) or x.is_contiguous():
        return False
    return x.dtype == tensor.dtype and x.shape == tensor.shape


def _is_cast(tensor: Tensor, x: Any) -> bool:
    """Autocast's."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return x.dtype != tensor.dtype and x.shape == tensor.shape


def _is_it(tensor: Tensor, x: Any) -> bool:
    return isinstance(x, Tensor) and storage_id(x) == storage_id(tensor)


_WAYS: tuple[Callable[[Tensor, Any], bool], ...] = (  # the surest first
    _is_it,
    _is_copy,
    _is_cast,
    lambda tensor, x: x is _MADE_INSIDE,
    lambda tensor, x: isinstance(x, Tensor) and sorted(x.shape) == sorted(tensor.shape),
    lambda tensor, x: (
        isinstance(x, Tensor) and x.numel() == tensor.numel() and x.shape[-1:] == tensor.shape[-1:]
    ),
)


def is_copy_of(tensor: Tensor, read: Read | None, operands: Mapping[str, Any]) -> bool:
    """Whether the op itself made ``tensor`` from the operand: expanded, or without gaps.

    A copy in another dtype is autocast's, and a packed call makes it too.
    """
    x = operands.get(read.operand) if read is not None else None
    if not isinstance(x, Tensor) or (read is not None and read.use is Use.SHAPE):
        return False
    there = {storage_id(v) for v in operands.values() if isinstance(v, Tensor)}
    return storage_id(tensor) not in there and x.dtype == tensor.dtype
