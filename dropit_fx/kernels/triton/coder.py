"""The value coder (see `dropit_fx.kernels.coder`) on tiles: a row a block, its scale beside it."""

from __future__ import annotations

import triton
import triton.language as tl

from dropit_fx.kernels.format import SYMMETRIC, UNIFORM
from dropit_fx.kernels.triton.bits import (
    INFINITY,
    LARGEST,
    TOP,
    ceiling,
    floor,
    narrow,
    pattern,
    root,
    round_down,
    round_up,
    single,
    to_bfloat,
    uniform,
)

_SYMMETRIC = tl.constexpr(SYMMETRIC)
_UNIFORM = tl.constexpr(UNIFORM)


@triton.jit
def _grid(start, width, step):
    scaled = step.to(tl.float32) * width
    rooted = start + scaled
    return rooted * rooted


@triton.jit
def _fixed_point(magnitude, largest):
    raw = magnitude >> 23
    mantissa = (magnitude & 0x7FFFFF) | tl.where(raw > 0, 0x800000, 0)
    shift = tl.minimum(8 + largest - tl.maximum(raw, 1), 31)
    return ((mantissa >> shift) + 1) >> 1


@triton.jit
def _roots(m, high, NARROW: tl.constexpr):
    """sqrt(m) of rows with the greatest `high`, times a power of two; it and its inverse, (ROWS,).

    Of 16-bit dtypes by `root`: rows below 2**-60 are zoomed by 2**96 for it; what is then still
    below 2**-100 counts as that, since it is in the first of up to 128 steps to sqrt(high) anyway.
    """
    if NARROW:
        small = high < 8.673617379884035e-19  # 2**-60
        zoom = tl.where(small, 7.922816251426434e28, 1.0)  # 2**96
        floor = 7.888609052210118e-31  # 2**-100
        roots = root(tl.maximum(m * zoom[:, None], floor))
        wide = tl.where(small, 281474976710656.0, 1.0)  # 2**48
        back = tl.where(small, 3.552713678800501e-15, 1.0)  # 2**-48
    else:
        roots = tl.sqrt_rn(m)
        wide = tl.full(high.shape, 1.0, tl.float32)
        back = wide
    return roots, wide, back


