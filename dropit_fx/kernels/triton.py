"""The packed format in Triton: the CUDA implementation of the ops, with the bits of the reference.

One program per block. The k-th largest key is found by bisection on integer bit patterns: 32 counts
over a block that stays in registers. Imported only when an op first sees a CUDA tensor.

Tested with Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported) and compiled
for sm_80; not measured on a GPU. As in `coder`, every float operation must be one IEEE operation:
divisions and roots are the `_rn` ones and kernels are launched with `enable_fp_fusion=False`.
"""

# Kernel arguments have no types that a type checker knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.layout import (
    FULL,
    SYMMETRIC,
    UNIFORM,
    block_count,
    check_borders,
    check_format,
    check_levels,
    check_stream,
    check_uint,
    codes_nbytes,
    kept,
    kept_in_block,
    mask_nbytes,
    scale_columns,
    split_blocks,
    uint_nbytes,
)

_LARGEST_BLOCK = 8192  # what still fits into the registers of one program
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_TILE = 256  # groups of 8 codes that one program packs

_INFINITY = tl.constexpr(0x7F800000)
_TOP = tl.constexpr(0x7F7F0000)
_SYMMETRIC = tl.constexpr(SYMMETRIC)
_UNIFORM = tl.constexpr(UNIFORM)


