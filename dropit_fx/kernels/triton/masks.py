"""One-bit slopes in Triton: the CUDA implementation of the ops of `masks`, with their bits.

Each reads its operands once and writes its result once, in one launch. float64 runs in PyTorch,
which is said once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropit_fx.kernels.dispatch import warn_once
from dropit_fx.kernels.dtypes import NUMBER
from dropit_fx.kernels.format import uint_nbytes
from dropit_fx.kernels.masks import apply_mask_reference, check_mask, pack_between_reference
from dropit_fx.kernels.triton.launch import Launch, launch, programs

TILE = 4096  # elements of a program: whole bytes of the mask


# bfloat16 is converted by hand: Triton's interpreter, which the tests use, rounds it otherwise.


@triton.jit
def _to_single(x):
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _from_single(x, dtype: tl.constexpr):
    """To the nearest value of `dtype`, of two the even one."""
    if dtype == tl.bfloat16:
        u = x.to(tl.int32, bitcast=True)
        nearest = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        narrow = tl.where(x == x, nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def _pack_between_kernel(x_ptr, bits_ptr, numel, low, high, TILE: tl.constexpr):
    """Bits of `x`; a bound that is NaN bounds nothing."""
    first = tl.program_id(0).to(tl.int64) * TILE
    byte = tl.arange(0, TILE // 8)
    member = tl.arange(0, 8)
    i = first + byte[:, None] * 8 + member[None, :]
    inside = i < numel
    x = _to_single(tl.load(x_ptr + i, mask=inside, other=0))
    outside = (x <= low) | (x >= high)
    bit = ((inside & (outside == 0)).to(tl.int32)) << member[None, :]
    at = first // 8 + byte
    tl.store(bits_ptr + at, tl.sum(bit, 1).to(tl.uint8), mask=at * 8 < numel)


@triton.jit
def _apply_mask_kernel(
    bits_ptr, grad_ptr, out_ptr, numel, off, SCALED: tl.constexpr, TILE: tl.constexpr
):
    """`grad` where its bit is set; elsewhere `off` times it if SCALED, else 0."""
    first = tl.program_id(0).to(tl.int64) * TILE
    byte = tl.arange(0, TILE // 8)
    member = tl.arange(0, 8)
    i = first + byte[:, None] * 8 + member[None, :]
    at = first // 8 + byte
    mask = tl.load(bits_ptr + at, mask=at * 8 < numel, other=0).to(tl.int32)
    grad = tl.load(grad_ptr + i, mask=i < numel, other=0)
    if SCALED:
        other = _from_single(_to_single(grad) * off, grad.dtype)
    else:
        other = tl.zeros_like(grad)
    kept = (mask[:, None] >> member[None, :]) & 1
    tl.store(out_ptr + i, tl.where(kept != 0, grad, other), mask=i < numel)


def _known(dtype: torch.dtype) -> bool:
    if dtype not in NUMBER:
        warn_once(
            f"masks of {dtype}",
            f"masks of {dtype} run in PyTorch, with about 19 bytes an element of temporaries:"
            " the CUDA kernels know float32, bfloat16 and float16",
        )
    return dtype in NUMBER


def _rounded(value: float | None, dtype: torch.dtype) -> float:
    """As PyTorch rounds a number that it compares or multiplies with a tensor; None: NaN."""
    return torch.tensor(math.nan if value is None else value, dtype=dtype).item()


def pack_between(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """As `masks.pack_between_reference`."""
    if not _known(x.dtype):
        return pack_between_reference(x, low, high)
    out = x.new_empty(uint_nbytes(x.numel(), 1), dtype=torch.uint8)
    if x.numel():
        both = x.contiguous(), out

        def how() -> Launch:
            bounds = {"low": _rounded(low, x.dtype), "high": _rounded(high, x.dtype)}
            return programs(x.numel(), TILE), both, {"numel": x.numel(), **bounds, "TILE": TILE}

        launch(_pack_between_kernel, both, (x.numel(), x.dtype, low, high), how)
    return out


def apply_mask(bits: Tensor, grad: Tensor, off: float) -> Tensor:
    """As `masks.apply_mask_reference`."""
    check_mask(bits, grad)
    if not _known(grad.dtype):
        return apply_mask_reference(bits, grad, off)
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    if grad.numel():
        all_three = bits.contiguous(), grad, out

        def how() -> Launch:
            n, factor = grad.numel(), _rounded(off, torch.float32)
            arguments = {"numel": n, "off": factor, "SCALED": off != 0, "TILE": TILE}
            return programs(n, TILE), all_three, arguments

        launch(_apply_mask_kernel, all_three, (grad.numel(), grad.dtype, off), how)
    return out
