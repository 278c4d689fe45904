"""Saved-tensor hooks that pack: what autograd saves of a run, kept in a few bits.

Floats that a gradient flows through are packed; masks and indices exactly; parameters, what is made
of them alone, constants and what is small stay as they are. What stays and what is packed goes on
to the hooks in force around, where there are some: packed tensors are offloaded, or counted.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dropit_fx.holders import Box
from dropit_fx.kernels.dtypes import FLOATS
from dropit_fx.private import dynamo_skips, version
from dropit_fx.private_hooks import Hooks, in_backward
from dropit_fx.runtime.origins import ACTIVATION, LEAF, origin_of
from dropit_fx.runtime.overrides import transformed
from dropit_fx.runtime.places import view_of, whole
from dropit_fx.runtime.saved_copies import FEW, LARGE, SMALL, Copies, Copy
from dropit_fx.runtime.saved_notes import Notes
from dropit_fx.runtime.tensor_spec import stays


class Held(Box):
    """What autograd holds in the place of a tensor: a packed copy, or the tensor."""

    def __init__(self, x: Tensor, copy: Copy | None, hooks: Hooks | None) -> None:
        self._copy, self._hooks = copy, hooks
        self._view = view_of(x) if copy is not None else None
        x = x if x.grad_fn is None else x.detach()  # a result that holds its node is never freed
        self._kept: Any = None
        self._writes: Tensor | None = x
        if copy is None:
            self._kept = x if hooks is None else hooks[0](x)
        if copy is not None or hooks is not None:
            self._writes = _without_memory(x) if is_plain(x) else None
        self._written = version(x)

    def keep(self, x: Tensor) -> None:
        """Holds the tensor after all: what this was made of."""
        written = self._written
        self.__init__(x, None, self._hooks)  # type: ignore[misc]
        self._written = written

    @property
    def tensors(self) -> list[Any]:
        """The tensors that are held, or what other hooks have made of them."""
        return [self._kept] if self._copy is None else list(self._copy.parts)

    def restored(self) -> Tensor:
        """The tensor, or what its packed copy is read back as."""
        if self._writes is not None and version(self._writes) != self._written:
            self._refuse(self._writes)
        copy = self._copy
        if copy is None or self._view is None:
            kept: Tensor = self._kept if self._hooks is None else self._hooks[1](self._kept)
            return kept
        if copy.is_rounded and torch.is_grad_enabled() and in_backward():
            raise RuntimeError(
                "second derivatives through packed tensors are not supported: the backward runs"
                f" with create_graph=True, and a saved tensor of shape {self._view.shape} is kept"
                f" as {copy.spelled}. Run this forward outside of pack_saved, and without"
                " pack_checkpoints."
            )
        with torch.no_grad():
            return self._view.of(copy.flat(), copy.place)

    def _refuse(self, x: Tensor) -> NoReturn:
        shape = list(self._view.shape if self._view else x.shape)
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: [{x.type()} {shape}] is at version {version(x)}; expected version"
            f" {self._written} instead. It was saved for the backward, by dropit_fx.pack_saved or"
            " pack_checkpoints; leave the operation out, or do it out of place."
        )


def is_plain(x: Tensor) -> bool:
    """Whether a tensor has a storage of its elements, and ops of PyTorch's own."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return plain and x.device.type != "meta"


def _without_memory(x: Tensor) -> Tensor:
    """What counts the writes into ``x``, and holds nothing of it."""
    alias = x.detach()
    alias.data = x.new_empty(0)
    return alias


def unpack(held: Held) -> Tensor:
    """The unpack hook."""
    return held.restored()


dynamo_skips(unpack)


def outside_of_ours(hooks: Hooks | None) -> Hooks | None:
    """Those hooks, or where they pack as well, those around them: what is saved is packed once."""
    while hooks is not None:
        packing = getattr(hooks[0], "__self__", None)
        if not isinstance(packing, Packing):
            return hooks
        hooks = packing.around
    return None


class Packing:
    """The pack hook of one block.

    Args:
        options: Of the codec ``quant``, which keeps floats that need a gradient.
        copies: Those that this block shares.
        hooks: Those in force around it.
        notes: Where what becomes of each storage is noted.
        at_checkpoint: Whether all that is saved is what a checkpointed region is made again from.
    """

    def __init__(
        self,
        options: dict[str, Any],
        copies: Copies,
        hooks: Hooks | None,
        notes: Notes | None = None,
        at_checkpoint: bool = False,
    ) -> None:
        self._options, self._copies, self.around = options, copies, hooks
        self._notes, self._at_checkpoint = notes, at_checkpoint
        self._packed: list[tuple[weakref.ref[Held], weakref.ref[Tensor]]] = []  # at a checkpoint
        self.paused = False

    def pack(self, x: Tensor) -> Held:
        """The pack hook."""
        with torch.no_grad():
            found: Copy | str = "" if self.paused else self._stays(x)
            copy: Copy | None = None
            if not found and not self.paused:
                found = self._copies.copy_of(x, self._options, self.around)
            if isinstance(found, Copy):
                copy, found = found, ""
            held = Held(x, copy, self.around)
            if self._notes is not None and not self.paused:
                self._note(x, copy, found)
            if self._at_checkpoint and copy is not None and copy.is_rounded:
                self._packed.append((weakref.ref(held), weakref.ref(x)))
        return held

    @property
    def rounds(self) -> bool:
        """Whether what is read back of anything may differ."""
        return bool(self._packed)

    def keep_exactly(self, reason: str) -> None:
        """Holds what a checkpoint saved as it is, after all; its region, which runs, has it."""
        packed, self._packed = self._packed, []
        for of_held, of_x in packed:
            held, x = of_held(), of_x()
            if held is not None:
                assert x is not None
                held.keep(x)
                if self._notes is not None:
                    self._note(x, None, reason)

    def _stays(self, x: Tensor) -> str:
        """Why a tensor is kept as it is, or ``""``."""
        if not is_plain(x) or transformed():
            return f"{type(x).__name__} ({x.layout}, {x.device.type}): it has no memory of its own"
        if stays(x):
            return "a parameter, or part of one"
        if x.is_leaf and x.requires_grad:
            return "a leaf whose gradient is asked for"
        if x.is_neg() or x.is_conj():
            return "negated or conjugated when it is read"
        if x.numel() < SMALL and not (x.numel() and x.requires_grad and whole(x).numel >= LARGE):
            return FEW
        if x.requires_grad:
            if x.dtype not in FLOATS:
                return f"{str(x.dtype).removeprefix('torch.')}: no codec packs it"
            origin = origin_of(x, None if self._notes is None else self._notes.names)
            if origin != ACTIVATION:
                return "a copy of a leaf" if origin == LEAF else "made of parameters alone"
        return ""

    def _note(self, x: Tensor, copy: Copy | None, reason: str) -> None:
        assert self._notes is not None
        if copy is None:
            self._notes.keep(x, reason, self._at_checkpoint)
            return
        note = self._notes.note_of(x, self._at_checkpoint)
        note.codecs[copy.spelled] = None
        note.reason = FEW if copy.codec == "keep" else ""
        note.kept_bytes = self._copies.nbytes(x, self.around)


dynamo_skips(Packing.pack)
