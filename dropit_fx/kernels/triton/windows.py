"""Max-pool's indices in Triton: the CUDA implementation of the ops of `windows`, with their bits.

One launch each, which reads its operand once and writes its result once: 9 bytes an element.
Pooling over two dimensions is pooling over three, of which the first has one cell.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels.triton.launch import Launch, launch, programs

TILE = 1024  # elements of a program
_TILE = tl.constexpr(TILE)


@triton.jit
def _origins(period, inner, depth, height, width, WINDOW: tl.constexpr, WIDE: tl.constexpr):
    """The outputs of a program, and the first input coordinates of their windows.

    period: elements of all channels of an image in channels-last order (`inner` of them), of one
    channel otherwise (`inner` is 1). Positions are int32 unless WIDE: division is slow in int64.
    """
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    first = tl.program_id(0).to(tl.int64) * _TILE
    lane = tl.arange(0, _TILE)
    start = first % period
    if not WIDE:
        start = start.to(tl.int32)
    at = (start + lane) // inner
    row = at // width
    plane = row // height
    z = (plane % depth) * STRIDE[0] - PADDING[0]
    y = (row - plane * height) * STRIDE[1] - PADDING[1]
    x = (at - row * width) * STRIDE[2] - PADDING[2]
    return first + lane, z, y, x


@triton.jit
def _encode_kernel(
    indices_ptr,
    codes_ptr,
    numel,
    period,
    inner,
    out_depth,
    out_height,
    out_width,
    in_height,
    in_width,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    KERNEL: tl.constexpr = WINDOW[0]
    DILATION: tl.constexpr = WINDOW[3]
    i, z, y, x = _origins(period, inner, out_depth, out_height, out_width, WINDOW, WIDE)
    index = tl.load(indices_ptr + i, mask=i < numel, other=0)
    if not WIDE:
        index = index.to(tl.int32)
    row = index // in_width
    plane = row // in_height
    code = (plane - z) // DILATION[0]
    code = code * KERNEL[1] + (row - plane * in_height - y) // DILATION[1]
    code = code * KERNEL[2] + (index - row * in_width - x) // DILATION[2]
    tl.store(codes_ptr + i, code.to(tl.uint8), mask=i < numel)


@triton.jit
def _decode_kernel(
    codes_ptr,
    indices_ptr,
    numel,
    period,
    inner,
    out_depth,
    out_height,
    out_width,
    in_height,
    in_width,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    i, z, y, x = _origins(period, inner, out_depth, out_height, out_width, WINDOW, WIDE)
    KERNEL: tl.constexpr = WINDOW[0]
    DILATION: tl.constexpr = WINDOW[3]
    code = tl.load(codes_ptr + i, mask=i < numel, other=0).to(tl.int32)
    z += code // (KERNEL[1] * KERNEL[2]) * DILATION[0]
    y += code // KERNEL[2] % KERNEL[1] * DILATION[1]
    x += code % KERNEL[2] * DILATION[2]
    index = (z * in_height + y) * in_width + x
    tl.store(indices_ptr + i, index.to(tl.int64), mask=i < numel)


def _dense(x: Tensor, dims: int) -> tuple[Tensor, int]:
    """`x` or a copy without gaps, and the elements between neighbours along the last dimension."""
    order = torch.channels_last if dims == 2 else torch.channels_last_3d
    if x.dim() == dims + 2 and not x.is_contiguous() and x.is_contiguous(memory_format=order):
        return x, x.shape[1]
    return x.contiguous(), 1


def geometry(shape: list[int], inner: int, sizes: list[int], *window: list[int]) -> dict[str, Any]:
    """Arguments of both kernels behind `numel`, by name.

    Args:
        shape: spatial, of the output.
        inner: elements between neighbours along the last dimension: 1, or the channels.
        sizes: spatial, of the input.
        window: kernel, stride, padding, dilation.
    """
    period = inner * math.prod(shape)
    out = [1] * (3 - len(shape)) + shape
    fill = (1, 1, 0, 1)
    return {
        "period": period,
        "inner": inner,
        "out_depth": out[0],
        "out_height": out[1],
        "out_width": out[2],
        "in_height": sizes[-2],
        "in_width": sizes[-1],
        "WINDOW": tuple((*[f] * (3 - len(w)), *w) for f, w in zip(fill, window, strict=True)),
        "WIDE": max(period + TILE, math.prod(sizes)) >= 2**31,
    }


def _run(
    kernel: Any, x: Tensor, dtype: torch.dtype, sizes: list[int], *window: list[int]
) -> Tensor:
    dims = len(sizes)
    dense, inner = _dense(x, dims)
    out = torch.empty_like(dense, dtype=dtype)
    if x.numel():
        shape = list(x.shape[-dims:])

        def how() -> Launch:
            arguments = geometry(shape, inner, sizes, *window)
            return programs(x.numel(), TILE), (dense, out), {"numel": x.numel(), **arguments}

        key = x.numel(), inner, *shape, *sizes, *itertools.chain(*window)
        launch(kernel, (dense, out), key, how)
    return out if dense is x else torch.empty_like(x, dtype=dtype).copy_(out)


def encode_window(indices: Tensor, sizes: list[int], *window: list[int]) -> Tensor:
    """As `windows.encode_window_reference`."""
    return _run(_encode_kernel, indices, torch.uint8, sizes, *window)


def decode_window(codes: Tensor, sizes: list[int], *window: list[int]) -> Tensor:
    """As `windows.decode_window_reference`."""
    return _run(_decode_kernel, codes, torch.int64, sizes, *window)
