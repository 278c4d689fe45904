"""Mean and deviation of each channel: what a tensor is packed around, and in units of."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from dropit_fx.kernels.cpu import FLOAT, INT, INT64, Data, load
from dropit_fx.kernels.dtypes import NUMBER

TINY = torch.finfo(torch.float32).tiny  # in the place of a norm's epsilon
_DTYPES = (torch.float32, torch.bfloat16)  # that channels.c knows
_SIGNATURES = {"dropit_statistics": [Data] * 3 + [INT64] * 3 + [INT, FLOAT, INT]}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C kernel; None where this installation has none."""
    return load("_channels", _SIGNATURES)


def has_kernel(x: Tensor) -> bool:
    """Whether :func:`statistics` knows ``x``."""
    return x.is_cuda or (x.dtype in _DTYPES and library() is not None)


def finite_statistics(mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """0 and 1 for a channel that is not finite, or whose variance is not: it stays as it is."""
    finite = inverse > 0
    return torch.where(finite, mean, 0.0), torch.where(finite, inverse, 1.0)


def statistics(x: Tensor, flat: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of each channel: ``(C,)`` float32; of one not finite, 0 and 1.

    Args:
        x: Not empty; channels are dimension 1.
        flat: Its elements in memory order, where run r of ``inner`` is of channel r % C.
        inner: Elements of a run.

    Raises:
        MemoryError: On a CPU, there is no room for the sums.
    """
    if x.is_cuda:
        mean, inverse = torch.batch_norm_stats(x, TINY)
        return finite_statistics(mean.float(), inverse.float())  # of float64 they are float64
    channels, lib = x.shape[1], library()
    assert lib is not None
    mean, inverse = (flat.new_empty(channels, dtype=torch.float32) for _ in range(2))
    sizes = flat.numel() // (channels * inner), channels, inner
    how = NUMBER[x.dtype], TINY, torch.get_num_threads()
    if lib.dropit_statistics(flat, mean, inverse, *sizes, *how):
        raise MemoryError("dropit_fx: no memory for the sums of channels")
    return mean, inverse
