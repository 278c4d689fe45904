"""Device functions that every kernel shares: bit patterns, roundings to bfloat16, random numbers.

As in `coder`, every float operation must be one IEEE operation: divisions and roots are the `_rn`
ones, and kernels are launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # bit pattern of float32 Inf
TOP = tl.constexpr(0x7F7F0000)  # the greatest finite bfloat16, as a float32 pattern
LARGEST = tl.constexpr(0x7F7FFFFF)  # the greatest finite float32


@triton.jit
def pattern(x):
    """The bits of a float32, as int32."""
    return x.to(tl.int32, bitcast=True)


# Triton's interpreter truncates to bfloat16 and rounds a fused product; a GPU rounds as IEEE has it
HARDWARE = tl.constexpr(isinstance(pattern, triton.JITFunction))


@triton.jit
def single(u):
    """The float32 of a pattern."""
    return u.to(tl.float32, bitcast=True)


@triton.jit
def widen(raw, DTYPE: tl.constexpr):
    """Integer patterns of the tensor's dtype to patterns of float32."""
    if DTYPE == 0:
        u = raw
    elif DTYPE == 1:
        u = raw.to(tl.int32) << 16
    else:
        u = pattern(raw.to(tl.float16, bitcast=True).to(tl.float32))
    return u


@triton.jit
def to_bfloat(u):
    """Patterns of float32, not NaN, to the nearest bfloat16, as float32 patterns."""
    return (u + 0x7FFF + ((u >> 16) & 1)) & -65536


@triton.jit
def narrow(u, DTYPE: tl.constexpr):
    """Inverse of `widen`, to nearest even."""
    nan = (u & 0x7FFFFFFF) > INFINITY
    if DTYPE == 0:
        raw = u
    elif DTYPE == 1 and HARDWARE:
        raw = single(u).to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif DTYPE == 1:
        raw = (tl.where(nan, 0x7FC00000, to_bfloat(u)) >> 16).to(tl.int16)
    else:
        half = single(u).to(tl.float16).to(tl.int16, bitcast=True)
        raw = tl.where(nan, 0x7E00, half).to(tl.int16)
    return raw


@triton.jit
def round_down(x):
    """The greatest bfloat16 <= x, for x >= 0."""
    return single(pattern(x) & 0x7FFF0000)


@triton.jit
def round_up(x):
    """The least finite bfloat16 >= x, for x >= 0; the greatest finite one where there is none."""
    # In two halves, lest the sum pass 2**31
    u = pattern(x)
    up = (u & 0x7FFF0000) + tl.where((u & 0xFFFF) != 0, 0x10000, 0)
    return single(tl.minimum(up, TOP))


@triton.jit
def root(x):
    """The square root of x in 2**-100..2**128, correctly rounded, without a branch an element.

    The approximation and the one step of Newton's method that `tl.sqrt_rn` becomes in this range.
    """
    if HARDWARE:
        inverse = tl.math.rsqrt(x)
        near = x * inverse
        result = tl.fma(tl.fma(-near, near, x), inverse * 0.5, near)
    else:
        result = tl.sqrt_rn(x)
    return result


@triton.jit
def floor(x):
    """The greatest bfloat16 <= x; the least finite one where there is none."""
    a = tl.abs(x)
    return tl.where(x < 0, -round_up(a), round_down(a))


@triton.jit
def ceiling(x):
    """The least bfloat16 >= x, never -0.0; the greatest finite one where there is none."""
    a = tl.abs(x)
    return tl.where(x < 0, 0.0 - round_down(a), round_up(a))


@triton.jit
def _mix(v):
    v = (v ^ (v >> 16)) * 0x7FEB352D
    v = (v ^ (v >> 15)) * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def draw(seed_ptr, index):
    """`reference.random_keys` at `index`, as uint32."""
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(_mix(index.to(tl.uint32) ^ low) ^ high)


