"""Which read of a row each tensor is that autograd keeps for a call of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dropit_fx.ops.rule import INSIDE, Read, Use
from dropit_fx.private import storage_id


def match_saved(
    tensors: list[Tensor], reads: tuple[Read, ...], operands: Mapping[str, Any]
) -> list[Read | None]:
    """The row's read that each tensor is, or None.

    It may have the operand's storage, be made inside the op, or be a copy of an operand; what is
    certain is settled first, since under autocast a weight may have the shape of an input.
    """
    found: list[Read | None] = [None] * len(tensors)
    taken: set[str] = set()
    ways = [_is_operand, _is_copy, _is_made_inside, _has_its_shape, _has_its_last_dimension]
    if any(r.operand == INSIDE for r in reads):
        ways.remove(_is_copy)  # what is computed inside may look like an operand
    for fits in ways:
        for i, tensor in enumerate(tensors):
            open_reads = [r for r in reads if r.operand not in taken]
            if operands and found[i] is None:
                read = next((r for r in open_reads if fits(tensor, r.operand, operands)), None)
                found[i] = read
                taken |= {read.operand} - {INSIDE} if read is not None else set()
    return found


def _is_operand(tensor: Tensor, operand: str, operands: Mapping[str, Any]) -> bool:
    value = operands.get(operand)
    return isinstance(value, Tensor) and storage_id(value) == storage_id(tensor)


def _is_copy(tensor: Tensor, operand: str, operands: Mapping[str, Any]) -> bool:
    """A contiguous one, as cuDNN's batch norm makes of its input."""
    x = operands.get(operand)
    if not isinstance(x, Tensor) or x.is_contiguous():
        return False
    return x.dtype == tensor.dtype and x.shape == tensor.shape


def _is_made_inside(tensor: Tensor, operand: str, operands: Mapping[str, Any]) -> bool:
    return operand not in operands


def _has_its_shape(tensor: Tensor, operand: str, operands: Mapping[str, Any]) -> bool:
    value = operands[operand]
    return isinstance(value, Tensor) and sorted(value.shape) == sorted(tensor.shape)


def _has_its_last_dimension(tensor: Tensor, operand: str, operands: Mapping[str, Any]) -> bool:
    value = operands[operand]
    return (
        isinstance(value, Tensor)
        and value.numel() == tensor.numel()
        and value.shape[-1:] == tensor.shape[-1:]
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
