"""The float dtypes that are packed, and what the kernels call them."""

from __future__ import annotations

import torch
from torch import Tensor

# Integers of the same width: of their bit patterns
INT_OF = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
FLOATS = tuple(INT_OF)
NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of what C and Triton know


def check_float(dtype: torch.dtype) -> None:
    """Raises TypeError for what is not packed by value."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype {dtype}: must be one of {', '.join(map(str, FLOATS))}")


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in ``dtype``, where finite values beyond its greatest number become that number."""
    top = torch.finfo(dtype).max
    if torch.finfo(x.dtype).max <= top:
        return x.to(dtype, copy=True)
    x = x.to(torch.promote_types(x.dtype, dtype))  # in which `top` is a number
    return torch.where(x.isinf(), x, x.clamp(-top, top)).to(dtype)
