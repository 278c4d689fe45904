"""Packing: selection, value coder and bit packing in one launch.

One program handles a tile of blocks, a row each (`launch.pack_tile`). Codes become bytes inside it:
no byte a code passes through memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.dtypes import INT_OF
from dropit_fx.kernels.format import Format
from dropit_fx.kernels.seeds import draw_seed, rounding_seed
from dropit_fx.kernels.triton.bits import (
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
    LARGEST_RUN,
    Channels,
    Launch,
    block_arguments,
    fits,
    launch,
    pack_tile,
    programs,
    shape_of,
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
    size,
    k_full,
    k_tail,
    weight_full,
    weight_tail,
    inner,
    channels,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    SPACING: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SAMPLE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FULL_: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`size`: what a full block takes of `values`, in bytes, or elements where BITS is 0."""
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
        kept, rank = select(key, valid, k, KEY_BITS)
        store_codes(mask_ptr + first // 8, kept, n, whole, 1, ROWS, LANES, EVEN)
    start_of = values_ptr + row * size
    if BITS == 0:
        if SAMPLE:
            weight = tl.where(n < block, weight_tail, weight_full)
            raw = narrow(pattern(single(u) * weight[:, None]), DTYPE)
        if FULL_:
            store_tile(start_of[:, None], lane, raw, valid, whole, EVEN)
        else:
            tl.store(start_of[:, None] + (rank - 1), raw, mask=kept)
    else:
        column = scale_ptr + row * COLUMNS
        code = encode(
            u, kept, column, real, seed_ptr, index, BITS, SPACING, STOCHASTIC, COLUMNS, DTYPE
        )
        if FULL_:
            store_codes(start_of, code, k, whole, BITS, ROWS, LANES, EVEN)
        else:
            store_kept_codes(start_of, code, kept, rank, k, BITS)


def _sparsify(
    x: Tensor, form: Format, seed: Tensor | None, channels: Channels | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packs by the greatest magnitudes; at random where there is a seed and nothing is rounded."""
    n, x = x.numel(), x.contiguous()
    values, scale, mask = form.buffers(x)
    sampled = seed is not None and not form.draws
    mean, inverse = (channels.mean, channels.scale) if channels else (x, x)
    pointers = x, values, scale, mask, x if seed is None else seed, mean, inverse

    def how() -> Launch:
        k_full, k_tail = form.kept_counts(n)
        tile = pack_tile(form)
        own = {
            "weight_full": form.block / k_full if k_full else 0.0,
            "weight_tail": n % form.block / k_tail if k_tail else 0.0,
            "STOCHASTIC": form.draws,
            "SAMPLE": sampled,
        }
        codes = values if form.bits else values.view(INT_OF[x.dtype])
        typed = [x.view(INT_OF[x.dtype]), codes, scale.view(torch.int16), *pointers[3:]]
        arguments = block_arguments(n, x.dtype, form, tile, channels)
        return programs(form.blocks(n), tile.rows), typed, own | arguments

    launch(_sparsify_kernel, pointers, (n, x.dtype, form, sampled, shape_of(channels)), how)
    return values, scale, mask


def sparsify(x: Tensor, form: Format, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sparsify`, which also takes float64, blocks above 8192 and whole tensors."""
    if not fits(x.dtype, x.numel(), form.block):
        return reference.sparsify(x, form, seed)
    return _sparsify(x, form, rounding_seed(form, x, seed))


def sparsify_channels(
    x: Tensor, mean: Tensor, inverse: Tensor, inner: int, form: Format, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sparsify_channels`; what is standardised never lies in memory."""
    if not fits(x.dtype, x.numel(), form.block) or inner > LARGEST_RUN:
        return reference.sparsify_channels(x, mean, inverse, inner, form, seed)
    channels = Channels(mean.contiguous(), inverse.contiguous(), inner)
    return _sparsify(x, form, rounding_seed(form, x, seed), channels)


def sample(x: Tensor, form: Format, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.sample`."""
    if not fits(x.dtype, x.numel(), form.block):
        return reference.sample(x, form, seed)
    values, _, mask = _sparsify(x, form, draw_seed(x.device) if seed is None else seed)
    return values, mask
