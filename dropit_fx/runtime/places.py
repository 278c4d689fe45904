"""Where the elements of a view lie in its storage, and the view made again of these elements alone.

Views of one storage that have the same elements, in whatever shape, have the same place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dropit_fx.runtime.tensor_spec import meets_itself


class Place(NamedTuple):
    """Elements of a storage: ``offset``, and sizes with their strides, the widest first.

    Dimensions that follow each other in memory are one, and no two elements are the same.
    """

    offset: int
    dims: tuple[tuple[int, int], ...]  # (size, stride)

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return math.prod(size for size, _ in self.dims)


def place_of(x: Tensor) -> Place:
    """The place of a strided ``x`` with elements; of one that overlaps itself, all it spans."""
    merged: list[tuple[int, int]] = []
    known = [(t, n) for n, t in zip(x.shape, x.stride(), strict=True) if n != 1 and t]
    if meets_itself([n for _, n in known], tuple(t for t, _ in known)):
        span = 1 + sum((n - 1) * t for t, n in known)
        return Place(int(x.storage_offset()), ((span, 1),))
    for stride, size in sorted(known, reverse=True):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return Place(int(x.storage_offset()), tuple(merged) or ((1, 1),))


def whole(x: Tensor) -> Place:
    """All of the storage of ``x``."""
    return Place(0, ((x.untyped_storage().nbytes() // x.dtype.itemsize, 1),))


def take(x: Tensor, place: Place) -> Tensor:
    """The elements at a place of the storage of ``x``, 1-D and contiguous."""
    sizes, strides = zip(*place.dims, strict=True)
    return torch.as_strided(x.detach(), sizes, strides, place.offset).reshape(-1)


class View(NamedTuple):
    """A view of a storage, without the storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, flat: Tensor, place: Place) -> Tensor:
        """The view again, where ``flat`` is what :func:`take` gave of a place that it lies in."""
        if place.offset == 0 and len(place.dims) == 1 and place.dims[0][1] == 1:
            return flat.as_strided(self.shape, self.stride, self.offset)
        own, room = [], 1  # (stride before, stride in flat), the narrowest first
        for size, stride in reversed(place.dims):
            own.append((stride, room))
            room *= size
        strides = []
        for stride in self.stride:
            before, now = max((pair for pair in own if pair[0] <= stride), default=(1, 0))
            strides.append(stride // before * now)
        return flat.as_strided(self.shape, strides, 0)


def view_of(x: Tensor) -> View:
    """How ``x`` looks at its storage."""
    return View(tuple(x.shape), tuple(x.stride()), int(x.storage_offset()))
