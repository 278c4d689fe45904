"""What a launch takes: tiles, warps and grids, and which tensors there is a kernel for.

Grids are one-dimensional: y and z end at 65,535, which one large activation passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropit_fx.kernels.dispatch import warn_once
from dropit_fx.kernels.format import (
    FULL,
    block_count,
    is_codebook,
    kept_in_block,
    split_blocks,
)
from dropit_fx.kernels.triton.bits import DTYPES

MAX_GRID = 2**31 - 1  # programs along x
LARGEST_BLOCK = 8192  # what still fits into the registers of one program
_TILE = 1024  # elements of a warp: 32 a thread, loaded 16 bytes at a time
LARGEST_RUN = 2**31 - 1 - LARGEST_BLOCK  # of one channel: positions inside it are int32
CODES = 2048  # codes that one program of a flat kernel handles, in 4 warps

# Every float operation is one IEEE operation: see `coder`
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


class Tile(NamedTuple):
    """What one program works on: `rows` blocks, each in `lanes` (a power of two, at least 16)."""

    rows: int
    lanes: int
    warps: int


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def pack_tile(keep: int, block: int, bits: int, layout: int, stochastic: bool) -> Tile:
    """The tile of a program that packs blocks of `block` elements: the format of `sparsify`.

    A block of up to 1024 elements lives in one warp, so that sums over it need no barrier; in two
    where a thread would run out of registers: with a codebook, or random numbers beside the values.
    """
    selects = keep < FULL
    crowded = stochastic or (selects and bits == 3 and is_codebook(bits, layout))
    return _tile(block, (1 + crowded) * (1 + (selects and block > _TILE)))


def unpack_tile(block: int) -> Tile:
    """The tile of a program that unpacks."""
    return _tile(block, 2)


def _tile(block: int, share: int) -> Tile:
    """One warp for each 1024 / `share` elements, 16 at most."""
    lanes = max(16, power_of_two(block))
    rows = max(1, _TILE // lanes)
    return Tile(rows, lanes, max(1, min(16, rows * lanes * share // _TILE)))


def programs(count: int, each: int) -> tuple[int]:
    """The grid of programs that handle `each` of `count` things."""
    return ((count + each - 1) // each,)


class Channels(NamedTuple):
    """Mean and scale of each channel, (C,) float32, for elements in runs of `inner` a channel."""

    mean: Tensor
    scale: Tensor
    inner: int


def fits(dtype: torch.dtype, numel: int, block: int) -> bool:
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


def kept_counts(numel: int, keep: int, block: int) -> tuple[int, int]:
    """Kept elements of a full block, and of the tail."""
    _, length, tail = split_blocks(numel, block)
    return kept_in_block(length, keep, block), kept_in_block(tail, keep, block)


def block_grid(numel: int, block: int, tile: Tile) -> tuple[int]:
    """Programs for `numel` elements in blocks of `block`."""
    return programs(block_count(numel, block), tile.rows)
