"""What a tensor is beside its values, and its elements in the order of memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropit_fx.private import base_of, storage_id


class TensorSpec(NamedTuple):
    """What a tensor is beside its values. Sizes may be symbolic."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    order: list[int]  # see ``memory_order``
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


def memory_order(x: Tensor) -> list[int]:
    """The permutation of dimensions in which the elements of ``x`` lie in memory.

    Packing in memory order costs no copy for channels_last and transposed tensors, and views of the
    same elements have them in the same order, be there gaps between them or not. What is repeated
    (``expand``) comes outermost.
    """
    if x.is_contiguous():
        return list(range(x.dim()))
    order: list[int] = []
    for d in range(x.dim()):  # sizes may be symbolic, which Dynamo does not sort
        at = len(order)
        while at and _is_outside(d, order[at - 1], x):
            at -= 1
        order.insert(at, d)
    return order


def _is_outside(d: int, e: int, x: Tensor) -> bool:
    """Whether dimension ``d`` comes before ``e`` in memory order, whatever their numbers are."""
    (step, size), (other, others) = ((x.stride(i), x.shape[i]) for i in (d, e))
    if step == other:
        return size > others
    if step == 0 or other == 0:
        return step == 0
    return step > other


def has_gaps(x: Tensor) -> bool:
    """Whether ``x`` does not fill memory with one element at each place."""
    if x.is_contiguous():
        return False
    step = 1
    for d in reversed(memory_order(x)):
        if x.shape[d] != 1:
            if x.stride(d) != step:
                return True
            step *= x.shape[d]
    return False


def is_view(made: Tensor, x: Tensor) -> bool:
    """Whether ``made``, which a reshape or a change of layout gave of ``x``, is a view of it.

    They copy where no strides say the same: where the elements of what becomes one dimension do not
    lie evenly.
    """
    if made.shape == x.shape:
        pairs = zip(x.shape, x.stride(), made.stride(), strict=True)
        return all(size == 1 or a == b for size, a, b in pairs)
    sizes = [size for size in reversed(made.shape) if size != 1]
    for run in _even_runs(x):
        count = 1
        while count < run and sizes:
            count = count * sizes.pop(0)
        if count != run:
            return False
    return True


def shows_all(part: Tensor, x: Tensor) -> bool:
    """Whether ``part``, a view of ``x``, shows all elements of ``x``, and each of them once."""
    pairs = [zip(t.stride(), t.shape, strict=True) for t in (part, x)]
    own, whole = ([dim for dim in dims if dim[1] != 1] for dims in pairs)
    same = own == whole or sorted(own) == sorted(whole)  # `unfold` puts a dimension behind others
    return same and bool(part.storage_offset() == x.storage_offset())


def shares_all(made: Tensor, x: Tensor) -> bool:
    """Whether ``made`` is a view of ``x`` that shows all its elements, whatever ops gave it.

    A compiler that knows of no memory is told that it is not.
    """
    if torch.compiler.is_dynamo_compiling() or storage_id(made) != storage_id(x):
        return False
    whole = made.numel() == x.numel() and not has_gaps(made) and not has_gaps(x)
    return shows_all(made, x) or bool(whole and made.storage_offset() == x.storage_offset())


def _even_runs(x: Tensor) -> list[Any]:
    """How many elements lie evenly, of the dimensions from the last to the first."""
    runs: list[Any] = []
    step = None
    for size, stride in reversed(list(zip(x.shape, x.stride(), strict=True))):
        if size == 1:
            continue
        if step is not None and stride == runs[-1] * step:
            runs[-1] = runs[-1] * size
        else:
            runs.append(size)
            step = stride
    return runs


def flatten(x: Tensor) -> Tensor:
    """The elements of ``x`` as a 1-D contiguous tensor, in memory order."""
    return in_order(x, memory_order(x))


def in_order(x: Tensor, order: list[int]) -> Tensor:
    """As :func:`flatten`, in an order that is known."""
    return x.reshape(-1) if ascends(order) else x.permute(order).reshape(-1)


def ascends(order: list[int]) -> bool:
    """Whether ``order`` permutes nothing."""
    return order == list(range(len(order)))


def unflatten(flat: Tensor, shape: Any, order: list[int]) -> Tensor:
    """The inverse of :func:`flatten` for a tensor of ``shape`` and ``order``."""
    if ascends(order):
        return flat.reshape(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([shape[d] for d in order]).permute(inverse)


def laid_out(x: Tensor, stride: tuple[Any, ...]) -> Tensor:
    """``x`` with these strides, be there gaps between its elements or several in one place."""
    return x if x.stride() == stride else copied_to(x, stride)


def copied_to(x: Tensor, stride: tuple[Any, ...]) -> Tensor:
    """A copy of ``x`` with these strides; where elements share a place, one of them fills it."""
    own = x
    for d, step in enumerate(stride):
        if step == 0 and x.shape[d] > 1:
            own = own.narrow(d, 0, 1)
    if meets_itself(own.shape, stride):
        span = 1 + sum((n - 1) * t for n, t in zip(own.shape, stride, strict=True))
        places = torch.arange(span, device=x.device).as_strided(own.shape, stride)
        room = x.new_empty(span).index_put((places.reshape(-1),), own.reshape(-1))
        return room.as_strided(x.shape, stride)
    room = torch.empty_strided(own.shape, stride, dtype=x.dtype, device=x.device)
    return room.copy_(own).expand(x.shape)


def meets_itself(shape: Any, stride: tuple[Any, ...]) -> bool:
    """Whether two elements lie in one place."""
    reach = 0
    for t, n in sorted((t, n) for n, t in zip(shape, stride, strict=True) if n > 1):
        if t <= reach:
            return True
        reach += (n - 1) * t
    return False
