"""Places in a pooled tensor as places in the pooling window: the ops of max-pool's indices.

``indices`` (int64) are flat positions in an input of spatial ``sizes``, in the shape of the pooled
output: its trailing dimensions are those of the lists, two or three. ``codes`` (uint8) are offsets
inside the window of each output, the last dimension running fastest; the window has at most 256
cells. Both ops keep strides. The formulas run in PyTorch on CPUs and wherever a compiler fuses
them; on CUDA in eager mode each op is one kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dropit_fx.kernels.dispatch import define

Sizes = list[int]


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


_WINDOW = "SymInt[] sizes, int[] kernel, int[] stride, int[] padding, int[] dilation"

define(
    f"encode_window(Tensor indices, {_WINDOW}) -> Tensor",
    encode_window_reference,
    lambda indices, *window: torch.empty_like(indices, dtype=torch.uint8),
)
define(
    f"decode_window(Tensor codes, {_WINDOW}) -> Tensor",
    decode_window_reference,
    lambda codes, *window: torch.empty_like(codes, dtype=torch.int64),
)
