"""Packed copies of saved tensors: one for all views of the same elements of a storage.

A copy is known by the storage, how often it was written, and the place in it. It lives as long as a
saved tensor that is read back from it; what it was made of is not held.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropit_fx.codecs import CODEC
from dropit_fx.codecs.mink import format_of
from dropit_fx.kernels import may_hold_nan
from dropit_fx.kernels.dtypes import FLOATS
from dropit_fx.kernels.format import index_bits
from dropit_fx.private import storage_id, version
from dropit_fx.private_hooks import Hooks, weak_storage
from dropit_fx.runtime.copies import spelled
from dropit_fx.runtime.places import Place, place_of, take, whole

SMALL = 1024  # elements: below, a tensor is kept as it is,
LARGE = 2 * SMALL  # and part of a storage of so many as a copy of itself
FEW = f"fewer than {SMALL:,} elements"
NOT_FINITE = "holds NaN or infinity"
NO_GAIN = "would take more room packed"
_GLANCE = 64  # elements that are looked at first
Settings = dict[str, Any]


class Copy:
    """The elements of one place, packed.

    Attributes:
        place: Of the elements, in the storage that they were in.
        codec: Of ``CODEC``, by name.
        options: All its options.
    """

    def __init__(
        self, x: Tensor, place: Place, codec: str, options: Settings, levels: Tensor | None
    ) -> None:
        self.place, self.codec, self.options = place, codec, options
        self.dtype = x.dtype
        flat = take(x, place)
        if levels is not None:
            flat = flat == levels[1]
        if codec == "keep":
            flat = flat.clone()
        parts = CODEC[codec].pack(flat, options)
        self.parts: tuple[Any, ...] = parts if levels is None else (*parts, levels)
        self.nbytes = sum(part.nbytes for part in self.parts)
        self._two_valued = levels is not None
        self.give_back: Callable[[Any], Tensor] | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether what is read back may differ."""
        return not CODEC[self.codec].lossless(self.options)

    @property
    def is_finite(self) -> bool:
        """Whether no block's scale says that it may hold NaN or infinity."""
        if not self.is_rounded:
            return True
        form = format_of(dict(self.options))
        return not may_hold_nan(self.parts[1].view(-1, form.columns), form).any().item()

    @property
    def spelled(self) -> str:
        """The codec as people read it."""
        return spelled(self.codec, self.options)

    def hand_to(self, hooks: Hooks | None) -> None:
        """Keeps the parts as other saved-tensor hooks have them: on another device, say."""
        if hooks is not None:
            pack, self.give_back = hooks
            self.parts = tuple(pack(part) for part in self.parts)

    def become(self, other: Copy) -> None:
        """From now on, read back from a copy of all that this one is a part of."""
        self.__dict__.update(other.__dict__)

    def flat(self) -> Tensor:
        """The elements of the place, 1-D."""
        give_back = self.give_back
        parts = self.parts if give_back is None else tuple(map(give_back, self.parts))
        numel, codec = self.place.numel, CODEC[self.codec]
        if not self._two_valued:
            return codec.unpack(parts, self.options, numel, self.dtype)
        low, high = parts[-1]
        which = codec.unpack(parts[:-1], self.options, numel, torch.bool)
        return torch.where(which, high, low)


class _Source:
    """One storage, written so often: its copies."""

    def __init__(self, x: Tensor) -> None:
        self.storage = weak_storage(x)
        self.copies: dict[Place, weakref.ref[Copy]] = {}

    def alive(self) -> list[Copy]:
        return [copy for ref in self.copies.values() if (copy := ref()) is not None]


class Copies:
    """The copies that saved tensors of one forward share."""

    def __init__(self) -> None:
        self._sources: dict[tuple[Any, ...], _Source] = {}
        self._room = 64  # entries before those of storages that are gone are let go

    def copy_of(self, x: Tensor, options: Settings, hooks: Hooks | None) -> Copy | str:
        """The copy from which ``x`` is read back, or why there is none.

        Args:
            x: A strided tensor with elements.
            options: Of the codec ``quant``, for floats that need a gradient; the rest is exact.
            hooks: Those that a saved tensor would go through without this.
        """
        place = place_of(x)
        key = storage_id(x), version(x), x.dtype, hooks and hooks[0]
        source = self._sources.get(key)
        if source is None or source.storage.expired():
            self._forget()
            source = self._sources[key] = _Source(x)
        everything = whole(x)
        for known in (place, everything):
            found = source.copies.get(known, lambda: None)()
            if found is not None:
                return found
        alive = [copy for copy in source.alive() if copy.codec != "keep"]
        # together never larger than one copy of all
        if sum(copy.place.numel for copy in alive) + place.numel > everything.numel:
            place = everything
        made = _pack(x, place, options)
        if isinstance(made, str):
            return made
        made.hand_to(hooks)
        if place == everything:
            for copy in alive:
                copy.become(made)
        source.copies[place] = weakref.ref(made)
        return made

    def nbytes(self, x: Tensor, hooks: Hooks | None) -> int:
        """Bytes of all copies of the storage of ``x``."""
        source = self._sources.get((storage_id(x), version(x), x.dtype, hooks and hooks[0]))
        alive = source.alive() if source else []
        return sum({id(copy.parts): copy.nbytes for copy in alive}.values())

    def _forget(self) -> None:
        if len(self._sources) >= self._room:
            self._sources = {k: s for k, s in self._sources.items() if not s.storage.expired()}
            self._room = max(64, 2 * len(self._sources))


def _pack(x: Tensor, place: Place, options: Settings) -> Copy | str:
    codec, levels = "quant", None
    if place.numel < SMALL:  # part of something larger, which it must not keep alive
        return Copy(x, place, "keep", {}, None)
    if x.dtype not in FLOATS or not x.requires_grad:
        exact = _exactly(x, place)
        if isinstance(exact, str):
            return exact
        codec, options, levels = exact
    nbytes = CODEC[codec].nbytes(place.numel, x.dtype, options)
    if nbytes >= place.numel * x.dtype.itemsize:
        return NO_GAIN
    copy = Copy(x, place, codec, options, levels)
    return copy if copy.is_finite else NOT_FINITE


def _exactly(x: Tensor, place: Place) -> tuple[str, Settings, Tensor | None] | str:
    """A codec that loses nothing of what no gradient flows through, or why there is none.

    The values are looked at on a CPU only: elsewhere that waits for the device.
    """
    if x.dtype == torch.bool:
        return "bitmask", {"bits": 1}, None
    if x.device.type == "cpu" and x.dtype in (torch.int32, torch.int64):
        low, high = torch.aminmax(take(x, place))
        if low >= 0:
            return "bitmask", {"bits": min(32, index_bits(int(high) + 1))}, None
    if x.device.type == "cpu" and x.dtype in FLOATS:  # dropout's mask is one of two numbers
        flat = take(x, place)
        low, high = torch.aminmax(flat[:_GLANCE])
        for some in (flat[:_GLANCE], flat):
            if not bool(((some == low) | (some == high)).all()):
                break
        else:
            return "bitmask", {"bits": 1}, torch.stack((low, high))
    if x.is_floating_point():
        return "no gradient flows through it: an input, a table or a statistic"
    return f"{str(x.dtype).removeprefix('torch.')}: kept as it is"
