"""What can change: containers, attributes, names; each is noted, compared and put back."""

from __future__ import annotations

import gc
import operator
from collections import OrderedDict
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT: Any = _Absent()  # in the place of a value that was not there


class Change(NamedTuple):
    """One thing that is no longer what it was.

    Attributes:
        module: Qualified name of the submodule whose attribute leads there, "" for the root.
        attribute: The way from that module: ``cache``, ``stats['x'][0]``, ``_buffers['n']``,
            ``weight.grad``. ``forward:STEPS`` for a name that the code of ``forward`` reads from
            its surroundings (globals, closures).
        old: What was there, or :data:`ABSENT`. Of a tensor written in place: a copy of what it
            held, or the tensor itself where no copy was made.
        new: What is there now, or :data:`ABSENT`.
    """

    module: str
    attribute: str
    old: Any
    new: Any


class Part:
    """Something that can change, and what it was."""

    def __init__(self, owner: Any, module: str, path: str) -> None:
        self.owner, self.module, self.path = owner, module, path
        self.was = self.read()

    def read(self) -> dict[Any, Any]:
        """Key -> value, in order."""
        raise NotImplementedError

    def write(self, values: dict[Any, Any]) -> None:
        """Puts back what :meth:`read` gave."""
        raise NotImplementedError

    def label(self, key: Any) -> str:
        """The way to a value, for people: by default that of an attribute."""
        return f"{self.path}.{key}".removeprefix(".")

    def changes(self) -> Iterator[Change]:
        """What is no longer as it was."""
        now = self.read()
        if _identical(self.was, now):
            return
        for key in (*self.was, *(k for k in now if k not in self.was)):
            old, new = self.was.get(key, ABSENT), now.get(key, ABSENT)
            if not _same(old, new):
                yield Change(self.module, self.label(key), old, new)

    def restore(self) -> None:
        """Makes it what it was."""
        if not _identical(self.was, self.read()):
            self.write(self.was)


class Attributes(Part):
    """The ``__dict__`` of an object."""

    def read(self) -> dict[Any, Any]:
        return dict(self.owner)

    def write(self, values: dict[Any, Any]) -> None:
        kind: Any = OrderedDict if isinstance(self.owner, OrderedDict) else dict
        kind.clear(self.owner)  # whatever a subclass makes of assignments
        for key, value in values.items():
            kind.__setitem__(self.owner, key, value)


class Dict(Attributes):
    def label(self, key: Any) -> str:
        return f"{self.path}[{key!r}]"


class List(Dict):
    def read(self) -> dict[Any, Any]:
        return dict(enumerate(self.owner))

    def write(self, values: dict[Any, Any]) -> None:
        self.owner.clear()
        self.owner.extend(values.values())


class Set(Dict):
    def read(self) -> dict[Any, Any]:
        return dict(zip(self.owner, self.owner, strict=True))

    def write(self, values: dict[Any, Any]) -> None:
        self.owner.clear()
        self.owner.update(values)


