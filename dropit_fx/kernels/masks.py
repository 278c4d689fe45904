"""One-bit slopes without a byte per element in between: the ops of relu and its relatives.

A bit is set where ``x`` lies strictly between ``low`` and ``high`` (None: no bound), and for NaN,
as in ATen's formulas. ``apply_mask`` gives ``grad`` where the bit is set, ``off * grad`` elsewhere,
and exactly 0 where ``off`` is 0. Both take 1-D tensors. ``off`` is rounded to float32, bounds to
the dtype of ``x``; only the C kernel for bfloat16 takes bounds as float32.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.cpu import FLOAT, INT, INT64, Data, load
from dropit_fx.kernels.dispatch import define
from dropit_fx.kernels.dtypes import NUMBER
from dropit_fx.kernels.format import uint_nbytes

_DTYPES = (torch.float32, torch.bfloat16)  # that masks.c knows
_SIGNATURES = {
    "dropit_between": [Data, Data, INT64, INT, FLOAT, FLOAT, INT],
    "dropit_apply": [Data, Data, Data, INT64, INT, FLOAT, INT],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C kernels; None where this installation has none."""
    return load("_masks", _SIGNATURES)


def between(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """The bits of ``pack_between``, a bool each."""
    outside = torch.zeros_like(x, dtype=torch.bool) if low is None else x <= low
    return ~(outside if high is None else outside | (x >= high))


def masked(mask: Tensor, grad: Tensor, off: float) -> Tensor:
    """What ``apply_mask`` gives, of bools."""
    return torch.where(mask, grad, grad * off if off else torch.zeros_like(grad))


def pack_between_reference(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """In PyTorch: the oracle, and what runs where there is no C."""
    return reference.pack_uint(between(x, low, high), 1)


def apply_mask_reference(bits: Tensor, grad: Tensor, off: float) -> Tensor:
    """In PyTorch: the oracle, and what runs where there is no C."""
    return masked(reference.unpack_uint(bits, 1, grad.numel()) != 0, grad, off)


def _fake_bits(x: Tensor, *bounds: float | None) -> Tensor:
    return x.new_empty(uint_nbytes(x.numel(), 1), dtype=torch.uint8)


def _pack_between(x: Tensor, low: float | None, high: float | None) -> Tensor:
    lib = library()
    if lib is None or x.dtype not in _DTYPES:
        return pack_between_reference(x, low, high)
    out = _fake_bits(x)
    low, high = (math.nan if b is None else b for b in (low, high))  # nothing is less than NaN
    dtype, threads = NUMBER[x.dtype], torch.get_num_threads()
    lib.dropit_between(x.contiguous(), out, x.numel(), dtype, low, high, threads)
    return out


def check_mask(bits: Tensor, grad: Tensor) -> None:
    """Raises ValueError where there is not one bit for each element."""
    if bits.numel() != uint_nbytes(grad.numel(), 1):
        raise ValueError(f"{bits.numel()} bytes are no mask of {grad.numel()} elements")


def _apply_mask(bits: Tensor, grad: Tensor, off: float) -> Tensor:
    check_mask(bits, grad)
    lib = library()
    known = grad.dtype == torch.float32 or (grad.dtype == torch.bfloat16 and off == 0)
    if lib is None or not known:
        return apply_mask_reference(bits, grad, off)
    bits, grad = bits.contiguous(), grad.contiguous()
    out = torch.empty_like(grad)
    dtype, threads = NUMBER[grad.dtype], torch.get_num_threads()
    lib.dropit_apply(bits, grad, out, grad.numel(), dtype, off, threads)
    return out


define(
    "pack_between(Tensor x, float? low, float? high) -> Tensor",
    pack_between_reference,
    _fake_bits,
    _pack_between,
)
define(
    "apply_mask(Tensor bits, Tensor grad, float off) -> Tensor",
    apply_mask_reference,
    lambda bits, grad, off: torch.empty_like(grad, memory_format=torch.contiguous_format),
    _apply_mask,
)
