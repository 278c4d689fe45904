"""Unpacking: the inverse of `sparsify`, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.dtypes import INT_OF
from dropit_fx.kernels.format import Format
from dropit_fx.kernels.triton.bits import (
    channel_of,
    load_codes,
    load_stream,
    load_tile,
    narrow,
    pattern,
    rows_of,
    single,
    store_tile,
    widen,
)
from dropit_fx.kernels.triton.coder import decode, marks
from dropit_fx.kernels.triton.launch import (
    LARGEST_RUN,
    Channels,
    Launch,
    block_arguments,
    fits,
    launch,
    programs,
    shape_of,
    unpack_tile,
)


@triton.jit
def marks_of(ptr, n, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Which elements of rows of `n` are kept, by the bits at `ptr`, in groups of eight.

    Returns:
        (ROWS, GROUPS, 8) bool; how many are kept before each; and before each group.
    """
    group = tl.arange(0, LANES // 8)[None, :]
    bits = tl.load(ptr[:, None] + group, mask=group * 8 < n[:, None], other=0).to(tl.int32)
    marks = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    count = tl.sum(marks, 2)
    first_of = tl.cumsum(count, 1) - count
    before = first_of[:, :, None] + tl.cumsum(marks, 2) - marks
    return marks != 0, before, first_of


@triton.jit
def _set_marked(
    out_of,
    start_of,
    mask_of,
    n,
    marked,
    read_last,
    read_other,
    other,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    FULL_: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """What is not finite, of marked rows (see `marks`): few lanes at a time, it is rare."""
    LAST: tl.constexpr = 2**BITS - 1
    STEP: tl.constexpr = 32 if LANES > 32 else LANES
    before = tl.zeros((ROWS,), tl.int32)
    spread = tl.zeros((ROWS, STEP), tl.int32)
    read_last = narrow(read_last[:, None] + spread, DTYPE)
    read_other = narrow(read_other[:, None] + spread, DTYPE)
    other = other[:, None] + spread
    for at in range(0, LANES, STEP):
        lane = at + tl.arange(0, STEP)[None, :]
        kept = (lane < n[:, None]) & marked[:, None]
        rank = lane
        if not FULL_:
            bits = tl.load(mask_of[:, None] + lane // 8, mask=kept, other=0).to(tl.int32)
            mark = (bits >> (lane & 7)) & 1
            rank = before[:, None] + tl.cumsum(mark, 1) - mark
            kept = kept & (mark != 0)
            before += tl.sum(mark, 1)
        first, shift = start_of[:, None] + (rank * BITS >> 3), rank * BITS & 7
        low = tl.load(first, mask=kept, other=0).to(tl.int32)
        high = tl.load(first + 1, mask=kept & (shift + BITS > 8), other=0).to(tl.int32)
        code = ((low | (high << 8)) >> shift) & LAST
        value = tl.where(code == LAST, read_last, read_other)
        tl.store(out_of[:, None] + lane, value, mask=kept & ((code == LAST) | (code == other)))


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
    size,
    k_full,
    k_tail,
    inner,
    channels,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    SPACING: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FULL_: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, first, n, k, whole = rows_of(numel, block, k_full, k_tail, ROWS)
    lane = tl.arange(0, LANES)[None, :]
    valid = lane < n[:, None]
    start_of = values_ptr + row * size
    if FULL_:
        kept = valid
        slot = lane
    else:
        kept, before, first_of = marks_of(mask_ptr + first // 8, n, ROWS, LANES)
        kept = tl.reshape(kept, (ROWS, LANES))
        slot = tl.reshape(before, (ROWS, LANES))
    if BITS == 0:
        if FULL_:
            u = load_tile(start_of[:, None], slot, kept, whole, EVEN)
        else:
            u = tl.load(start_of[:, None] + slot, mask=kept, other=0)
    else:
        if FULL_:
            code = load_stream(start_of, k, BITS, ROWS, LANES)
        else:
            REACH: tl.constexpr = 8 if BITS == 8 else BITS + 1
            bit = first_of * BITS
            shift = (bit & 7)[:, :, None] + (before - first_of[:, :, None]) * BITS
            streams = (k * BITS + 7) // 8
            code = load_codes(start_of, bit >> 3, shift, streams, BITS, REACH)
            code = tl.reshape(code, (ROWS, LANES))
        column = scale_ptr + row * COLUMNS
        u = decode(code, kept, column, n > 0, BITS, SPACING, DTYPE, ROWS)
    u = tl.where(kept, u, 0)
    if BY_CHANNEL:
        channel = channel_of(first, lane, inner, channels)
        scaled = single(widen(u, DTYPE)) * tl.load(deviation_ptr + channel, mask=valid, other=0.0)
        u = narrow(pattern(scaled), DTYPE)
        moved = single(widen(u, DTYPE)) + tl.load(mean_ptr + channel, mask=valid, other=0.0)
        u = narrow(pattern(moved), DTYPE)
    store_tile(out_ptr, first[:, None] + lane, u, valid, whole, EVEN)
    if BITS > 0:
        marked, read_last, read_other, other = marks(
            scale_ptr + row * COLUMNS, n > 0, BITS, SPACING
        )
        if tl.max(marked.to(tl.int32)) > 0:
            tl.debug_barrier()  # what was stored is stored over
            _set_marked(
                out_ptr + first,
                values_ptr + row * size,
                mask_ptr + first // 8,
                n,
                marked,
                read_last,
                read_other,
                other,
                DTYPE,
                BITS,
                FULL_,
                ROWS,
                LANES,
            )


def _unsparsify(
    parts: tuple[Tensor, Tensor, Tensor],
    numel: int,
    dtype: torch.dtype,
    form: Format,
    channels: Channels | None = None,
) -> Tensor:
    values, scale, mask = (part.contiguous() for part in parts)
    out = values.new_empty(numel, dtype=dtype)
    mean, deviation = (channels.mean, channels.scale) if channels else (out, out)
    pointers = out, values, scale if form.bits else mask, mask, mean, deviation

    def how() -> Launch:
        tile = unpack_tile(form)
        codes = values if form.bits else values.view(INT_OF[dtype])
        ends = scale.view(torch.int16) if form.bits else mask
        typed = [out.view(INT_OF[dtype]), codes, ends, *pointers[3:]]
        arguments = block_arguments(numel, dtype, form, tile, channels)
        return programs(form.blocks(numel), tile.rows), typed, arguments

    launch(_unsparsify_kernel, pointers, (numel, dtype, form, shape_of(channels)), how)
    return out


def _fits(values: Tensor, numel: int, dtype: torch.dtype, form: Format) -> bool:
    return fits(dtype, numel, form.block) and (form.bits > 0 or values.dtype == dtype)


def unsparsify(
    values: Tensor, scale: Tensor, mask: Tensor, numel: int, dtype: torch.dtype, form: Format
) -> Tensor:
    """As `reference.unsparsify`."""
    if not _fits(values, numel, dtype, form):
        return reference.unsparsify(values, scale, mask, numel, dtype, form)
    return _unsparsify((values, scale, mask), numel, dtype, form)


def unsparsify_channels(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    mean: Tensor,
    deviation: Tensor,
    inner: int,
    numel: int,
    dtype: torch.dtype,
    form: Format,
) -> Tensor:
    """As `reference.unsparsify_channels`."""
    if not _fits(values, numel, dtype, form) or inner > LARGEST_RUN:
        given = values, scale, mask, mean, deviation, inner, numel, dtype
        return reference.unsparsify_channels(*given, form)
    channels = Channels(mean.contiguous(), deviation.contiguous(), inner)
    return _unsparsify((values, scale, mask), numel, dtype, form, channels)
