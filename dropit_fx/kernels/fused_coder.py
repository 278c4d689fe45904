"""The value coder in plain tensor ops, for compilers that fuse: one value at a time.

The formulas are those of `coder`: a value becomes its code from itself and from what is packed of
its block, and the other way round. Of what is packed, scales have the bits of the reference, and
codes too but where a value lies between two of them to the last bit of a square root or a division:
there it may be the other. Decoding has the bits of the reference: no product is left that a
compiler may contract with the sum behind it, and no division that it may approximate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dropit_fx.kernels.coder import (
    ceil_bfloat16,
    codebook_borders,
    codes_of,
    exact_sqrt,
    fixed_point,
    floor_bfloat16,
    inverse,
    is_even,
    lower_bfloat16,
    upper_bfloat16,
    with_parity,
)
from dropit_fx.kernels.format import AFFINE, SYMMETRIC, UNIFORM, Format
from dropit_fx.kernels.fused_bits import as_stored

Column = Callable[[int], Tensor]  # of `scale`, in float32: one number for each value


class Blocks(NamedTuple):
    """What blocks are coded with.

    Attributes:
        columns: (blocks,) each, of `scale`: bfloat16 numbers in float32, marked where a block
            holds NaN or Inf; of one bit, what it holds of these.
        borders: (blocks,) each: the least magnitudes of the steps 1, 2, ... of a codebook.
    """

    columns: list[Tensor]
    borders: list[Tensor]


def blocks_of(x: Tensor, valid: Tensor | None, form: Format) -> Blocks:
    """What blocks are coded with.

    Args:
        x: (blocks, length), of float32 or a narrower dtype. Values that are not valid repeat a
            valid one.
        valid: which of them there are; None: all.
        form: of 1..8 bits, rounded to nearest.
    """
    finite = _is_finite(x)
    marked, has_nan = ~finite.all(1), x.isnan().any(1)

    def told(last: Tensor) -> Tensor:
        return torch.where(marked, with_parity(last, has_nan), last)

    def stored(columns: list[Tensor], unread: Tensor) -> list[Tensor]:
        kind = _kind(x, finite) if form.bits == 1 else None
        return _stored(columns, marked, unread, kind, form)

    if form.spacing != SYMMETRIC:
        least, most = _ends(x, finite)
        base = floor_bfloat16(least)
        if form.spacing == UNIFORM:
            top = told(ceil_bfloat16(most))
            width = torch.maximum(most, top) - base
        else:
            width = (most - base).clamp(min=0)
            top = told(upper_bfloat16(exact_sqrt(width)))
        return Blocks(stored([base, top], ~width.isfinite()), [])
    magnitude = x.abs()
    low, high = _ends(magnitude, finite)
    unread = torch.zeros_like(marked)
    if not form.is_codebook:
        ends = [lower_bfloat16(exact_sqrt(low)), told(upper_bfloat16(exact_sqrt(high)))]
        return Blocks(stored(ends, unread), [])
    borders = codebook_borders(low, high, form.bits)
    magnitude = magnitude.to(torch.float32)
    step = _step(magnitude, [b[:, None] for b in borders], marked[:, None])
    fixed, exponent = fixed_point(magnitude, high[:, None])
    fixed = torch.where(finite if valid is None else finite & valid, fixed, 0)
    unit = ((exponent[:, 0] + 1023) << 52).view(torch.float64)  # 2**exponent
    levels = []
    for j in range(2 ** (form.bits - 1)):
        part = torch.where(step == j, fixed, 0)
        total, squares = part.sum(1), (part * part).sum(1)
        mean = squares.double() / total.clamp(min=1).double()
        level = (mean * unit).float().to(torch.bfloat16).float()
        levels.append(level.clamp(max=torch.finfo(torch.bfloat16).max))
    return Blocks(stored([*levels[:-1], told(levels[-1])], unread), borders)


def _is_finite(x: Tensor) -> Tensor:
    return x.abs() < torch.inf


def _ends(x: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest that are finite of each block; 0 where there is none."""
    # Stored as narrow as `x` is where another kernel reads them
    least = torch.where(finite, x, torch.inf).amin(1).to(torch.float32)
    most = torch.where(finite, x, -torch.inf).amax(1).to(torch.float32)
    some = least < torch.inf
    return torch.where(some, least, 0.0), torch.where(some, most, 0.0)


def _kind(x: Tensor, finite: Tensor) -> Tensor:
    """What is not finite of each block; NaN where that is of several kinds."""
    least = torch.where(finite, torch.inf, x).amin(1).to(torch.float32)
    most = torch.where(finite, -torch.inf, x).amax(1).to(torch.float32)
    return torch.where(least == most, most, torch.nan)


