"""What holds numbers: tensors, arrays and generators, noted with what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from dropit_fx.capture.untouched.parts import Change, Part
from dropit_fx.private import storage_id, unsafe_preserve_version_counter, version


class Held(Part):
    def __init__(self, owner: Tensor, module: str, path: str, copied: bool) -> None:
        self.copy = _cloned(owner) if copied else None
        self.alias: Tensor | None = None
        self.preserved: AbstractContextManager[None] | None = None
        with suppress(Exception):  # no storage, no version: a tensor of another kind
            self.alias = owner.detach()
            self.preserved = unsafe_preserve_version_counter(owner)
        super().__init__(owner, module, path)

    def read(self) -> dict[Any, Any]:
        t = self.owner
        layout: Any = None
        written = None
        with suppress(Exception):
            layout = (storage_id(t), t.shape, t.stride(), t.storage_offset(), t.dtype, t.device)
            written = None if t.is_inference() else version(t)
        grad = t.grad if t.is_leaf else None
        flags = (t.requires_grad, type(t))
        return {"": layout, "written": written, ".grad": grad, "flags": flags}

    def _written(self, now: dict[Any, Any]) -> bool:
        if self.copy is not None and now[""] == self.was[""]:
            return not equal_bits(self.owner, self.copy)
        return bool(now["written"] != self.was["written"])

    def changes(self) -> Iterator[Change]:
        now = self.read()
        if now[".grad"] is not self.was[".grad"]:
            yield Change(self.module, f"{self.path}.grad", self.was[".grad"], now[".grad"])
        if (now[""], now["flags"]) != (self.was[""], self.was["flags"]) or self._written(now):
            old = self.copy if self.copy is not None else self.owner
            yield Change(self.module, self.path, old, self.owner)

    def restore(self) -> None:
        now = self.read()
        required, kind = self.was["flags"]
        if type(self.owner) is not kind:
            self.owner.__class__ = kind
        if now[""] != self.was[""] and self.alias is not None:
            self.owner.data = self.alias
        if self.copy is not None and not equal_bits(self.owner, self.copy):
            self.owner.data.copy_(self.copy)
        written = now["written"] != self.was["written"]
        if self.copy is not None and written and self.preserved is not None:
            self.preserved.__exit__(None, None, None)
        if now[".grad"] is not self.was[".grad"] and self.owner.is_leaf:
            self.owner.grad = self.was[".grad"]
        if self.owner.is_leaf and self.owner.requires_grad != required:
            self.owner.requires_grad_(required)


class Array(Part):
    """A NumPy array."""

    def read(self) -> dict[Any, Any]:
        return {"": self.owner.copy()}

    def changes(self) -> Iterator[Change]:
        if self.owner.tobytes() != self.was[""].tobytes():
            yield Change(self.module, self.path, self.was[""], self.owner)

    def restore(self) -> None:
        if self.owner.dtype != object and self.owner.tobytes() != self.was[""].tobytes():
            self.owner[...] = self.was[""]


class Generator(Part):
    """A random generator of PyTorch that the model holds."""

    def read(self) -> dict[Any, Any]:
        return {"": self.owner.get_state()}

    def changes(self) -> Iterator[Change]:
        if not torch.equal(self.read()[""], self.was[""]):
            yield Change(self.module, self.path, self.was[""], self.owner)

    def restore(self) -> None:
        if not torch.equal(self.read()[""], self.was[""]):
            self.owner.set_state(self.was[""])


def _cloned(tensor: Tensor) -> Tensor | None:
    try:
        return tensor.detach().clone()
    except Exception:  # a tensor without data
        return None


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether both hold the same values, NaN in the same places."""
    one = one.detach()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    try:
        equal = torch.equal(one, other)
        return equal or bool(((one == other) | ((one != one) & (other != other))).all())
    except Exception:  # nothing to compare: a fake tensor, a tensor on meta
        return True
