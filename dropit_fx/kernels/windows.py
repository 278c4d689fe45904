"""Places in a pooled tensor as places in the pooling window: the ops of max-pool's indices.

``indices`` (int64) are flat positions in an input of spatial ``sizes``, in the shape of the pooled
output: its trailing dimensions are those of the lists, two or three. ``codes`` (uint8) are offsets
inside the window of each output, the last dimension running fastest; the window has at most 256
cells. Both ops keep strides. In eager mode each op is one kernel; a compiler fuses the formulas.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dropit_fx.kernels.cpu import INT, INT64, Array, Data, load
from dropit_fx.kernels.dispatch import define

Sizes = list[int]


_SIGNATURES = {
    "dropit_encode_window": [Data, Data, Array(INT64), INT],
    "dropit_decode_window": [Data, Data, Array(INT64), INT],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C kernels; None where this installation has none."""
    return load("_windows", _SIGNATURES)


def _origin(like: Tensor, d: int, stride: Sizes, padding: Sizes) -> Tensor:
    """First input coordinate of each window of ``like`` along dimension ``d``, to broadcast."""
    dims = len(stride)
    n = like.shape[d - dims]
    first = torch.arange(n, device=like.device, dtype=torch.int32)
    return (first * stride[d] - padding[d]).reshape([n] + [1] * (dims - 1 - d))


def _index_dtype(sizes: Sizes) -> torch.dtype:
    return torch.int32 if math.prod(sizes) < 2**31 else torch.int64


# Both run while activations are held: few temporaries, in four bytes, written in place.


def encode_window_reference(
    indices: Tensor, sizes: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    """In PyTorch: the oracle, and what compilers fuse."""
    code, weight = torch.zeros_like(indices, dtype=torch.uint8), 1
    indices = indices.to(_index_dtype(sizes))
    for d in reversed(range(len(kernel))):
        offset = (indices % sizes[d]).sub_(_origin(code, d, stride, padding))
        offset.floor_divide_(dilation[d]).mul_(weight)
        code.add_(offset.to(torch.uint8))
        indices = indices.floor_divide_(sizes[d])
        weight *= kernel[d]
    return code


def decode_window_reference(
    codes: Tensor, sizes: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    """In PyTorch: the oracle, and what compilers fuse."""
    indices, weight = torch.zeros_like(codes, dtype=torch.int64), 1
    for d in reversed(range(len(kernel))):
        coordinate = (codes % kernel[d]).to(_index_dtype(sizes)).mul_(dilation[d])
        indices.add_(coordinate.add_(_origin(codes, d, stride, padding)).mul_(weight))
        codes = codes // kernel[d]
        weight = weight * sizes[d]
    return indices


def _in_memory(x: Tensor, dims: int) -> Sizes | None:
    """The outputs as ``windows.c`` takes them: outer, planes, rows, columns, inner; or None."""
    places = [1] * (3 - dims) + list(x.shape[-dims:])
    if x.is_contiguous():
        return [math.prod(x.shape[:-dims]), *places, 1]
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    if x.dim() == dims + 2 and x.is_contiguous(memory_format=last):
        return [x.shape[0], *places, x.shape[1]]
    return None


def _numbers(x: Tensor, window: tuple[Sizes, ...]) -> Sizes | None:
    """What the C functions are told; of a third dimension too, where there are two."""
    dims = len(window[0])
    found = _in_memory(x, dims) if math.prod(window[0]) < 2**28 else None  # windows are in int32
    if found is None:
        return None
    for values, none in zip(window, (1, 1, 1, 0, 1), strict=True):
        found += [none] * (3 - dims) + list(values)
    return found


def _encode_window(indices: Tensor, *window: Sizes) -> Tensor:
    return _in_c("dropit_encode_window", encode_window_reference, torch.uint8, indices, window)


def _decode_window(codes: Tensor, *window: Sizes) -> Tensor:
    return _in_c("dropit_decode_window", decode_window_reference, torch.int64, codes, window)


def _in_c(
    name: str,
    formula: Callable[..., Tensor],
    dtype: torch.dtype,
    x: Tensor,
    window: tuple[Sizes, ...],
) -> Tensor:
    """What a C function makes of ``x``; the formula, where there is none, or for other layouts."""
    lib, numbers = library(), _numbers(x, window)
    if lib is None or numbers is None:
        return formula(x, *window)
    out = torch.empty_like(x, dtype=dtype)
    getattr(lib, name)(x, out, numbers, torch.get_num_threads())
    return out


_WINDOW = "SymInt[] sizes, int[] kernel, int[] stride, int[] padding, int[] dilation"

define(
    f"encode_window(Tensor indices, {_WINDOW}) -> Tensor",
    encode_window_reference,
    lambda indices, *window: torch.empty_like(indices, dtype=torch.uint8),
    _encode_window,
)
define(
    f"decode_window(Tensor codes, {_WINDOW}) -> Tensor",
    decode_window_reference,
    lambda codes, *window: torch.empty_like(codes, dtype=torch.int64),
    _decode_window,
)
