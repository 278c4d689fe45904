"""Bit streams of small integers, and step functions as their codes: one launch each."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.dispatch import warn_once
from dropit_fx.kernels.dtypes import INT_OF, NUMBER
from dropit_fx.kernels.format import (
    check_borders,
    check_levels,
    check_stream,
    check_uint,
    uint_nbytes,
)
from dropit_fx.kernels.triton.bits import (
    load_stream,
    load_tile,
    single,
    store_codes,
    store_tile,
    widen,
)
from dropit_fx.kernels.triton.launch import CODES, Launch, launch, programs


@triton.jit
def _store_stream(out_ptr, codes, program, count, BITS: tl.constexpr, TILE: tl.constexpr):
    """The codes of one program, (1, TILE), into the one stream of `count`."""
    first = program * TILE
    mine = tl.minimum(count - first, TILE).to(tl.int32) + tl.zeros((1,), tl.int32)
    start = out_ptr + first // 8 * BITS + tl.zeros((1,), tl.int64)
    store_codes(start, codes, mine, first + TILE <= count, BITS, 1, TILE, True)


@triton.jit
def _load_stream(packed_ptr, program, count, BITS: tl.constexpr, TILE: tl.constexpr):
    """The inverse of `_store_stream`, (TILE,)."""
    first = program * TILE
    mine = tl.minimum(count - first, TILE).to(tl.int32) + tl.zeros((1,), tl.int32)
    start = packed_ptr + first // 8 * BITS + tl.zeros((1,), tl.int64)
    return tl.reshape(load_stream(start, mine, BITS, 1, TILE), (TILE,))


@triton.jit
def _pack_kernel(codes_ptr, out_ptr, count, BITS: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = (program * TILE + tl.arange(0, TILE))[None, :]
    codes = load_tile(codes_ptr, i, i < count, (program + 1) * TILE <= count, True)
    _store_stream(out_ptr, codes, program, count, BITS, TILE)


@triton.jit
def _unpack_kernel(packed_ptr, out_ptr, count, BITS: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = program * TILE + tl.arange(0, TILE)
    code = _load_stream(packed_ptr, program, count, BITS, TILE)
    store_tile(out_ptr, i, code.to(tl.uint8), i < count, (program + 1) * TILE <= count, True)


@triton.jit
def _encode_steps_kernel(
    x_ptr,
    out_ptr,
    count,
    BORDERS: tl.constexpr,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """BORDERS: COUNT patterns of float32."""
    program = tl.program_id(0).to(tl.int64)
    i = (program * TILE + tl.arange(0, TILE))[None, :]
    x = single(widen(load_tile(x_ptr, i, i < count, (program + 1) * TILE <= count, True), DTYPE))
    codes = tl.zeros(x.shape, tl.int32)
    for j in tl.static_range(COUNT):
        codes += (x >= single(tl.full((), BORDERS[j], tl.int32))).to(tl.int32)
    codes = tl.where(i < count, codes, 0)
    _store_stream(out_ptr, codes, program, count, BITS, TILE)


@triton.jit
def _decode_steps_kernel(
    packed_ptr,
    out_ptr,
    count,
    LEVELS: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """LEVELS: COUNT patterns of the output's dtype."""
    program = tl.program_id(0).to(tl.int64)
    i = program * TILE + tl.arange(0, TILE)
    code = _load_stream(packed_ptr, program, count, BITS, TILE)
    level = tl.full((TILE,), LEVELS[0], tl.int32)
    for j in tl.static_range(1, COUNT):
        level = tl.where(code >= j, tl.full((), LEVELS[j], tl.int32), level)
    level = level.to(out_ptr.dtype.element_ty)
    store_tile(out_ptr, i, level, i < count, (program + 1) * TILE <= count, True)


def pack_uint(x: Tensor, bits: int) -> Tensor:
    """As `reference.pack_uint`."""
    check_uint(x, bits)
    n = x.numel()
    out = x.new_empty(uint_nbytes(n, bits), dtype=torch.uint8)
    if n:
        both = x.contiguous().view(torch.uint8), out
        how = {"count": n, "BITS": bits, "TILE": CODES}
        launch(_pack_kernel, both, (n, bits), lambda: (programs(n, CODES), both, how))
    return out


def unpack_uint(packed: Tensor, bits: int, numel: int) -> Tensor:
    """As `reference.unpack_uint`."""
    check_uint(packed, bits)
    out = packed.new_empty(numel, dtype=torch.uint8)
    if numel:
        both = packed.contiguous(), out
        how = {"count": numel, "BITS": bits, "TILE": CODES}
        launch(_unpack_kernel, both, (numel, bits), lambda: (programs(numel, CODES), both, how))
    return out


@functools.lru_cache(maxsize=256)  # a table for each nonlinearity: made once, not in each call
def _patterns(values: bytes, dtype: torch.dtype) -> tuple[int, ...]:
    numbers = struct.unpack(f"{len(values) // 8}d", values)
    return tuple(torch.tensor(numbers, dtype=dtype).view(INT_OF[dtype]).tolist())


def _exactly(values: Sequence[float]) -> bytes:
    """What tells numbers apart that are equal: the two zeros."""
    return struct.pack(f"{len(values)}d", *values)


def _known(dtype: torch.dtype) -> bool:
    if dtype not in NUMBER:
        warn_once(str(dtype), f"{dtype} has no CUDA kernel for step functions: PyTorch packs it.")
    return dtype in NUMBER


def encode_steps(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    """As `reference.encode_steps`; compiled anew for each list of borders."""
    check_borders(x.dtype, borders, bits)
    if not _known(x.dtype):
        return reference.encode_steps(x, borders, bits)
    n = x.numel()
    out = x.new_empty(uint_nbytes(n, bits), dtype=torch.uint8)
    if n:
        values, given = x.contiguous(), _exactly(borders)

        def how() -> Launch:
            arguments = {
                "count": n,
                "BORDERS": _patterns(given, torch.float32),
                "COUNT": len(borders),
                "DTYPE": NUMBER[x.dtype],
                "BITS": bits,
                "TILE": CODES,
            }
            return programs(n, CODES), [values.view(INT_OF[x.dtype]), out], arguments

        launch(_encode_steps_kernel, (values, out), (n, x.dtype, bits, given), how)
    return out


def decode_steps(
    packed: Tensor, levels: Sequence[float], bits: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.decode_steps`; compiled anew for each list of levels."""
    check_levels(packed, levels, bits, dtype)
    check_stream(packed, bits, numel)
    if not _known(dtype):
        return reference.decode_steps(packed, levels, bits, numel, dtype)
    out = packed.new_empty(numel, dtype=dtype)
    if numel:
        codes, given = packed.contiguous(), _exactly(levels)

        def how() -> Launch:
            arguments = {
                "count": numel,
                "LEVELS": _patterns(given, dtype),
                "COUNT": len(levels),
                "BITS": bits,
                "TILE": CODES,
            }
            return programs(numel, CODES), [codes, out.view(INT_OF[dtype])], arguments

        launch(_decode_steps_kernel, (codes, out), (numel, dtype, bits, given), how)
    return out