@triton.jit
def uniform(seed_ptr, index):
    """Uniform in [0, 1), in steps of 2**-24."""
    return (draw(seed_ptr, index) >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def rows_of(numel, block, k_full, k_tail, ROWS: tl.constexpr):
    """The blocks of a program, a row each.

    Returns:
        Number, first element, elements and kept elements of each, (ROWS,), none behind the last;
        and whether all of them are full.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    first = row * block
    n = tl.minimum(tl.maximum(numel - first, 0), block).to(tl.int32)
    k = tl.where(n < block, tl.where(n > 0, k_tail, 0), k_full)
    return row, first, n, k, (program + 1) * ROWS * block <= numel


@triton.jit
def load_tile(ptr, at, valid, whole, EVEN: tl.constexpr):
    """Loads a tile; without a mask, which would split it into single elements, where it is whole.

    EVEN: whether there is such a tile at all.
    """
    if EVEN:
        if whole:
            raw = tl.load(ptr + at)
        else:
            raw = tl.load(ptr + at, mask=valid, other=0)
    else:
        raw = tl.load(ptr + at, mask=valid, other=0)
    return raw


@triton.jit
def store_tile(ptr, at, value, valid, whole, EVEN: tl.constexpr):
    """The counterpart of `load_tile`."""
    if EVEN:
        if whole:
            tl.store(ptr + at, value)
        else:
            tl.store(ptr + at, value, mask=valid)
    else:
        tl.store(ptr + at, value, mask=valid)


@triton.jit
def store_codes(
    ptr,
    codes,
    count,
    whole,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows of codes as bit streams (`reference.pack_rows`).

    Args:
        ptr: (ROWS,) where each stream starts.
        codes: (ROWS, LANES) integers below 2**BITS, 0 beyond `count`.
        count: (ROWS,) codes of each row; none are written where it is 0.
        whole: `count` is LANES in every row.
        BITS: 1..8.
        ROWS: of the tile.
        LANES: of the tile, a multiple of 8.
        EVEN: as in `load_tile`.
    """
    size = (count * BITS + 7) // 8
    if 8 % BITS == 0:  # some codes fill one byte
        PER: tl.constexpr = 8 // BITS
        part = tl.reshape(codes.to(tl.int32), (ROWS, LANES // PER, PER))
        byte = tl.sum(part << (tl.arange(0, PER) * BITS)[None, None, :], 2).to(tl.uint8)
        at = tl.arange(0, LANES // PER)[None, :]
        store_tile(ptr[:, None], at, byte, at < size[:, None], whole, EVEN)
    else:  # eight codes fill BITS bytes
        member = tl.arange(0, 8)[None, None, :]
        WORD: tl.constexpr = tl.uint32 if BITS < 4 else tl.uint64
        part = tl.reshape(codes.to(WORD), (ROWS, LANES // 8, 8))
        word = tl.sum(part << (member * BITS).to(WORD), 2)
        byte = (word[:, :, None] >> (member * 8 % (BITS * 8)).to(WORD)).to(tl.uint8)
        at = (tl.arange(0, LANES // 8) * BITS)[None, :, None] + member
        within = (member < BITS) & (at < size[:, None, None])
        tl.store(ptr[:, None, None] + at, byte, mask=within)


@triton.jit
def load_codes(ptr, start, shift, size, BITS: tl.constexpr, REACH: tl.constexpr):
    """Codes of groups of eight, (ROWS, GROUPS, 8), from the words that hold them.

    Args:
        ptr: (ROWS,) where each stream starts.
        start: (ROWS, GROUPS): the byte that a group's word starts at.
        shift: (ROWS, GROUPS, 8), or what broadcasts to it: the bit of its word that a code starts
            at.
        size: (ROWS,) bytes of each stream; zeros lie behind.
        BITS: 1..8.
        REACH: bytes that a group may lie in.
    """
    WORD: tl.constexpr = tl.uint32 if REACH <= 4 else tl.uint64
    at = ptr[:, None] + start
    left = size[:, None] - start
    word = tl.load(at, mask=left > 0, other=0).to(WORD)
    for j in tl.static_range(1, REACH):
        word |= tl.load(at + j, mask=left > j, other=0).to(WORD) << (8 * j)
    return (word[:, :, None] >> shift.to(WORD)).to(tl.int32) & (2**BITS - 1)


@triton.jit
def load_stream(ptr, count, BITS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Rows of codes, (ROWS, LANES): the inverse of `store_codes`, 0 beyond `count`."""
    size = (count * BITS + 7) // 8
    start = (tl.arange(0, LANES // 8) * BITS)[None, :]
    shift = (tl.arange(0, 8) * BITS)[None, None, :]
    return tl.reshape(load_codes(ptr, start, shift, size, BITS, BITS), (ROWS, LANES))


@triton.jit
def channel_of(first, lane, inner, channels):
    """The channel of each element of rows that start at `first`: runs of `inner` elements each."""
    run = first // inner
    at = (first - run * inner).to(tl.int32)[:, None] + lane
    return ((run % channels).to(tl.int32)[:, None] + at // inner) % channels
