"""Unpacking: the inverse of `sparsify`, one launch."""

# Kernel arguments have no types that a type checker knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.format import FULL, check_format, scale_columns, uint_nbytes
from dropit_fx.kernels.triton.bits import (
    DTYPES,
    INT_OF,
    channel_of,
    code_at,
    load_tile,
    narrow,
    pattern,
    rows_of,
    single,
    store_tile,
    widen,
)
from dropit_fx.kernels.triton.coder import decode
from dropit_fx.kernels.triton.launch import (
    EXACT,
    LARGEST_RUN,
    Channels,
    block_grid,
    fits,
    kept_counts,
    unpack_tile,
)


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
    row, first, n, k, whole = rows_of(numel, block, k_full, k_tail, ROWS)
    lane = tl.arange(0, LANES)[None, :]
    valid = lane < n[:, None]
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
        column = scale_ptr + row * COLUMNS
        u = decode(code, kept, column, n > 0, BITS, LAYOUT, DTYPE, ROWS)
    u = tl.where(kept, u, 0)
    if BY_CHANNEL:
        channel = channel_of(first, lane, inner, channels)
        scaled = single(widen(u, DTYPE)) * tl.load(deviation_ptr + channel, mask=valid, other=0.0)
        u = narrow(pattern(scaled), DTYPE)
        moved = single(widen(u, DTYPE)) + tl.load(mean_ptr + channel, mask=valid, other=0.0)
        u = narrow(pattern(moved), DTYPE)
    store_tile(out_ptr, first[:, None] + lane, u, valid, whole, EVEN)


def _unsparsify(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    numel: int,
    dtype: torch.dtype,
    form: tuple[int, int, int, int],
    channels: Channels | None,
) -> Tensor:
    keep, block, bits, layout = form
    out = values.new_empty(numel, dtype=dtype)
    k_full, k_tail = kept_counts(numel, keep, block)
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
    if not fits(dtype, numel, block) or (bits == 0 and values.dtype != dtype):
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
    if not fits(dtype, numel, block) or inner > LARGEST_RUN or whole:
        given = values, scale, mask, mean, deviation, inner, numel, dtype
        return reference.unsparsify_channels(*given, *form)
    channels = Channels(mean.contiguous(), deviation.contiguous(), inner)
    return _unsparsify(values, scale, mask, numel, dtype, form, channels)