def _stored(
    columns: list[Tensor], marked: Tensor, unread: Tensor, kind: Tensor | None, form: Format
) -> list[Tensor]:
    """The columns of blocks that are marked, and of those that read as NaN.

    ``kind``: of one bit, what marked blocks hold.
    """
    if kind is not None:
        unread, columns = unread & ~marked, [torch.where(marked, kind, c) for c in columns]
    elif form.spacing == UNIFORM:
        base, top = columns
        columns = [torch.where(marked, top, base), torch.where(marked, base, top)]
    else:  # times -1, see `decode`
        columns = [*columns[:-1], columns[-1] * torch.where(marked, -1.0, 1.0)]
    return [torch.where(unread, torch.nan, column) for column in columns]


def _unmarked(column: Column, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last column of blocks as they were, and which are marked."""
    first, last = column(0), column(form.columns - 1)
    if form.bits == 1:
        return first, last, ~_is_finite(first)
    if form.spacing == UNIFORM:
        return torch.minimum(first, last), torch.maximum(first, last), first >= last
    return first, last.abs(), _is_negative(last)


def _is_negative(x: Tensor) -> Tensor:
    return x.view(torch.int32) < 0


def _step(magnitude: Tensor, borders: list[Tensor], marked: Tensor) -> Tensor:
    step = torch.zeros_like(magnitude, dtype=torch.int32)
    for border in borders:
        step = step + (magnitude >= border)
    return torch.where(marked, step >> 1, step)


def encode(x: Tensor, column: Column, border: Column | None, form: Format) -> Tensor:
    """The codes (int32) of ``x``, float32, with what its blocks are coded with.

    ``border``: of a codebook.
    """
    bits = form.bits
    first, last, marked = _unmarked(column, form)
    finite, unread = _is_finite(x), ~_is_finite(first)
    readable = finite & ~unread
    if form.spacing == SYMMETRIC:
        magnitude, count = x.abs(), 2 ** (bits - 1)
        if form.is_codebook:
            assert border is not None
            step = _step(magnitude, [border(j) for j in range(count - 1)], marked)
        else:
            position = (magnitude.sqrt() - first) * inverse(count - 1, last - first)
            step = _nearest(position, readable, count)
        code = step | (_is_negative(x).to(torch.int32) << (bits - 1))
    else:
        above, count = (x - first).clamp(min=0), 2**bits
        if form.spacing == AFFINE:
            position = above.sqrt() * inverse(count - 1, last)
        else:
            span = last - first
            zoom = torch.where(span < 2.0**-64, 2.0**64, 1.0)  # the inverse must not overflow
            position = above * zoom * inverse(count - 1, span * zoom)
        code = _nearest(position, readable, count)
    if bits == 1:
        return torch.where(unread, (~finite).to(torch.int32), code)
    theirs, others = codes_of(x < 0, marked & is_even(last), form)
    code = torch.where(marked, torch.where(finite, others(code), theirs), code)
    return torch.where(unread, 0, code)


def _nearest(position: Tensor, readable: Tensor, count: int) -> Tensor:
    position = torch.where(readable, position, 0.0)
    return (position + 0.5).to(torch.int32).clamp(max=count - 1)


def decode(
    codes: Tensor,
    column: Column,
    chosen: Callable[[Tensor], Tensor],
    form: Format,
    dtype: torch.dtype,
) -> Tensor:
    """The level of each code; a finite one beyond the greatest number of ``dtype`` becomes that.

    Args:
        codes: int32.
        column: of the value's block.
        chosen: number of a column for each value -> what stands there.
        form: of 1..8 bits.
        dtype: of the result.
    """
    first, last, marked = _unmarked(column, form)
    count = 2**form.bits
    if form.spacing == SYMMETRIC:
        count //= 2
        step, negative = codes & (count - 1), codes >= count
        if form.is_codebook:
            magnitude = chosen(step).abs()
        else:
            root = first + _product(step, _part(last - first, count - 1))
            magnitude = root * root
        # Times -1 and not negated, which Triton may do by a subtraction from 0: -0.0 is lost
        level = magnitude * torch.where(negative, -1.0, 1.0)
    elif form.spacing == UNIFORM:
        level = torch.minimum(first + _product(codes, _part(last - first, count - 1)), last)
    else:
        root = codes.to(torch.float32) * _part(last, count - 1)
        level = first + _alone(root * root)
    top = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    level = level.clamp(-top, top)
    if form.bits == 1:
        level = torch.where(marked, torch.where(codes == 1, first, 0.0), level)
        return as_stored(level, dtype)
    infinite, end = marked & is_even(last), 2**form.bits - 1
    sign = -1.0 if form.spacing == SYMMETRIC else 1.0
    other = end >> 1 if form.spacing == SYMMETRIC else end - 1
    level = torch.where(infinite & (codes == other), -sign * torch.inf, level)
    beyond = torch.where(infinite, sign * torch.inf, torch.nan)
    return as_stored(torch.where(marked & (codes == end), beyond, level), dtype)


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