@triton.jit
def _grid_steps(
    m,
    start,
    end,
    high,
    seed_ptr,
    index,
    COUNT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Steps of sqrt(m), up to sqrt(high), between start and end of each row, nearest or random."""
    span = end - start
    steps = span * 0.0 + (COUNT - 1)
    inverse = tl.where(span > 0, tl.div_rn(steps, tl.where(span > 0, span, 1.0)), 0.0)
    roots, wide, back = _roots(m, high, NARROW)
    # Powers of two change no digit
    position = (roots - (start * wide)[:, None]) * (inverse * back)[:, None]
    if STOCHASTIC:
        width = tl.div_rn(span, steps)[:, None]
        step = tl.minimum(position.to(tl.int32), COUNT - 2)
        lower = _grid(start[:, None], width, step)
        gap = _grid(start[:, None], width, step + 1) - lower
        step += (uniform(seed_ptr, index) * gap < m - lower).to(tl.int32)
    else:
        step = tl.minimum((position + 0.5).to(tl.int32), COUNT - 1)
    return step


@triton.jit
def _uniform_steps(m, span, seed_ptr, index, COUNT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Steps of m between 0 and span of each row, nearest or random."""
    steps = span * 0.0 + (COUNT - 1)
    zoom = tl.where(span < 5.421010862427522e-20, 18446744073709551616.0, 1.0)  # 2**-64, 2**64
    zoomed = span * zoom
    inverse = tl.where(span > 0, tl.div_rn(steps, tl.where(span > 0, zoomed, 1.0)), 0.0)
    position = m * zoom[:, None] * inverse[:, None]
    if STOCHASTIC:
        width = tl.div_rn(span, steps)[:, None]
        step = tl.minimum(position.to(tl.int32), COUNT - 2)
        lower = tl.minimum(step.to(tl.float32) * width, span[:, None])
        gap = tl.minimum((step + 1).to(tl.float32) * width, span[:, None]) - lower
        step += (uniform(seed_ptr, index) * gap < m - lower).to(tl.int32)
    else:
        step = tl.minimum((position + 0.5).to(tl.int32), COUNT - 1)
    return step


@triton.jit
def _store_level(ptr, level, unread, kind, real):
    bits = (tl.where(unread, kind, pattern(level)) >> 16).to(tl.int16)
    tl.store(ptr, bits, mask=real)


@triton.jit
def _negated_where(marked, x):
    return single(pattern(x) ^ tl.where(marked, -2147483648, 0))


@triton.jit
def _with_parity(x, odd):
    """bfloat16 numbers, or where they are not as odd as asked the next ones above; TOP stays."""
    u = pattern(x)
    wrong = (((u >> 16) & 1) != odd.to(tl.int32)) & (u != TOP)
    return single(u + tl.where(wrong, tl.where(u < 0, -65536, 65536), 0))


@triton.jit
def _is_even(x):
    return ((pattern(x) >> 16) & 1) == 0


@triton.jit
def _bfloat_at(ptr, real):
    return single((tl.load(ptr, mask=real, other=0).to(tl.int32)) << 16)


@triton.jit
def encode(
    u,
    kept,
    column,
    real,
    seed_ptr,
    index,
    BITS: tl.constexpr,
    SPACING: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Codes of the kept values of each row, 0 elsewhere; stores what they are read back with.

    Args:
        u: (ROWS, LANES) patterns of float32.
        kept: (ROWS, LANES) bool.
        column: (ROWS,) where the scale of each row starts.
        real: (ROWS,) bool: rows that there are.
        seed_ptr: for STOCHASTIC rounding.
        index: (ROWS, LANES) position in the tensor, which random numbers are drawn by.
        BITS: 1..8.
        SPACING: of the levels.
        STOCHASTIC: round at random, to what is right in the mean.
        COLUMNS: bfloat16 numbers of a row's scale.
        DTYPE: of the tensor.
    """
    NARROW: tl.constexpr = DTYPE != 0
    SUMS: tl.constexpr = SPACING == _SYMMETRIC and BITS <= 3
    LAST: tl.constexpr = 2**BITS - 1
    magnitude = u & 0x7FFFFFFF
    finite = magnitude < INFINITY
    most = tl.max(tl.where(kept, magnitude, 0), 1)
    marked = most >= INFINITY
    has_nan = most > INFINITY
    unread = marked & (BITS == 1)
    infinite = marked & (has_nan == 0)  # below, of those by the scale
    counts = kept & finite
    if BITS == 1:
        plus = tl.max(tl.where(kept & (finite == 0) & (u >= 0), 1, 0), 1) > 0
        minus = tl.max(tl.where(kept & (finite == 0) & (u < 0), 1, 0), 1) > 0
        kind = tl.where(minus, -8388608, INFINITY)  # 0xFF800000
        kind = tl.where(has_nan | (plus & minus), 0x7FC00000, kind)
        kind = tl.where(marked, kind, 0x7FC00000)
    else:
        kind = tl.full(marked.shape, 0x7FC00000, tl.int32)
    if SUMS:  # what does not count is computed as zero, so that nothing overflows on the way
        u = tl.where(finite, u, u & -2147483648)  # the sign stays
        magnitude = u & 0x7FFFFFFF
    high_key = tl.max(tl.where(counts, magnitude, 0), 1)
    x = single(u)
    sign = (u >> (32 - BITS)) & (1 << (BITS - 1))
    low_key = tl.min(tl.where(counts, magnitude, 0x7FFFFFFF), 1)
    low_key = tl.minimum(low_key, high_key)
    low = single(low_key)
    high = single(high_key)
    if SPACING != _SYMMETRIC:
        edge = single(tl.full((), LARGEST, tl.int32))
        some = tl.max(tl.where(counts, 1, 0), 1) > 0
        least = tl.where(some, tl.min(tl.where(counts, x, edge), 1), 0.0)
        most = tl.where(some, tl.max(tl.where(counts, x, -edge), 1), 0.0)
        base = floor(least)
        upper = ceiling(most)
        if SPACING == _UNIFORM:
            upper = tl.where(marked, _with_parity(upper, has_nan), upper)
            most = tl.maximum(most, upper)
        widest = tl.maximum(most - base, 0.0)
        overflow = pattern(widest) >= INFINITY
        unread = unread | overflow
        above = tl.maximum(x - base[:, None], 0.0)
        c0 = base
        if SPACING == _UNIFORM:
            c1 = upper
            span = tl.where(overflow, 0.0, upper - base)
            code = _uniform_steps(above, span, seed_ptr, index, 2**BITS, STOCHASTIC)
        else:
            widest = tl.where(overflow, 0.0, widest)
            c1 = round_up(tl.sqrt_rn(widest))
            c1 = tl.where(marked, _with_parity(c1, has_nan), c1)
            zero = c1 * 0.0
            code = _grid_steps(
                above, zero, c1, widest, seed_ptr, index, 2**BITS, STOCHASTIC, NARROW
            )
    elif BITS > 3:
        c0 = round_down(tl.sqrt_rn(low))
        c1 = round_up(tl.sqrt_rn(high))
        c1 = tl.where(marked, _with_parity(c1, has_nan), c1)
        m = single(magnitude)
        count: tl.constexpr = 2 ** (BITS - 1)
        code = _grid_steps(m, c0, c1, high, seed_ptr, index, count, STOCHASTIC, NARROW)
        code = tl.where(finite, code, 0) | sign
    elif STOCHASTIC:
        c0 = round_down(low)
        c1 = round_up(high)
        if BITS == 1:
            ends = c1[:, None]
            code = (uniform(seed_ptr, index) * (ends + ends) >= x + ends).to(tl.int32)
            c0 = c1
        else:
            m = single(magnitude)
            lower = c0[:, None] + tl.zeros_like(m)
            upper = c1[:, None] + tl.zeros_like(m)
            code = tl.zeros_like(u)
            if BITS == 3:
                start = tl.sqrt_rn(low)
                three = start * 0.0 + 3.0
                width = tl.div_rn(tl.sqrt_rn(high) - start, three)
                one = tl.full((), 1, tl.int32)
                l1 = single(to_bfloat(pattern(_grid(start, width, one))))
                l2 = single(to_bfloat(pattern(_grid(start, width, one + 1))))
                l1 = tl.minimum(tl.maximum(l1, c0), c1)
                l2 = tl.minimum(tl.maximum(l2, c0), c1)
                m1 = l1[:, None]
                m2 = l2[:, None]
                code = (m >= m1).to(tl.int32) + (m >= m2).to(tl.int32)
                lower = tl.where(code == 0, c0[:, None], tl.where(code == 1, m1, m2))
                upper = tl.where(code == 0, m1, tl.where(code == 1, m2, c1[:, None]))
                _store_level(column + 1, l1, unread, kind, real)
                _store_level(column + 2, l2, unread, kind, real)
            drawn = uniform(seed_ptr, index) * (upper - lower)
            code += (drawn < m - lower).to(tl.int32)
            code = tl.where(finite, code, 0) | sign
            c1 = tl.where(marked, _with_parity(c1, has_nan), c1)
    else:
        COUNT: tl.constexpr = 2 ** (BITS - 1)
        first_root = tl.sqrt_rn(low)
        last_root = tl.sqrt_rn(high)
        if BITS == 3:
            first_root = tl.sqrt_rn(first_root)
            last_root = tl.sqrt_rn(last_root)
        start64 = first_root.to(tl.float64)
        span64 = last_root.to(tl.float64) - start64
        largest = tl.maximum(high_key >> 23, 1)
        fixed = tl.where(counts, _fixed_point(magnitude, largest[:, None]), 0)
        code = tl.zeros_like(u)
        for j in range(1, COUNT):  # not unrolled, here and below: registers are what is short
            rooted = start64 + span64 * (tl.full((), j, tl.float64) * (1 / COUNT))
            border = rooted * rooted
            if BITS == 3:
                border = border * border
            code += (magnitude >= pattern(border.to(tl.float32))[:, None]).to(tl.int32)
        code = tl.where(marked[:, None], code >> 1, code)
        unit = ((largest - 141 + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
        for j in range(COUNT):
            inside = tl.where(code == j, fixed, 0)  # up to 2**15 each, 2**28 together
            square = tl.sum(inside.to(tl.int64) * inside, 1).to(tl.float64)
            total = tl.maximum(tl.sum(inside, 1), 1).to(tl.float64)
            level = (square / total * unit).to(tl.float32)
            level = single(tl.minimum(to_bfloat(pattern(level)), TOP))
            told = marked & (j == COUNT - 1)
            level = _negated_where(told, tl.where(told, _with_parity(level, has_nan), level))
            _store_level(column + j, level, unread, kind, real)
        code = tl.where(finite, code, 0) | sign
    if SPACING != _SYMMETRIC or BITS > 3 or STOCHASTIC:
        infinite = marked & _is_even(c1)
        if SPACING == _UNIFORM:
            first = tl.where(marked, c1, c0)
            c1 = tl.where(marked, c0, c1)
            c0 = first
        else:
            c1 = _negated_where(marked, c1)
        _store_level(column, c0, unread, kind, real)
        if COLUMNS > 1:
            _store_level(column + COLUMNS - 1, c1, unread, kind, real)
    if SPACING != _SYMMETRIC:
        finite = (u & 0x7FFFFFFF) < INFINITY  # once more: to hold it takes registers
    if BITS == 1:
        code = tl.where(marked[:, None], tl.where(finite, 0, 1), tl.where(unread[:, None], 0, code))
        return tl.where(kept, code, 0)
    given_up = marked.to(tl.int32)[:, None]
    infinite = infinite.to(tl.int32)[:, None]
    if SPACING == _SYMMETRIC:
        is_plus = code <= LAST >> 1  # the first bit is the sign
        theirs = tl.where((infinite != 0) & is_plus, LAST >> 1, LAST)
        code -= tl.where(code == LAST, given_up, 0)
        code -= tl.where(code == LAST >> 1, infinite, 0)
    else:
        theirs = LAST - tl.where(u < 0, infinite, 0)
        code = tl.minimum(code, LAST - given_up - infinite)
    code = tl.where(finite, code, theirs)
    return tl.where(kept & (unread == 0)[:, None], code, 0)


@triton.jit
def _at_most(x, DTYPE: tl.constexpr):
    """`x`, or the greatest finite number of the dtype above it; NaN stays."""
    if DTYPE == 0:
        top = single(tl.full((), LARGEST, tl.int32))
    elif DTYPE == 1:
        top = single(tl.full((), TOP, tl.int32))
    else:
        top = 65504.0
    return tl.minimum(x, top, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _ends(column, real, BITS: tl.constexpr, SPACING: tl.constexpr):
    """The first and the last number of rows' scales, unmarked, and which were marked."""
    COLUMNS: tl.constexpr = 2 if SPACING != _SYMMETRIC or BITS > 3 else 2 ** (BITS - 1)
    first = _bfloat_at(column, real)
    last = _bfloat_at(column + COLUMNS - 1, real)
    if BITS == 1:
        marked = (pattern(first) & 0x7FFFFFFF) >= INFINITY
        c0 = first
        c1 = last
    elif SPACING == _UNIFORM:
        marked = first >= last
        c0 = tl.where(marked, last, first)
        c1 = tl.where(marked, first, last)
    else:
        marked = pattern(last) < 0
        c0 = first
        c1 = _negated_where(marked, last)
    return c0, c1, marked


@triton.jit
def decode(
    code,
    kept,
    column,
    real,
    BITS: tl.constexpr,
    SPACING: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The inverse of `encode` where that is finite (else `marks`): patterns of the dtype.

    A level beyond the greatest finite number of the dtype becomes that number.
    """
    c0, c1, marked = _ends(column, real, BITS, SPACING)
    if SPACING != _SYMMETRIC:
        steps = tl.full((ROWS,), 2**BITS - 1, tl.float32)
        if SPACING == _UNIFORM:
            width = tl.div_rn(c1 - c0, steps)
            scaled = code.to(tl.float32) * width[:, None]
            x = tl.minimum(c0[:, None] + scaled, c1[:, None])
        else:
            rooted = code.to(tl.float32) * tl.div_rn(c1, steps)[:, None]
            x = c0[:, None] + rooted * rooted
        # The least value is a bfloat16
        level = pattern(-_at_most(-_at_most(x, DTYPE), DTYPE) if DTYPE == 2 else _at_most(x, DTYPE))
    else:
        step = code & (2 ** (BITS - 1) - 1)
        if BITS > 3:
            steps = tl.full((ROWS,), 2 ** (BITS - 1) - 1, tl.float32)
            width = tl.div_rn(c1 - c0, steps)
            level = pattern(_grid(c0[:, None], width[:, None], step))
        else:
            level = pattern(_bfloat_at(column[:, None] + step, kept)) & 0x7FFFFFFF
        level = pattern(_at_most(single(level), DTYPE)) ^ ((code << (32 - BITS)) & -2147483648)
    if BITS == 1:
        level = tl.where(marked[:, None], 0, level)
    return narrow(level, DTYPE)


@triton.jit
def marks(column, real, BITS: tl.constexpr, SPACING: tl.constexpr):
    """Of rows, (ROWS,): which may hold what is not finite, and with which codes.

    Returns:
        Bool; what the last code and another one read as, patterns of float32; the other, -1: none.
    """
    LAST: tl.constexpr = 2**BITS - 1
    c0, c1, marked = _ends(column, real, BITS, SPACING)
    infinite = _is_even(c1) & (BITS > 1)
    plus = tl.where(infinite, 0x7F800000, 0x7FC00000)
    minus = tl.where(infinite, -8388608, 0x7FC00000)  # 0xFF800000
    read_last = plus
    read_other = minus
    other = tl.where(infinite, LAST - 1, -1)
    if SPACING == _SYMMETRIC:
        read_last = minus
        read_other = plus
        other = tl.where(infinite, LAST >> 1, -1)
    if BITS == 1:
        read_last = pattern(c0)
    return marked & real, read_last, read_other, other
