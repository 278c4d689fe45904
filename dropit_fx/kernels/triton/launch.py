"""What a launch takes: tiles, warps and grids, and which tensors there is a kernel for.

Grids are one-dimensional: y and z end at 65,535, which one large activation passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dropit_fx.kernels.dispatch import warn_once
from dropit_fx.kernels.dtypes import NUMBER
from dropit_fx.kernels.format import Format

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


def pack_tile(form: Format) -> Tile:
    """The tile of a program that packs: of those tried on an H100, the fastest.

    A block of up to 1024 elements lives in one warp, so that sums over it need no barrier; in two
    where a thread would run out of registers: with a codebook, or random numbers beside the values;
    or where its codes straddle bytes.
    """
    selects = not form.full
    straddles = form.full and form.bits in (3, 5, 6, 7)
    crowded = form.draws or straddles or (selects and form.bits == 3 and form.is_codebook)
    return _tile(form.block, (1 + crowded) * (1 + (selects and form.block > _TILE)))


def unpack_tile(form: Format) -> Tile:
    """The tile of a program that unpacks; large blocks take more warps, for their registers."""
    return _tile(form.block, 1 + (form.block > _TILE))


def _tile(block: int, share: int) -> Tile:
    """One warp for each 1024 / `share` elements, 16 at most."""
    lanes = max(16, triton.next_power_of_2(block))
    rows = max(1, _TILE // lanes)
    return Tile(rows, lanes, max(1, min(16, rows * lanes * share // _TILE)))


def programs(count: int, each: int) -> tuple[int]:
    """The grid of programs that handle `each` of `count` things."""
    return ((count + each - 1) // each,)


Launch = tuple[tuple[int], Sequence[Tensor], Mapping[str, Any]]  # grid, pointers, the rest by name
_READY: dict[tuple[Any, ...], tuple[Callable[..., Any], tuple[Any, ...]]] = {}
_MOST = 4096  # launches that are remembered


def launch(
    kernel: Any,
    pointers: Sequence[Tensor],
    key: tuple[Any, ...],
    how: Callable[[], Launch],
) -> None:
    """Launches a kernel, from the second time on without Triton's look at each argument.

    Triton asks of every argument whether it is 1, or a multiple of 16: for twenty of them that
    takes longer than many a kernel runs.

    Args:
        kernel: A function under ``triton.jit``, whose first parameters are pointers.
        pointers: What they point to, in order; all on one device.
        key: What all else depends on: for equal keys, ``how`` gives the same but for the tensors.
        how: Gives the grid, the pointers in the dtypes that the kernel is written for, and its
            other arguments and the options of the launch by name.
    """
    aligned = tuple([p.data_ptr() % 16 == 0 for p in pointers])
    whole = id(kernel), key, aligned, pointers[0].get_device()
    if (ready := _READY.get(whole)) is not None:
        run, rest = ready
        run(*pointers, *rest)
        return
    grid, typed, arguments = how()
    compiled = kernel[grid](*typed, **arguments)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_READY) >= _MOST:
            _READY.clear()
        rest = tuple(arguments[name] for name in kernel.arg_names[len(typed) :])
        _READY[whole] = compiled[(*grid, 1, 1)], rest


class Channels(NamedTuple):
    """Mean and scale of each channel, (C,) float32, for elements in runs of `inner` a channel."""

    mean: Tensor
    scale: Tensor
    inner: int


def shape_of(channels: Channels | None) -> tuple[int, int]:
    """What a launch depends on of the channels."""
    return (0, 0) if channels is None else (channels.inner, channels.mean.numel())


def fits(dtype: torch.dtype, numel: int, block: int) -> bool:
    """Whether there is a kernel for it; says so where PyTorch, slower, has to do."""
    if dtype in NUMBER and 0 < block <= LARGEST_BLOCK:
        return numel > 0
    if numel:
        what = "whole tensors" if block == 0 else f"blocks of {block}"
        warn_once(
            str(dtype) if dtype not in NUMBER else what,
            f"{dtype} in {what} has no CUDA kernel: PyTorch packs it, with about 32 bytes an"
            f" element for the time being. Kernels take {', '.join(map(str, NUMBER))} in blocks of"
            f" up to {LARGEST_BLOCK} elements.",
        )
    return False


def block_arguments(
    numel: int, dtype: torch.dtype, form: Format, tile: Tile, channels: Channels | None
) -> dict[str, Any]:
    """What the kernels that pack and unpack blocks are launched with alike, by name."""
    inner, count = shape_of(channels) if channels else (1, 1)
    k_full, k_tail = form.kept_counts(numel)
    return {
        "numel": numel,
        "block": form.block,
        "size": form.stream(k_full),
        "k_full": k_full,
        "k_tail": k_tail,
        "inner": inner,
        "channels": count,
        "DTYPE": NUMBER[dtype],
        "BITS": form.bits,
        "SPACING": form.spacing,
        "BY_CHANNEL": channels is not None,
        "FULL_": form.full,
        "COLUMNS": max(1, form.columns),
        "ROWS": tile.rows,
        "LANES": tile.lanes,
        "EVEN": form.block == tile.lanes,
        "num_warps": tile.warps,
        **EXACT,
    }
