"""The value coder in plain tensor ops, for compilers that fuse: one value at a time.

The formulas are those of `coder`: a value becomes its code from itself and from what is packed of
its block, and the other way round. Of what is packed, scales have the bits of the reference, and
codes too but where a value lies between two of them to the last bit of a square root or a division:
there it may be the other. Decoding has the bits of the reference: no product is left that a
compiler may contract with the sum behind it, and no division that it may approximate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from dropit_fx.kernels.coder import (
    ceil_bfloat16,
    codebook_borders,
    exact_sqrt,
    fixed_point,
    floor_bfloat16,
    inverse,
    lower_bfloat16,
    upper_bfloat16,
)
from dropit_fx.kernels.format import AFFINE, SYMMETRIC, UNIFORM, Format
from dropit_fx.kernels.fused_bits import as_stored

Column = Callable[[int], Tensor]  # of `scale`, in float32: one number for each value


class Blocks(NamedTuple):
    """What blocks are coded with.

    Attributes:
        columns: (blocks,) each, of `scale`: bfloat16 numbers in float32; NaN where a block holds
            NaN or Inf.
        borders: (blocks,) each: the least magnitudes of the steps 1, 2, ... of a codebook.
    """

    columns: list[Tensor]
    borders: list[Tensor]


def blocks_of(parts: Sequence[Tensor], valid: Tensor | None, form: Format) -> Blocks:
    """What blocks are coded with.

    Args:
        parts: the values, in any number of tensors of (blocks, length) float32; in one, for a
            codebook. Those that are not valid repeat a valid one.
        valid: which of them there are; None: all.
        form: of 1..8 bits, rounded to nearest.
    """
    if form.spacing != SYMMETRIC:
        least, most = _ends(parts)
        base = floor_bfloat16(least)
        if form.spacing == UNIFORM:
            top = ceil_bfloat16(most)
            width = torch.maximum(most, top) - base
        else:
            width = (most - base).clamp(min=0)
            top = upper_bfloat16(exact_sqrt(width))
        bad = ~(least.isfinite() & most.isfinite() & width.isfinite())
        return Blocks(_poisoned([base, top], bad), [])
    low, high = _ends([x.abs() for x in parts])
    bad = ~high.isfinite()
    if not form.is_codebook:
        ends = [lower_bfloat16(exact_sqrt(low)), upper_bfloat16(exact_sqrt(high))]
        return Blocks(_poisoned(ends, bad), [])
    borders = codebook_borders(low, high, form.bits)
    magnitude = parts[0].abs()
    step = _step(magnitude, [b[:, None] for b in borders])
    fixed, exponent = fixed_point(magnitude, high[:, None])
    if valid is not None:
        fixed = torch.where(valid, fixed, 0)
    unit = ((exponent[:, 0] + 1023) << 52).view(torch.float64)  # 2**exponent
    levels = []
    for j in range(2 ** (form.bits - 1)):
        part = torch.where(step == j, fixed, 0)
        total, squares = part.sum(1), (part * part).sum(1)
        mean = squares.double() / total.clamp(min=1).double()
        level = (mean * unit).float().to(torch.bfloat16).float()
        levels.append(level.clamp(max=torch.finfo(torch.bfloat16).max))
    return Blocks(_poisoned(levels, bad), borders)


def _ends(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each block; NaN where there is one."""
    return reduce(torch.minimum, parts).amin(1), reduce(torch.maximum, parts).amax(1)


def _poisoned(columns: list[Tensor], bad: Tensor) -> list[Tensor]:
    return [torch.where(bad, torch.nan, column) for column in columns]


def _step(magnitude: Tensor, borders: list[Tensor]) -> Tensor:
    step = torch.zeros_like(magnitude, dtype=torch.int32)
    for border in borders:
        step = step + (magnitude >= border)
    return step


def encode(x: Tensor, column: Column, border: Column | None, form: Format) -> Tensor:
    """The codes (int32) of ``x``, float32, with what its blocks are coded with.

    ``border``: of a codebook.
    """
    bits = form.bits
    first = column(0)
    bad = first.isnan()
    if form.spacing == SYMMETRIC:
        magnitude, count = x.abs(), 2 ** (bits - 1)
        if form.is_codebook:
            assert border is not None
            step = _step(magnitude, [border(j) for j in range(count - 1)])
        else:
            position = (magnitude.sqrt() - first) * inverse(count - 1, column(1) - first)
            step = _nearest(position, bad, count)
        code = step | ((x.view(torch.int32) < 0).to(torch.int32) << (bits - 1))
    else:
        above, count, top = (x - first).clamp(min=0), 2**bits, column(1)
        if form.spacing == AFFINE:
            position = above.sqrt() * inverse(count - 1, top)
        else:
            span = top - first
            zoom = torch.where(span < 2.0**-64, 2.0**64, 1.0)  # the inverse must not overflow
            position = above * zoom * inverse(count - 1, span * zoom)
        code = _nearest(position, bad, count)
    return torch.where(bad, 0, code)


def _nearest(position: Tensor, bad: Tensor, count: int) -> Tensor:
    position = torch.where(bad, 0.0, position)
    return (position + 0.5).to(torch.int32).clamp(max=count - 1)


def decode(
    codes: Tensor, column: Column, chosen: Callable[[Tensor], Tensor], form: Format
) -> Tensor:
    """The level (float32) of each code.

    Args:
        codes: int32.
        column: of the value's block.
        chosen: number of a column for each value -> what stands there.
        form: of 1..8 bits.
    """
    count = 2**form.bits
    if form.spacing == SYMMETRIC:
        count //= 2
        step, negative = codes & (count - 1), codes >= count
        if form.is_codebook:
            magnitude = chosen(step)
        else:
            root = column(0) + _product(step, _part(column(1) - column(0), count - 1))
            magnitude = root * root
        # Times -1 and not negated, which Triton may do by a subtraction from 0: -0.0 is lost
        return magnitude * torch.where(negative, -1.0, 1.0)
    base, top = column(0), column(1)
    if form.spacing == UNIFORM:
        return torch.minimum(base + _product(codes, _part(top - base, count - 1)), top)
    root = codes.to(torch.float32) * _part(top, count - 1)
    return base + _alone(root * root)


def _product(step: Tensor, width: Tensor) -> Tensor:
    return _alone(step.to(torch.float32) * width)


def _alone(x: Tensor) -> Tensor:
    """``x``, which is not negative: a product that is rounded by itself, before it is added to."""
    return x.clamp(min=-1.0)


def _part(x: Tensor, count: int) -> Tensor:
    """``x / count``, correctly rounded, for an odd count up to 255, which puts it between no two.

    A product in double precision is never so far off that it is rounded to another float32.
    """
    return (x.double() * (1.0 / count)).float()


def to_dtype(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels in ``dtype``; one beyond its greatest finite number becomes that number."""
    top = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return as_stored(levels.clamp(-top, top), dtype)
