"""Bit streams in plain tensor ops, for compilers that fuse: each element by itself, from its index.

Places are computed from an ``arange``, which inductor folds into the loop that it writes: reading a
code costs one or two loads and no tensor in between. Whatever reads a decoded tensor then reads the
bytes instead. The bytes are those of `reference.pack_uint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from dropit_fx.kernels.dtypes import INT_OF
from dropit_fx.kernels.format import uint_nbytes
from dropit_fx.private import unsafe_index, unsafe_index_put


def places(count: Any, like: Tensor) -> Tensor:
    """0, 1, ..., count - 1 (int64); count may be symbolic."""
    return torch.arange(count, device=like.device)


def take(x: Tensor, at: Tensor) -> Tensor:
    """``x[at]`` of a flat ``x``, whose places are known to be in it."""
    out: Tensor = unsafe_index.Tensor(x, [at])
    return out


def divides(length: int, numel: Any) -> bool:
    """Whether ``numel`` is known to be a multiple of ``length``; no guard on a symbolic one."""
    return isinstance(numel, int) and numel % length == 0


def is_empty(numel: Any) -> bool:
    """Whether ``numel`` is known to be 0; no guard on a symbolic one."""
    return isinstance(numel, int) and numel == 0


def codes_at(stream: Tensor, at: Tensor, bits: int) -> Tensor:
    """The codes (int32) at places of a bit stream.

    Args:
        stream: (ceil(n * bits / 8),) uint8.
        at: places, each in 0..n - 1; any shape.
        bits: 1..8.
    """
    if 8 % bits == 0:
        each = 8 // bits
        word = take(stream, at // each).to(torch.int32)
        shift = (at % each) * bits
    else:  # by groups of 8 codes, so that no place is multiplied beyond 32 bits
        bit = (at % 8) * bits
        first, shift = at // 8 * bits + bit // 8, bit % 8
        low = take(stream, first).to(torch.int32)
        high = take(stream, (first + 1).clamp(max=stream.numel() - 1)).to(torch.int32)
        word = low | (high << 8)
    codes: Tensor = (word >> shift.to(torch.int32)) & (2**bits - 1)
    return codes


def bytes_of(code: Callable[[Tensor], Tensor], numel: Any, bits: int, like: Tensor) -> Tensor:
    """Packs codes into a bit stream; every byte is made by itself.

    Args:
        code: places -> codes (int32), each below 2**bits.
        numel: number of codes, at least 1.
        bits: 1..8.
        like: on the device of the result.
    """
    each = codes_together(bits)
    size = each * bits // 8
    at = places(uint_nbytes(numel, bits), like)
    if not divides(each, numel):
        inside = code
        code = lambda at: torch.where(at < numel, inside(at.clamp(max=numel - 1)), 0)  # noqa: E731
    return _byte(code, at // size * each, at % size, bits)


def bytes_by_codes(code: Callable[[Tensor], Tensor], numel: int, bits: int, like: Tensor) -> Tensor:
    """As `bytes_of`, with an iteration for each code: those that share a byte write the same one.

    Of whole groups of `codes_together`. A code is computed as often as it has iterations in its
    bytes, but the loop is that of whatever makes the values, so that both can be one kernel.
    """
    each = codes_together(bits)
    size = each * bits // 8
    at = places(numel, like)
    number = (at % each).clamp(max=size - 1)
    made = _byte(code, at // each * each, number, bits)
    if size == each:
        return made
    room = like.new_empty(numel * bits // 8, dtype=torch.uint8)
    out: Tensor = unsafe_index_put(room, [at // each * size + number], made)
    return out


def codes_together(bits: int) -> int:
    """Codes that fill whole bytes: those of one byte, or eight."""
    return 8 // bits if 8 % bits == 0 else 8


def _byte(code: Callable[[Tensor], Tensor], group: Tensor, number: Tensor, bits: int) -> Tensor:
    """Bytes (uint8) of groups of codes: ``group`` is the first place, ``number`` of which byte."""
    each = codes_together(bits)
    if each * bits == 8:
        return _joined([code(group + i) << (i * bits) for i in range(each)])
    first = number * 8 // bits  # the first of the group's codes that has a bit in the byte
    most = max((8 * k + 7) // bits - 8 * k // bits + 1 for k in range(bits))
    parts = []
    for i in range(most):
        shift = ((first + i) * bits - number * 8).to(torch.int32)
        one = code(group + (first + i).clamp(max=each - 1))  # one behind it has no bit in the byte
        parts.append((one << shift.clamp(min=0)) >> (-shift).clamp(min=0))
    return _joined(parts)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The bytes whose bits these are, int32 each; what lies above a byte is of the next one."""
    return (reduce(torch.bitwise_or, parts) & 0xFF).to(torch.uint8)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, rounded as in memory.

    A compiler that fuses would go on in float32; it does not see through a change of type and back.
    """
    out = x.to(dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return out
    return out.view(INT_OF[dtype]).view(dtype)
