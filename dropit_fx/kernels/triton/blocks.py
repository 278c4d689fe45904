"""The packed format: selection, value coder and bit packing in one launch, and its inverse.

One program handles a tile of blocks, a row each (`launch.tile`). The k-th largest key of a row is
found bit by bit, from the highest on: one count for each bit of a magnitude, 15 for 16-bit dtypes
and 31 for float32. Codes become bytes inside the program: no byte a code passes through memory.
"""

# Kernel arguments have no types that a type checker knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.dispatch import warn_once
from dropit_fx.kernels.layout import (
    FULL,
    SYMMETRIC,
    UNIFORM,
    block_count,
    check_format,
    codes_nbytes,
    kept,
    kept_in_block,
    mask_nbytes,
    scale_columns,
    split_blocks,
    uint_nbytes,
)
from dropit_fx.kernels.triton.bits import (
    DTYPES,
    INFINITY,
    INT_OF,
    LARGEST,
    TOP,
    ceiling,
    code_at,
    draw,
    floor,
    load_tile,
    narrow,
    pattern,
    round_down,
    round_up,
    single,
    store_codes,
    store_tile,
    to_bfloat,
    uniform,
    widen,
)
from dropit_fx.kernels.triton.launch import (
    EXACT,
    LARGEST_BLOCK,
    Tile,
    pack_tile,
    programs,
    unpack_tile,
)

_SYMMETRIC = tl.constexpr(SYMMETRIC)
_UNIFORM = tl.constexpr(UNIFORM)
_LARGEST_RUN = 2**31 - 1 - LARGEST_BLOCK  # of one channel: positions inside it are int32


@triton.jit
def _grid(start, width, step):
    scaled = step.to(tl.float32) * width
    root = start + scaled
    return root * root


@triton.jit
def _fixed_point(magnitude, largest):
    raw = magnitude >> 23
    mantissa = (magnitude & 0x7FFFFF) | tl.where(raw > 0, 0x800000, 0)
    shift = tl.minimum(8 + largest - tl.maximum(raw, 1), 31)
    return ((mantissa >> shift) + 1) >> 1