class _Named(Part):
    """Of which only some names are looked at."""

    def __init__(self, owner: Any, module: str, path: str, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(owner, module, path)


class Slots(_Named):
    def read(self) -> dict[Any, Any]:
        found = {n: getattr(self.owner, n, ABSENT) for n in self.names}
        return {n: v for n, v in found.items() if v is not ABSENT}

    def write(self, values: dict[Any, Any]) -> None:
        for name in self.names:
            if name in values:
                object.__setattr__(self.owner, name, values[name])
            elif hasattr(self.owner, name):
                object.__delattr__(self.owner, name)


class Class(Part):
    """Class attributes that are neither code nor Python's own."""

    def read(self) -> dict[Any, Any]:
        return {k: v for k, v in vars(self.owner).items() if k[:2] != "__" and not _is_code(v)}

    def write(self, values: dict[Any, Any]) -> None:
        for name, now in self.read().items():
            if name not in values:
                delattr(self.owner, name)
            elif now is not values[name]:
                setattr(self.owner, name, values[name])
        for name in values.keys() - vars(self.owner).keys():
            setattr(self.owner, name, values[name])

    def label(self, key: Any) -> str:
        return super().label(f"{self.owner.__name__}.{key}")


class Globals(_Named):
    """The names that a function reads from its module.

    Only tensors and numbers are put back: a flag may say that something is registered.
    """

    def read(self) -> dict[Any, Any]:
        found = {n: self.owner[n] for n in self.names if n in self.owner}
        return {n: v for n, v in found.items() if not _is_code(v) and type(v) is not bool}

    def restore(self) -> None:
        now = self.read()
        for name in self.names:
            old, new = self.was.get(name, ABSENT), now.get(name, ABSENT)
            if old is new or not (_is_value(old) or _is_value(new)):
                continue
            if old is ABSENT:
                del self.owner[name]
            else:
                self.owner[name] = old

    def label(self, key: Any) -> str:
        return f"{self.path}:{key}"


class Cell(Part):
    def read(self) -> dict[Any, Any]:
        try:
            return {"": self.owner.cell_contents}
        except ValueError:  # not assigned yet
            return {}

    def write(self, values: dict[Any, Any]) -> None:
        if values:
            self.owner.cell_contents = values[""]
        else:
            del self.owner.cell_contents

    def label(self, key: Any) -> str:
        return self.path


class Type(Part):
    """The class of a module: lazy ones become another."""

    def read(self) -> dict[Any, Any]:
        return {"__class__": type(self.owner)}

    def write(self, values: dict[Any, Any]) -> None:
        self.owner.__class__ = values["__class__"]


class Mode(Part):
    """Whether a module of TorchScript trains: its ``__dict__`` does not say."""

    def read(self) -> dict[Any, Any]:
        return {"training": self.owner.training}

    def write(self, values: dict[Any, Any]) -> None:
        self.owner.training = values["training"]


class Cached(Part):
    """A function under ``functools.lru_cache``: emptied if it holds a block's fake tensors."""

    def read(self) -> dict[Any, Any]:
        return {"misses": self.owner.cache_info().misses}

    def changes(self) -> Iterator[Change]:
        if self.read() != self.was and _holds_no_data(self.owner):
            yield Change(self.module, self.path, ABSENT, self.owner)

    def restore(self) -> None:
        if self.read() != self.was and _holds_no_data(self.owner):
            self.owner.cache_clear()


LEAVES = (
    *(int, float, complex, str, bytes, type(None), type, ModuleType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


def _is_code(value: Any) -> bool:
    return isinstance(
        value, type | ModuleType | FunctionType | BuiltinFunctionType | property | staticmethod
    ) or (hasattr(type(value), "__get__") and not isinstance(value, nn.Module))


def _is_value(value: Any) -> bool:
    return isinstance(value, Tensor | int | float | complex | fx.Proxy) and type(value) is not bool


def _identical(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether both hold the same objects, in one order: nearly all that is noted stays so."""
    return list(one) == list(other) and all(map(operator.is_, one.values(), other.values()))


def _same(old: Any, new: Any) -> bool:
    simple = isinstance(old, int | float | complex | str | bytes) and type(old) is type(new)
    return old is new or (simple and (old == new or (old != old and new != new)))


def _holds_no_data(cached: Any) -> bool:
    """Whether the results that a function remembers hold a tensor of another kind than usual."""
    todo, seen = [(cached, 0)], set()
    while todo:
        value, depth = todo.pop()
        if isinstance(value, fx.Proxy) or (
            isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)
        ):
            return True
        if id(value) in seen or depth > 5 or isinstance(value, (*LEAVES, FunctionType, Tensor)):
            continue
        seen.add(id(value))
        todo += [(inner, depth + 1) for inner in gc.get_referents(value)]
    return False
