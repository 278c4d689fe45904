"""What a tensor is beside its values, and its elements in the order of memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropit_fx.private import base_of


class TensorSpec(NamedTuple):
    """What a tensor is beside its values. Sizes may be symbolic."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    order: list[int] | None  # see ``memory_order``
    dtype: torch.dtype
    device: torch.device


def stays(x: Any) -> bool:
    """Whether ``x`` is a parameter, or part of one, as q, k and v of an attention often are."""
    if isinstance(x, Tensor) and not torch.compiler.is_dynamo_compiling():
        x = x if (base := base_of(x)) is None else base
    return isinstance(x, nn.Parameter)


def spec_of(x: Tensor) -> TensorSpec:
    """The spec of ``x``."""
    return TensorSpec(tuple(x.shape), tuple(x.stride()), memory_order(x), x.dtype, x.device)


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation of dimensions that makes ``x`` contiguous, None where there is none.

    Packing in memory order costs no copy for channels_last and transposed tensors.
    """
    if x.is_contiguous():
        return list(range(x.dim()))
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    with torch.no_grad():  # autograd refuses some views
        return order if x.permute(order).is_contiguous() else None


def flatten(x: Tensor) -> Tensor:
    """The elements of ``x`` as a 1-D contiguous tensor, in memory order where ``x`` is dense."""
    return in_order(x, memory_order(x))


def in_order(x: Tensor, order: list[int] | None) -> Tensor:
    """As :func:`flatten`, in an order that is known; None: as ``reshape`` has them."""
    return x.reshape(-1) if order is None or _ascends(order) else x.permute(order).reshape(-1)


def _ascends(order: list[int]) -> bool:
    """Whether ``order`` permutes nothing."""
    return order == list(range(len(order)))


def unflatten(flat: Tensor, shape: Any, order: list[int] | None) -> Tensor:
    """The inverse of :func:`flatten` for a tensor of ``shape`` and ``order``."""
    if order is None or _ascends(order):
        return flat.reshape(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([shape[d] for d in order]).permute(inverse)