@triton.jit
def _pattern(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _single(pattern):
    return pattern.to(tl.float32, bitcast=True)


@triton.jit
def _widen(raw, DTYPE: tl.constexpr):
    """Integer patterns of the tensor's dtype to patterns of float32."""
    if DTYPE == 0:
        u = raw
    elif DTYPE == 1:
        u = (raw.to(tl.int32) & 0xFFFF) << 16
    else:
        u = _pattern(raw.to(tl.float16, bitcast=True).to(tl.float32))
    return u


@triton.jit
def _to_bfloat(u):
    """Patterns of float32, not NaN, to the nearest bfloat16, as float32 patterns."""
    return (u + 0x7FFF + ((u >> 16) & 1)) & -65536


@triton.jit
def _narrow(u, DTYPE: tl.constexpr):
    """Inverse of `_widen`, to nearest even."""
    nan = (u & 0x7FFFFFFF) > _INFINITY
    if DTYPE == 0:
        raw = u
    elif DTYPE == 1:
        raw = (tl.where(nan, 0x7FC00000, _to_bfloat(u)) >> 16).to(tl.int16)
    else:
        half = _single(u).to(tl.float16).to(tl.int16, bitcast=True)
        raw = tl.where(nan, 0x7E00, half).to(tl.int16)
    return raw


@triton.jit
def _round_down(x):
    return _single(_pattern(x) & 0x7FFF0000)


@triton.jit
def _round_up(x):
    # In two halves, lest the sum pass 2**31
    u = _pattern(x)
    up = (u & 0x7FFF0000) + tl.where((u & 0xFFFF) != 0, 0x10000, 0)
    return _single(tl.minimum(up, _TOP))


@triton.jit
def _floor(x):
    a = tl.abs(x)
    return tl.where(x < 0, -_round_up(a), _round_down(a))


@triton.jit
def _ceiling(x):
    a = tl.abs(x)
    return tl.where(x < 0, 0.0 - _round_down(a), _round_up(a))


@triton.jit
def _mix(v):
    v = (v ^ (v >> 16)) * 0x7FEB352D
    v = (v ^ (v >> 15)) * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def _draw(seed_ptr, index):
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(_mix(index.to(tl.uint32) ^ low) ^ high)


@triton.jit
def _uniform(seed_ptr, index):
    return (_draw(seed_ptr, index) >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _grid(start, width, step):
    scaled = step.to(tl.float32) * width
    root = start + scaled
    return root * root


@triton.jit
def _root(x):
    return tl.sqrt_rn(x)


@triton.jit
def _fixed_point(magnitude, largest):
    raw = magnitude >> 23
    mantissa = (magnitude & 0x7FFFFF) | tl.where(raw > 0, 0x800000, 0)
    shift = tl.minimum(8 + largest - tl.maximum(raw, 1), 31)
    return ((mantissa >> shift) + 1) >> 1


@triton.jit
def _grid_steps(x, m, start, end, seed_ptr, index, COUNT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Steps of sqrt(m) between start and end, nearest or random."""
    span = end - start
    steps = span * 0.0 + (COUNT - 1)
    inverse = tl.where(span > 0, tl.div_rn(steps, tl.where(span > 0, span, 1.0)), 0.0)
    position = (_root(m) - start) * inverse
    if STOCHASTIC:
        width = tl.div_rn(span, steps)
        step = tl.minimum(position.to(tl.int32), COUNT - 2)
        lower = _grid(start, width, step)
        gap = _grid(start, width, step + 1) - lower
        step += (_uniform(seed_ptr, index) * gap < m - lower).to(tl.int32)
    else:
        step = tl.minimum((position + 0.5).to(tl.int32), COUNT - 1)
    return step


@triton.jit
def _uniform_steps(m, span, seed_ptr, index, COUNT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Steps of m between 0 and span, nearest or random."""
    steps = span * 0.0 + (COUNT - 1)
    zoom = tl.where(span < 5.421010862427522e-20, 18446744073709551616.0, 1.0)  # 2**-64, 2**64
    zoomed = span * zoom
    inverse = tl.where(span > 0, tl.div_rn(steps, tl.where(span > 0, zoomed, 1.0)), 0.0)
    position = m * zoom * inverse
    if STOCHASTIC:
        width = tl.div_rn(span, steps)
        step = tl.minimum(position.to(tl.int32), COUNT - 2)
        lower = tl.minimum(step.to(tl.float32) * width, span)
        gap = tl.minimum((step + 1).to(tl.float32) * width, span) - lower
        step += (_uniform(seed_ptr, index) * gap < m - lower).to(tl.int32)
    else:
        step = tl.minimum((position + 0.5).to(tl.int32), COUNT - 1)
    return step


@triton.jit
def _select(key, valid, n, k):
    """The k greatest of the valid unsigned keys, of equal ones the first."""
    low = tl.zeros((), tl.int64)
    high = low + 0x100000000
    for _ in range(32):
        middle = (low + high) >> 1
        reached = tl.sum((valid & (key >= middle)).to(tl.int32)) >= k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    above = valid & (key > low)
    equal = valid & (key == low)
    room = k - tl.sum(above.to(tl.int32))
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def _sparsify_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    mask_ptr,
    seed_ptr,
    numel,
    block,
    k_full,
    k_tail,
    weight_full,
    weight_tail,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SAMPLE: tl.constexpr,
    FULL_: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    first = b * block
    n = tl.minimum(numel - first, block).to(tl.int32)
    k = tl.where(n < block, k_tail, k_full)
    valid = lane < n
    raw = tl.load(x_ptr + first + lane, mask=valid, other=0)
    u = _widen(raw, DTYPE)
    index = first + lane
    if FULL_:
        kept = valid
    else:
        if SAMPLE:
            key = _draw(seed_ptr, index).to(tl.int64)
        elif DTYPE == 0:
            key = (raw & 0x7FFFFFFF).to(tl.int64)
        else:
            key = (raw.to(tl.int32) & 0x7FFF).to(tl.int64)
        kept = _select(key, valid, n, k)
        bit = tl.reshape(kept.to(tl.int32), (LANES // 8, 8)) << tl.arange(0, 8)[None, :]
        byte = tl.arange(0, LANES // 8)
        tl.store(mask_ptr + first // 8 + byte, tl.sum(bit, 1).to(tl.uint8), mask=byte * 8 < n)
    slot = b * k_full + tl.cumsum(kept.to(tl.int32), 0) - 1
    if BITS == 0:
        if SAMPLE:
            weight = tl.where(n < block, weight_tail, weight_full)
            raw = _narrow(_pattern(_single(u) * weight), DTYPE)
        tl.store(values_ptr + slot, raw, mask=kept)
    else:
        magnitude = u & 0x7FFFFFFF
        high_key = tl.max(tl.where(kept, magnitude, 0))
        poisoned = (high_key >= _INFINITY) & (k > 0)
        # A poisoned block is computed as zeros, so that nothing overflows on the way
        u = tl.where(poisoned, 0, u)
        x = _single(u)
        magnitude = u & 0x7FFFFFFF
        sign = (u >> 31) & 1
        high_key = tl.max(tl.where(kept, magnitude, 0))
        low_key = tl.min(tl.where(kept, magnitude, 0x7FFFFFFF))
        low_key = tl.minimum(low_key, high_key)
        low = _single(low_key)
        high = _single(high_key)
        column = scale_ptr + b * COLUMNS
        if LAYOUT != _SYMMETRIC:
            least = tl.min(tl.where(kept, x, _single(tl.full((), 0x7F7FFFFF, tl.int32))))
            most = tl.max(tl.where(kept, x, -_single(tl.full((), 0x7F7FFFFF, tl.int32))))
            least = tl.where(k > 0, least, 0.0)
            most = tl.where(k > 0, most, 0.0)
            base = _floor(least)
            ceiling = _ceiling(most)
            if LAYOUT == _UNIFORM:
                most = tl.maximum(most, ceiling)
            widest = tl.maximum(most - base, 0.0)
            overflow = _pattern(widest) >= _INFINITY
            poisoned = poisoned | overflow
            above = tl.where(overflow, 0.0, tl.maximum(x - base, 0.0))
            above = tl.where(kept, above, 0.0)
            c0 = base
            if LAYOUT == _UNIFORM:
                c1 = ceiling
                span = tl.where(overflow, 0.0, ceiling - base)
                code = _uniform_steps(above, span, seed_ptr, index, 2**BITS, STOCHASTIC)
            else:
                c1 = _round_up(_root(tl.where(overflow, 0.0, widest)))
                zero = c1 * 0.0
                code = _grid_steps(x, above, zero, c1, seed_ptr, index, 2**BITS, STOCHASTIC)
        elif BITS > 3:
            start = _round_down(_root(low))
            end = _round_up(_root(high))
            m = _single(tl.where(kept, magnitude, low_key))
            code = _grid_steps(x, m, start, end, seed_ptr, index, 2 ** (BITS - 1), STOCHASTIC)
            code = code | (sign << (BITS - 1))
            c0 = start
            c1 = end
        elif STOCHASTIC:
            c0 = _round_down(low)
            c1 = _round_up(high)
            if BITS == 1:
                code = (_uniform(seed_ptr, index) * (c1 + c1) >= x + c1).to(tl.int32)
                c0 = c1
            else:
                m = _single(magnitude)
                lower = c0 + tl.zeros_like(m)
                upper = c1 + tl.zeros_like(m)
                code = tl.zeros_like(u)
                if BITS == 3:
                    start = _root(low)
                    three = start * 0.0 + 3.0
                    width = tl.div_rn(_root(high) - start, three)
                    l1 = _single(
                        _to_bfloat(_pattern(_grid(start, width, tl.full((), 1, tl.int32))))
                    )
                    l2 = _single(
                        _to_bfloat(_pattern(_grid(start, width, tl.full((), 2, tl.int32))))
                    )
                    l1 = tl.minimum(tl.maximum(l1, c0), c1)
                    l2 = tl.minimum(tl.maximum(l2, c0), c1)
                    code = (m >= l1).to(tl.int32) + (m >= l2).to(tl.int32)
                    lower = tl.where(code == 0, c0, tl.where(code == 1, l1, l2))
                    upper = tl.where(code == 0, l1, tl.where(code == 1, l2, c1))
                    _store_level(column + 1, l1, poisoned)
                    _store_level(column + 2, l2, poisoned)
                drawn = _uniform(seed_ptr, index) * (upper - lower)
                code += (drawn < m - lower).to(tl.int32)
                code = code | (sign << (BITS - 1))
        else:
            COUNT: tl.constexpr = 2 ** (BITS - 1)
            first_root = _root(low)
            last_root = _root(high)
            if BITS == 3:
                first_root = _root(first_root)
                last_root = _root(last_root)
            start64 = first_root.to(tl.float64)
            span64 = last_root.to(tl.float64) - start64
            largest = tl.maximum(high_key >> 23, 1)
            fixed = tl.where(kept, _fixed_point(magnitude, largest), 0).to(tl.int64)
            code = tl.zeros_like(u)
            for j in tl.static_range(1, COUNT):
                root = start64 + span64 * (j / COUNT)
                border = root * root
                if BITS == 3:
                    border = border * border
                code += (magnitude >= _pattern(border.to(tl.float32))).to(tl.int32)
            unit = ((largest - 141 + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
            for j in tl.static_range(COUNT):
                inside = tl.where(code == j, fixed, 0)
                total = tl.maximum(tl.sum(inside), 1).to(tl.float64)
                level = (tl.sum(inside * inside).to(tl.float64) / total * unit).to(tl.float32)
                level = _single(tl.minimum(_to_bfloat(_pattern(level)), _TOP))
                _store_level(column + j, level, poisoned)
            code = code | (sign << (BITS - 1))
        if LAYOUT != _SYMMETRIC or BITS > 3 or STOCHASTIC:
            _store_level(column, c0, poisoned)
            if COLUMNS > 1:
                _store_level(column + COLUMNS - 1, c1, poisoned)
        code = tl.where(poisoned, 0, code)
        tl.store(values_ptr + slot, code.to(tl.uint8), mask=kept)


@triton.jit
def _store_level(ptr, level, poisoned):
    tl.store(ptr, (tl.where(poisoned, 0x7FC00000, _pattern(level)) >> 16).to(tl.int16))


@triton.jit
def _bfloat_at(ptr):
    return _single((tl.load(ptr).to(tl.int32) & 0xFFFF) << 16)


@triton.jit
def _unsparsify_kernel(
    out_ptr,
    values_ptr,
    scale_ptr,
    mask_ptr,
    numel,
    block,
    k_full,
    k_tail,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    FULL_: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    first = b * block
    n = tl.minimum(numel - first, block).to(tl.int32)
    k = tl.where(n < block, k_tail, k_full)
    valid = lane < n
    if FULL_:
        kept = valid
        slot = lane
    else:
        byte = tl.load(mask_ptr + first // 8 + lane // 8, mask=valid, other=0).to(tl.int32)
        kept = valid & (((byte >> (lane % 8)) & 1) != 0)
        slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    if BITS == 0:
        u = tl.load(values_ptr + b * k_full + slot, mask=kept, other=0)
    else:
        stream = values_ptr + b * ((k_full * BITS + 7) // 8)
        at = slot * BITS
        size = (k * BITS + 7) // 8
        code = tl.load(stream + at // 8, mask=kept, other=0).to(tl.int32)
        rest = tl.load(stream + at // 8 + 1, mask=kept & (at // 8 + 1 < size), other=0)
        code = ((code | (rest.to(tl.int32) << 8)) >> (at % 8)) & (2**BITS - 1)
        column = scale_ptr + b * COLUMNS
        c0 = _bfloat_at(column)
        if LAYOUT != _SYMMETRIC:
            steps = tl.full((), 2**BITS - 1, tl.float32)
            c1 = _bfloat_at(column + 1)
            if LAYOUT == _UNIFORM:
                scaled = code.to(tl.float32) * tl.div_rn(c1 - c0, steps)
                level = _pattern(tl.minimum(c0 + scaled, c1))
            else:
                root = code.to(tl.float32) * tl.div_rn(c1, steps)
                level = _pattern(c0 + root * root)
        else:
            step = code & (2 ** (BITS - 1) - 1)
            if BITS > 3:
                steps = tl.full((), 2 ** (BITS - 1) - 1, tl.float32)
                width = tl.div_rn(_bfloat_at(column + 1) - c0, steps)
                level = _pattern(_grid(c0, width, step))
            else:
                level = _pattern(_bfloat_at(column + step))
            level = level ^ ((code >> (BITS - 1)) << 31)
        magnitude = level & 0x7FFFFFFF
        if DTYPE == 0:
            top = 0x7F7FFFFF
        elif DTYPE == 1:
            top = 0x7F7F0000
        else:
            top = 0x477FE000
        beyond = (magnitude > top) & (magnitude <= _INFINITY)
        u = _narrow(tl.where(beyond, (level & -2147483648) | top, level), DTYPE)
    tl.store(out_ptr + first + lane, tl.where(kept, u, 0), mask=valid)


@triton.jit
def _pack_kernel(codes_ptr, out_ptr, rows, k_full, k_tail, BITS: tl.constexpr, TILE: tl.constexpr):
    """Row `program_id(1)` of codes to its bit stream; all rows but the last have k_full codes."""
    row = tl.program_id(1).to(tl.int64)
    count = tl.where(row == rows - 1, k_tail, k_full)
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    member = tl.arange(0, 8)
    i = group[:, None] * 8 + member[None, :]
    codes = tl.load(codes_ptr + row * k_full + i, mask=i < count, other=0).to(tl.int64)
    word = tl.sum(codes << (member * BITS).to(tl.int64)[None, :], 1)
    stream = out_ptr + row * ((k_full * BITS + 7) // 8)
    size = (count * BITS + 7) // 8
    for j in tl.static_range(BITS):
        byte = group * BITS + j
        tl.store(stream + byte, ((word >> (8 * j)) & 0xFF).to(tl.uint8), mask=byte < size)


@triton.jit
def _code_at(packed_ptr, i, count, BITS: tl.constexpr):
    """Codes `i` of one stream of `count`."""
    at = i * BITS
    size = (count * BITS + 7) // 8
    code = tl.load(packed_ptr + at // 8, mask=at // 8 < size, other=0).to(tl.int32)
    rest = tl.load(packed_ptr + at // 8 + 1, mask=at // 8 + 1 < size, other=0).to(tl.int32)
    return ((code | (rest << 8)) >> (at % 8).to(tl.int32)) & (2**BITS - 1)


@triton.jit
def _unpack_kernel(packed_ptr, out_ptr, count, BITS: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + i, _code_at(packed_ptr, i, count, BITS).to(tl.uint8), mask=i < count)


@triton.jit
def _encode_steps_kernel(
    x_ptr,
    out_ptr,
    numel,
    BORDERS: tl.constexpr,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """BORDERS: COUNT patterns of float32."""
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    member = tl.arange(0, 8)
    i = group[:, None] * 8 + member[None, :]
    x = _single(_widen(tl.load(x_ptr + i, mask=i < numel, other=0), DTYPE))
    codes = tl.zeros_like(i)
    for j in tl.static_range(COUNT):
        codes += (x >= _single(tl.full((), BORDERS[j], tl.int32))).to(tl.int64)
    codes = tl.where(i < numel, codes, 0)
    word = tl.sum(codes << (member * BITS).to(tl.int64)[None, :], 1)
    size = (numel * BITS + 7) // 8
    for j in tl.static_range(BITS):
        byte = group * BITS + j
        tl.store(out_ptr + byte, ((word >> (8 * j)) & 0xFF).to(tl.uint8), mask=byte < size)


@triton.jit
def _decode_steps_kernel(
    packed_ptr,
    out_ptr,
    numel,
    LEVELS: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """LEVELS: COUNT patterns of the output's dtype."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = _code_at(packed_ptr, i, numel, BITS)
    level = tl.full((TILE,), LEVELS[0], tl.int32)
    for j in tl.static_range(1, COUNT):
        level = tl.where(code >= j, tl.full((), LEVELS[j], tl.int32), level)
    tl.store(out_ptr + i, level, mask=i < numel)


def _fits(dtype: torch.dtype, numel: int, block: int) -> bool:
    return dtype in _DTYPES and 0 < block <= _LARGEST_BLOCK and numel > 0


def _lanes(block: int) -> int:
    return max(16, int(triton.next_power_of_2(block)))


def _kept_counts(numel: int, keep: int, block: int) -> tuple[int, int]:
    _, length, tail = split_blocks(numel, block)
    return kept_in_block(length, keep, block), kept_in_block(tail, keep, block)


def _launch_sparsify(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    keep: int,
    block: int,
    bits: int,
    layout: int,
    sampled: bool,
) -> None:
    k_full, k_tail = _kept_counts(x.numel(), keep, block)
    options: dict[str, Any] = {"enable_fp_fusion": False}
    _sparsify_kernel[(block_count(x.numel(), block),)](
        x.view(_INT_OF[x.dtype]),
        values if bits else values.view(_INT_OF[x.dtype]),
        scale.view(torch.int16),
        mask,
        seed if seed is not None else x,
        x.numel(),
        block,
        k_full,
        k_tail,
        block / k_full if k_full else 0.0,
        x.numel() % block / k_tail if k_tail else 0.0,
        DTYPE=_DTYPES[x.dtype],
        BITS=bits,
        LAYOUT=layout,
        STOCHASTIC=seed is not None and not sampled,
        SAMPLE=sampled,
        FULL_=keep == FULL,
        COLUMNS=max(1, scale_columns(bits, layout)),
        LANES=_lanes(block),
        **options,
    )


def sparsify(
    x: Tensor,
    keep: int,
    block: int,
    bits: int,
    layout: int,
    stochastic: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sparsify`, which also takes float64, blocks above 8192 and whole tensors."""
    if not _fits(x.dtype, x.numel(), block):
        return reference.sparsify(x, keep, block, bits, layout, stochastic, seed)
    check_format(keep, block, bits, layout)
    if not (stochastic and bits):
        seed = None
    elif seed is None:
        seed = reference.draw_seed(x.device)
    n = x.numel()
    x = x.contiguous()
    mask = x.new_empty(mask_nbytes(n, keep), dtype=torch.uint8)
    columns = scale_columns(bits, layout)
    scale = x.new_empty(block_count(n, block) * columns, dtype=torch.bfloat16)
    values = x.new_empty(kept(n, keep, block), dtype=torch.uint8 if bits else x.dtype)
    _launch_sparsify(x, values, scale, mask, seed, keep, block, bits, layout, False)
    if bits:
        k_full, k_tail = _kept_counts(n, keep, block)
        rows = block_count(n, block)
        packed = x.new_empty(codes_nbytes(n, keep, block, bits), dtype=torch.uint8)
        last = k_tail if n % block else k_full
        _launch_pack(values, packed, rows, k_full, last, bits)
        values = packed
    return values, scale, mask


def _launch_pack(
    codes: Tensor, packed: Tensor, rows: int, k_full: int, k_last: int, bits: int
) -> None:
    if packed.numel():
        tiles = triton.cdiv(max(k_full if rows > 1 else 0, k_last), 8 * _TILE)
        _pack_kernel[(tiles, rows)](codes, packed, rows, k_full, k_last, BITS=bits, TILE=_TILE)


def sample(x: Tensor, keep: int, block: int, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.sample`."""
    if not _fits(x.dtype, x.numel(), block):
        return reference.sample(x, keep, block, seed)
    check_format(keep, block)
    seed = reference.draw_seed(x.device) if seed is None else seed
    x = x.contiguous()
    mask = x.new_empty(mask_nbytes(x.numel(), keep), dtype=torch.uint8)
    values = x.new_empty(kept(x.numel(), keep, block))
    scale = x.new_empty(0, dtype=torch.bfloat16)
    _launch_sparsify(x, values, scale, mask, seed, keep, block, 0, SYMMETRIC, True)
    return values, mask


def unsparsify(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    numel: int,
    dtype: torch.dtype,
    keep: int,
    block: int,
    bits: int,
    layout: int,
) -> Tensor:
    """As `reference.unsparsify`."""
    if not _fits(dtype, numel, block) or (bits == 0 and values.dtype != dtype):
        return reference.unsparsify(values, scale, mask, numel, dtype, keep, block, bits, layout)
    check_format(keep, block, bits, layout)
    out = values.new_empty(numel, dtype=dtype)
    k_full, k_tail = _kept_counts(numel, keep, block)
    options: dict[str, Any] = {"enable_fp_fusion": False}
    _unsparsify_kernel[(block_count(numel, block),)](
        out.view(_INT_OF[dtype]),
        values.contiguous() if bits else values.contiguous().view(_INT_OF[dtype]),
        scale.contiguous().view(torch.int16) if bits else mask,
        mask.contiguous(),
        numel,
        block,
        k_full,
        k_tail,
        DTYPE=_DTYPES[dtype],
        BITS=bits,
        LAYOUT=layout,
        FULL_=keep == FULL,
        COLUMNS=scale_columns(bits, layout),
        LANES=_lanes(block),
        **options,
    )
    return out


def pack_uint(x: Tensor, bits: int) -> Tensor:
    """As `reference.pack_uint`."""
    check_uint(x, bits)
    out = x.new_empty(uint_nbytes(x.numel(), bits), dtype=torch.uint8)
    _launch_pack(x.contiguous().view(torch.uint8), out, 1, 0, x.numel(), bits)
    return out


def unpack_uint(packed: Tensor, bits: int, numel: int) -> Tensor:
    """As `reference.unpack_uint`."""
    check_uint(packed, bits)
    out = packed.new_empty(numel, dtype=torch.uint8)
    if numel:
        grid = (triton.cdiv(numel, 1024),)
        _unpack_kernel[grid](packed.contiguous(), out, numel, BITS=bits, TILE=1024)
    return out


def _patterns(values: Sequence[float], dtype: torch.dtype) -> tuple[int, ...]:
    return tuple(torch.tensor(values, dtype=dtype).view(_INT_OF[dtype]).tolist())


def encode_steps(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    """As `reference.encode_steps`; compiled anew for each list of borders."""
    if x.dtype not in _DTYPES:
        return reference.encode_steps(x, borders, bits)
    check_borders(x.dtype, borders, bits)
    out = x.new_empty(uint_nbytes(x.numel(), bits), dtype=torch.uint8)
    if x.numel():
        _encode_steps_kernel[(triton.cdiv(x.numel(), 8 * _TILE),)](
            x.contiguous().view(_INT_OF[x.dtype]),
            out,
            x.numel(),
            BORDERS=_patterns(borders, torch.float32),
            COUNT=len(borders),
            DTYPE=_DTYPES[x.dtype],
            BITS=bits,
            TILE=_TILE,
        )
    return out


def decode_steps(
    packed: Tensor, levels: Sequence[float], bits: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.decode_steps`; compiled anew for each list of levels."""
    if dtype not in _DTYPES:
        return reference.decode_steps(packed, levels, bits, numel, dtype)
    check_levels(packed, levels, bits, dtype)
    check_stream(packed, bits, numel)
    out = packed.new_empty(numel, dtype=dtype)
    if numel:
        _decode_steps_kernel[(triton.cdiv(numel, 1024),)](
            packed.contiguous(),
            out.view(_INT_OF[dtype]),
            numel,
            LEVELS=_patterns(levels, dtype),
            COUNT=len(levels),
            BITS=bits,
            TILE=1024,
        )
    return out


__all__ = [
    "decode_steps",
    "encode_steps",
    "pack_uint",
    "sample",
    "sparsify",
    "unpack_uint",
    "unsparsify",
]