@triton.jit
def _grid_steps(m, start, end, seed_ptr, index, COUNT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Steps of sqrt(m) between start and end of each row, nearest or random."""
    span = end - start
    steps = span * 0.0 + (COUNT - 1)
    inverse = tl.where(span > 0, tl.div_rn(steps, tl.where(span > 0, span, 1.0)), 0.0)
    position = (tl.sqrt_rn(m) - start[:, None]) * inverse[:, None]
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
def _select(key, valid, k, KEY_BITS: tl.constexpr):
    """The k greatest valid keys of each row (uint32 below 2**KEY_BITS), of equal ones the first."""
    key = tl.where(valid, key, 0)
    low = k.to(tl.uint32) * 0
    for i in range(KEY_BITS):
        candidate = low | (tl.full((), 1, tl.uint32) << (KEY_BITS - 1 - i))
        reached = tl.sum((key >= candidate[:, None]).to(tl.int32), 1) >= k
        low = tl.where(reached, candidate, low)
    above = valid & (key > low[:, None])
    equal = valid & (key == low[:, None])
    room = k - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit
def _join(left_group, left_word, right_group, right_word):
    return right_group, tl.where(left_group == right_group, left_word, 0) | right_word


@triton.jit
def _store_kept_codes(ptr, codes, kept, rank, k, BITS: tl.constexpr):
    """As `store_codes`, of the kept codes alone: code of rank r takes bits [r*BITS, (r+1)*BITS).

    Args:
        ptr: (ROWS,) where each stream starts.
        codes: (ROWS, LANES).
        kept: (ROWS, LANES) bool.
        rank: (ROWS, LANES): how many kept ones lie before, itself not counted; -1 before the first.
        k: (ROWS,) how many are kept.
        BITS: 1..8.
    """
    if BITS == 8:
        tl.store(ptr[:, None] + rank, codes.to(tl.uint8), mask=kept)
    else:
        PER: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8  # codes that fill whole bytes
        group = tl.where(rank < 0, -1, rank // PER)
        word = tl.where(kept, codes, 0).to(tl.int32 if PER * BITS < 32 else tl.int64)
        word = word << (tl.maximum(rank, 0) % PER * BITS).to(word.dtype)
        _, word = tl.associative_scan((group, word), 1, _join)
        last = kept & ((rank % PER == PER - 1) | (rank == k[:, None] - 1))
        for j in tl.static_range((PER * BITS) // 8):
            at = group * (PER * BITS // 8) + j
            within = last & (at < ((k * BITS + 7) // 8)[:, None])
            tl.store(ptr[:, None] + at, ((word >> (8 * j)) & 0xFF).to(tl.uint8), mask=within)


@triton.jit
def _store_level(ptr, level, poisoned, real):
    bits = (tl.where(poisoned, 0x7FC00000, pattern(level)) >> 16).to(tl.int16)
    tl.store(ptr, bits, mask=real)


@triton.jit
def _channel(first, lane, inner, channels):
    """The channel of each element of rows that start at `first`: runs of `inner` elements each."""
    run = first // inner
    at = (first - run * inner).to(tl.int32)[:, None] + lane
    return ((run % channels).to(tl.int32)[:, None] + at // inner) % channels


@triton.jit
def _sparsify_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    mask_ptr,
    seed_ptr,
    mean_ptr,
    inverse_ptr,
    numel,
    block,
    stream,
    k_full,
    k_tail,
    weight_full,
    weight_tail,
    inner,
    channels,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SAMPLE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FULL_: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`stream`: what a full block takes of `values`, in bytes, or elements where BITS is 0."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)[None, :]
    first = row * block
    n = tl.minimum(tl.maximum(numel - first, 0), block).to(tl.int32)
    k = tl.where(n < block, tl.where(n > 0, k_tail, 0), k_full)
    real = n > 0  # the last program may have rows to spare
    valid = lane < n[:, None]
    index = first[:, None] + lane
    whole = (program + 1) * ROWS * block <= numel
    raw = load_tile(x_ptr, index, valid, whole, EVEN)
    u = widen(raw, DTYPE)
    if BY_CHANNEL:
        channel = _channel(first, lane, inner, channels)
        centred = single(u) - tl.load(mean_ptr + channel, mask=valid, other=0.0)
        scaled = centred * tl.load(inverse_ptr + channel, mask=valid, other=0.0)
        raw = narrow(pattern(scaled), DTYPE)
        u = widen(raw, DTYPE)
    if FULL_:
        kept = valid
    else:
        KEY_BITS: tl.constexpr = 32 if SAMPLE else (31 if DTYPE == 0 else 15)
        if SAMPLE:
            key = draw(seed_ptr, index)
        elif DTYPE == 0:
            key = (raw & 0x7FFFFFFF).to(tl.uint32)
        else:
            key = (raw.to(tl.int32) & 0x7FFF).to(tl.uint32)
        kept = _select(key, valid, k, KEY_BITS)
        store_codes(mask_ptr + first // 8, kept, n, whole, 1, ROWS, LANES, EVEN)
        rank = tl.cumsum(kept.to(tl.int32), 1) - 1
    start_of = values_ptr + row * stream
    if BITS == 0:
        if SAMPLE:
            weight = tl.where(n < block, weight_tail, weight_full)
            raw = narrow(pattern(single(u) * weight[:, None]), DTYPE)
        if FULL_:
            store_tile(start_of[:, None], lane, raw, valid, whole, EVEN)
        else:
            tl.store(start_of[:, None] + rank, raw, mask=kept)
    else:
        magnitude = u & 0x7FFFFFFF
        high_key = tl.max(tl.where(kept, magnitude, 0), 1)
        poisoned = (high_key >= INFINITY) & (k > 0)
        # A poisoned block is computed as zeros, so that nothing overflows on the way
        u = tl.where(poisoned[:, None], 0, u)
        high_key = tl.where(poisoned, 0, high_key)
        x = single(u)
        magnitude = u & 0x7FFFFFFF
        sign = (u >> 31) & 1
        low_key = tl.min(tl.where(kept, magnitude, 0x7FFFFFFF), 1)
        low_key = tl.minimum(low_key, high_key)
        low = single(low_key)
        high = single(high_key)
        column = scale_ptr + row * COLUMNS
        if LAYOUT != _SYMMETRIC:
            edge = single(tl.full((), LARGEST, tl.int32))
            least = tl.min(tl.where(kept, x, edge), 1)
            most = tl.max(tl.where(kept, x, -edge), 1)
            least = tl.where(k > 0, least, 0.0)
            most = tl.where(k > 0, most, 0.0)
            base = floor(least)
            upper = ceiling(most)
            if LAYOUT == _UNIFORM:
                most = tl.maximum(most, upper)
            widest = tl.maximum(most - base, 0.0)
            overflow = pattern(widest) >= INFINITY
            poisoned = poisoned | overflow
            above = tl.where(overflow[:, None], 0.0, tl.maximum(x - base[:, None], 0.0))
            above = tl.where(kept, above, 0.0)
            c0 = base
            if LAYOUT == _UNIFORM:
                c1 = upper
                span = tl.where(overflow, 0.0, upper - base)
                code = _uniform_steps(above, span, seed_ptr, index, 2**BITS, STOCHASTIC)
            else:
                c1 = round_up(tl.sqrt_rn(tl.where(overflow, 0.0, widest)))
                zero = c1 * 0.0
                code = _grid_steps(above, zero, c1, seed_ptr, index, 2**BITS, STOCHASTIC)
        elif BITS > 3:
            c0 = round_down(tl.sqrt_rn(low))
            c1 = round_up(tl.sqrt_rn(high))
            m = single(tl.where(kept, magnitude, low_key[:, None]))
            code = _grid_steps(m, c0, c1, seed_ptr, index, 2 ** (BITS - 1), STOCHASTIC)
            code = code | (sign << (BITS - 1))
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
                    _store_level(column + 1, l1, poisoned, real)
                    _store_level(column + 2, l2, poisoned, real)
                drawn = uniform(seed_ptr, index) * (upper - lower)
                code += (drawn < m - lower).to(tl.int32)
                code = code | (sign << (BITS - 1))
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
            fixed = tl.where(kept, _fixed_point(magnitude, largest[:, None]), 0)
            code = tl.zeros_like(u)
            for j in range(1, COUNT):  # not unrolled, here and below: registers are what is short
                root = start64 + span64 * (tl.full((), j, tl.float64) * (1 / COUNT))
                border = root * root
                if BITS == 3:
                    border = border * border
                code += (magnitude >= pattern(border.to(tl.float32))[:, None]).to(tl.int32)
            unit = ((largest - 141 + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
            for j in range(COUNT):
                inside = tl.where(code == j, fixed, 0)  # up to 2**15 each, 2**28 together
                square = tl.sum(inside.to(tl.int64) * inside, 1).to(tl.float64)
                total = tl.maximum(tl.sum(inside, 1), 1).to(tl.float64)
                level = (square / total * unit).to(tl.float32)
                level = single(tl.minimum(to_bfloat(pattern(level)), TOP))
                _store_level(column + j, level, poisoned, real)
            code = code | (sign << (BITS - 1))
        if LAYOUT != _SYMMETRIC or BITS > 3 or STOCHASTIC:
            _store_level(column, c0, poisoned, real)
            if COLUMNS > 1:
                _store_level(column + COLUMNS - 1, c1, poisoned, real)
        code = tl.where(kept & ~poisoned[:, None], code, 0)
        if FULL_:
            store_codes(start_of, code, k, whole, BITS, ROWS, LANES, EVEN)
        else:
            _store_kept_codes(start_of, code, kept, rank, k, BITS)


@triton.jit
def _bfloat_at(ptr, real):
    return single((tl.load(ptr, mask=real, other=0).to(tl.int32)) << 16)


@triton.jit
def _unsparsify_kernel(
    out_ptr,
    values_ptr,
    scale_ptr,
    mask_ptr,
    mean_ptr,
    deviation_ptr,
    numel,
    block,
    stream,
    k_full,
    k_tail,
    inner,
    channels,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FULL_: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)[None, :]
    first = row * block
    n = tl.minimum(tl.maximum(numel - first, 0), block).to(tl.int32)
    k = tl.where(n < block, tl.where(n > 0, k_tail, 0), k_full)
    valid = lane < n[:, None]
    whole = (program + 1) * ROWS * block <= numel
    start_of = (values_ptr + row * stream)[:, None]
    if FULL_:
        kept = valid
        slot = lane
    else:
        at = (mask_ptr + first // 8)[:, None] + lane // 8
        byte = tl.load(at, mask=valid, other=0).to(tl.int32)
        kept = valid & (((byte >> (lane % 8)) & 1) != 0)
        slot = tl.cumsum(kept.to(tl.int32), 1) - 1
    if BITS == 0:
        if FULL_:
            u = load_tile(start_of, slot, kept, whole, EVEN)
        else:
            u = tl.load(start_of + slot, mask=kept, other=0)
    else:
        code = code_at(start_of, slot, ((k * BITS + 7) // 8)[:, None], kept, BITS)
        real = n > 0
        column = scale_ptr + row * COLUMNS
        c0 = _bfloat_at(column, real)
        if LAYOUT != _SYMMETRIC:
            steps = tl.full((ROWS,), 2**BITS - 1, tl.float32)
            c1 = _bfloat_at(column + 1, real)
            if LAYOUT == _UNIFORM:
                width = tl.div_rn(c1 - c0, steps)
                scaled = code.to(tl.float32) * width[:, None]
                level = pattern(tl.minimum(c0[:, None] + scaled, c1[:, None]))
            else:
                root = code.to(tl.float32) * tl.div_rn(c1, steps)[:, None]
                level = pattern(c0[:, None] + root * root)
        else:
            step = code & (2 ** (BITS - 1) - 1)
            if BITS > 3:
                steps = tl.full((ROWS,), 2 ** (BITS - 1) - 1, tl.float32)
                width = tl.div_rn(_bfloat_at(column + 1, real) - c0, steps)
                level = pattern(_grid(c0[:, None], width[:, None], step))
            else:
                level = pattern(_bfloat_at(column[:, None] + step, kept))
            level = level ^ ((code >> (BITS - 1)) << 31)
        magnitude = level & 0x7FFFFFFF
        if DTYPE == 0:
            top = 0x7F7FFFFF
        elif DTYPE == 1:
            top = 0x7F7F0000
        else:
            top = 0x477FE000
        beyond = (magnitude > top) & (magnitude <= INFINITY)
        u = narrow(tl.where(beyond, (level & -2147483648) | top, level), DTYPE)
    u = tl.where(kept, u, 0)
    if BY_CHANNEL:
        channel = _channel(first, lane, inner, channels)
        scaled = single(widen(u, DTYPE)) * tl.load(deviation_ptr + channel, mask=valid, other=0.0)
        u = narrow(pattern(scaled), DTYPE)
        moved = single(widen(u, DTYPE)) + tl.load(mean_ptr + channel, mask=valid, other=0.0)
        u = narrow(pattern(moved), DTYPE)
    store_tile(out_ptr, first[:, None] + lane, u, valid, whole, EVEN)


def _fits(dtype: torch.dtype, numel: int, block: int) -> bool:
    """Whether there is a kernel for it; says so where PyTorch, slower, has to do."""
    if dtype in DTYPES and 0 < block <= LARGEST_BLOCK:
        return numel > 0
    if numel:
        what = "whole tensors" if block == 0 else f"blocks of {block}"
        warn_once(
            str(dtype) if dtype not in DTYPES else what,
            f"{dtype} in {what} has no CUDA kernel: PyTorch packs it, with about 32 bytes an"
            f" element for the time being. Kernels take {', '.join(map(str, DTYPES))} in blocks of"
            f" up to {LARGEST_BLOCK} elements.",
        )
    return False


def _kept_counts(numel: int, keep: int, block: int) -> tuple[int, int]:
    _, length, tail = split_blocks(numel, block)
    return kept_in_block(length, keep, block), kept_in_block(tail, keep, block)


def block_grid(numel: int, block: int, tile: Tile) -> tuple[int]:
    """Programs for `numel` elements in blocks of `block`."""
    return programs(block_count(numel, block), tile.rows)


class _Channels(NamedTuple):
    """Mean and scale of each channel, (C,) float32, for elements in runs of `inner` a channel."""

    mean: Tensor
    scale: Tensor
    inner: int


def _launch_sparsify(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    form: tuple[int, int, int, int],
    sampled: bool = False,
    channels: _Channels | None = None,
) -> None:
    keep, block, bits, layout = form
    n = x.numel()
    k_full, k_tail = _kept_counts(n, keep, block)
    stochastic = seed is not None and not sampled
    shape = pack_tile(*form, stochastic)
    _sparsify_kernel[block_grid(n, block, shape)](
        x.view(INT_OF[x.dtype]),
        values if bits else values.view(INT_OF[x.dtype]),
        scale.view(torch.int16),
        mask,
        seed if seed is not None else x,
        channels.mean if channels else x,
        channels.scale if channels else x,
        n,
        block,
        uint_nbytes(k_full, bits) if bits else k_full,
        k_full,
        k_tail,
        block / k_full if k_full else 0.0,
        n % block / k_tail if k_tail else 0.0,
        channels.inner if channels else 1,
        channels.mean.numel() if channels else 1,
        DTYPE=DTYPES[x.dtype],
        BITS=bits,
        LAYOUT=layout,
        STOCHASTIC=stochastic,
        SAMPLE=sampled,
        BY_CHANNEL=channels is not None,
        FULL_=keep == FULL,
        COLUMNS=max(1, scale_columns(bits, layout)),
        ROWS=shape.rows,
        LANES=shape.lanes,
        EVEN=block == shape.lanes,
        num_warps=shape.warps,
        **EXACT,
    )


def _sparsify(
    x: Tensor,
    form: tuple[int, int, int, int],
    stochastic: bool,
    seed: Tensor | None,
    channels: _Channels | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keep, block, bits, layout = form
    if not (stochastic and bits):
        seed = None
    elif seed is None:
        seed = reference.draw_seed(x.device)
    n = x.numel()
    x = x.contiguous()
    mask = x.new_empty(mask_nbytes(n, keep), dtype=torch.uint8)
    columns = scale_columns(bits, layout)
    scale = x.new_empty(block_count(n, block) * columns, dtype=torch.bfloat16)
    if bits:
        values = x.new_empty(codes_nbytes(n, keep, block, bits), dtype=torch.uint8)
    else:
        values = x.new_empty(kept(n, keep, block))
    _launch_sparsify(x, values, scale, mask, seed, form, channels=channels)
    return values, scale, mask


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
    check_format(keep, block, bits, layout)
    if not _fits(x.dtype, x.numel(), block):
        return reference.sparsify(x, keep, block, bits, layout, stochastic, seed)
    return _sparsify(x, (keep, block, bits, layout), stochastic, seed, None)


def sparsify_channels(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    inner: int,
    keep: int,
    block: int,
    bits: int,
    layout: int,
    stochastic: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sparsify_channels`; what is standardised never lies in memory."""
    check_format(keep, block, bits, layout)
    form = keep, block, bits, layout
    if not _fits(x.dtype, x.numel(), block) or inner > _LARGEST_RUN:
        return reference.sparsify_channels(x, mean, inverse, inner, *form, stochastic, seed)
    channels = _Channels(mean.contiguous(), inverse.contiguous(), inner)
    return _sparsify(x, form, stochastic, seed, channels)


def sample(x: Tensor, keep: int, block: int, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.sample`."""
    check_format(keep, block)
    if not _fits(x.dtype, x.numel(), block):
        return reference.sample(x, keep, block, seed)
    seed = reference.draw_seed(x.device) if seed is None else seed
    x = x.contiguous()
    mask = x.new_empty(mask_nbytes(x.numel(), keep), dtype=torch.uint8)
    values = x.new_empty(kept(x.numel(), keep, block))
    scale = x.new_empty(0, dtype=torch.bfloat16)
    _launch_sparsify(x, values, scale, mask, seed, (keep, block, 0, SYMMETRIC), sampled=True)
    return values, mask


def _unsparsify(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    numel: int,
    dtype: torch.dtype,
    form: tuple[int, int, int, int],
    channels: _Channels | None,
) -> Tensor:
    keep, block, bits, layout = form
    out = values.new_empty(numel, dtype=dtype)
    k_full, k_tail = _kept_counts(numel, keep, block)
    shape = unpack_tile(block)
    _unsparsify_kernel[block_grid(numel, block, shape)](
        out.view(INT_OF[dtype]),
        values.contiguous() if bits else values.contiguous().view(INT_OF[dtype]),
        scale.contiguous().view(torch.int16) if bits else mask,
        mask.contiguous(),
        channels.mean if channels else out,
        channels.scale if channels else out,
        numel,
        block,
        uint_nbytes(k_full, bits) if bits else k_full,
        k_full,
        k_tail,
        channels.inner if channels else 1,
        channels.mean.numel() if channels else 1,
        DTYPE=DTYPES[dtype],
        BITS=bits,
        LAYOUT=layout,
        BY_CHANNEL=channels is not None,
        FULL_=keep == FULL,
        COLUMNS=scale_columns(bits, layout),
        ROWS=shape.rows,
        LANES=shape.lanes,
        EVEN=block == shape.lanes,
        num_warps=shape.warps,
        **EXACT,
    )
    return out


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
    check_format(keep, block, bits, layout)
    if not _fits(dtype, numel, block) or (bits == 0 and values.dtype != dtype):
        return reference.unsparsify(values, scale, mask, numel, dtype, keep, block, bits, layout)
    return _unsparsify(values, scale, mask, numel, dtype, (keep, block, bits, layout), None)


def unsparsify_channels(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    mean: Tensor,
    deviation: Tensor,
    inner: int,
    numel: int,
    dtype: torch.dtype,
    keep: int,
    block: int,
    bits: int,
    layout: int,
) -> Tensor:
    """As `reference.unsparsify_channels`."""
    check_format(keep, block, bits, layout)
    form = keep, block, bits, layout
    whole = bits == 0 and values.dtype != dtype
    if not _fits(dtype, numel, block) or inner > _LARGEST_RUN or whole:
        given = values, scale, mask, mean, deviation, inner, numel, dtype
        return reference.unsparsify_channels(*given, *form)
    channels = _Channels(mean.contiguous(), deviation.contiguous(), inner)
    return _unsparsify(values, scale, mask, numel, dtype, form, channels)
