"""Packing: selection, value coder and bit packing in one launch.

One program handles a tile of blocks, a row each (`launch.pack_tile`). Codes become bytes inside it:
no byte a code passes through memory.
"""

# Kernel arguments have no types that a type checker knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.format import (
    FULL,
    SYMMETRIC,
    block_count,
    check_format,
    codes_nbytes,
    kept,
    mask_nbytes,
    scale_columns,
    uint_nbytes,
)
from dropit_fx.kernels.seeds import draw_seed
from dropit_fx.kernels.triton.bits import (
    DTYPES,
    INT_OF,
    channel_of,
    draw,
    load_tile,
    narrow,
    pattern,
    rows_of,
    single,
    store_codes,
    store_tile,
    widen,
)
from dropit_fx.kernels.triton.coder import encode
from dropit_fx.kernels.triton.launch import (
    EXACT,
    LARGEST_RUN,
    Channels,
    block_grid,
    fits,
    kept_counts,
    pack_tile,
)
from dropit_fx.kernels.triton.select import select, store_kept_codes


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
    row, first, n, k, whole = rows_of(numel, block, k_full, k_tail, ROWS)
    lane = tl.arange(0, LANES)[None, :]
    real = n > 0  # the last program may have rows to spare
    valid = lane < n[:, None]
    index = first[:, None] + lane
    raw = load_tile(x_ptr, index, valid, whole, EVEN)
    u = widen(raw, DTYPE)
    if BY_CHANNEL:
        channel = channel_of(first, lane, inner, channels)
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
        kept = select(key, valid, k, KEY_BITS)
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
        column = scale_ptr + row * COLUMNS
        code = encode(u, kept, k, column, real, seed_ptr, index, BITS, LAYOUT, STOCHASTIC, COLUMNS)
        if FULL_:
            store_codes(start_of, code, k, whole, BITS, ROWS, LANES, EVEN)
        else:
            store_kept_codes(start_of, code, kept, rank, k, BITS)


def _launch_sparsify(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    form: tuple[int, int, int, int],
    sampled: bool = False,
    channels: Channels | None = None,
) -> None:
    keep, block, bits, layout = form
    n = x.numel()
    k_full, k_tail = kept_counts(n, keep, block)
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
    channels: Channels | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keep, block, bits, layout = form
    if not (stochastic and bits):
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
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
    if not fits(x.dtype, x.numel(), block):
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
    if not fits(x.dtype, x.numel(), block) or inner > LARGEST_RUN:
        return reference.sparsify_channels(x, mean, inverse, inner, *form, stochastic, seed)
    channels = Channels(mean.contiguous(), inverse.contiguous(), inner)
    return _sparsify(x, form, stochastic, seed, channels)


def sample(x: Tensor, keep: int, block: int, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.sample`."""
    check_format(keep, block)
    if not fits(x.dtype, x.numel(), block):
        return reference.sample(x, keep, block, seed)
    seed = draw_seed(x.device) if seed is None else seed
    x = x.contiguous()
    mask = x.new_empty(mask_nbytes(x.numel(), keep), dtype=torch.uint8)
    values = x.new_empty(kept(x.numel(), keep, block))
    scale = x.new_empty(0, dtype=torch.bfloat16)
    _launch_sparsify(x, values, scale, mask, seed, (keep, block, 0, SYMMETRIC), sampled=True)
    return values, mask
