"""What is noted: all that the model's code can reach, each thing once."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropit_fx.capture.untouched.parts import (
    LEAVES,
    Attributes,
    Cached,
    Cell,
    Change,
    Class,
    Dict,
    Globals,
    List,
    Mode,
    Part,
    Set,
    Slots,
    Type,
)
from dropit_fx.capture.untouched.values import Array, Generator, Held
from dropit_fx.private import MODULE_DICTS

_DEPTH = 10  # of containers and objects in each other, from a module on
_PARTS = 200_000  # that are noted at most
_ELEMENTS = 10_000  # of one container that are looked into; all are noted
# of these libraries, only modules, tensors and generators change with a model
_LIBRARIES = frozenset({"torch", "numpy", "sympy", "dropit_fx", "triton"})
_LRU_CACHE: Any = type(functools.lru_cache(lambda: None))
_OPEN = (SimpleNamespace,)


class Reached:
    """All parts that are reached from a model, each once."""

    def __init__(self, values: bool, names: dict[int, str]) -> None:
        self.values, self._names = values, names
        self.parts: list[Part] = []
        self._seen: dict[int, Any] = {}  # id -> the object, held so that the id stays its own

    def changes(self) -> list[Change]:
        """What is no longer as it was, in all of them."""
        return [c for part in self.parts for c in part.changes()]

    def restore(self) -> None:
        """Makes all of them what they were."""
        with torch.no_grad():
            for part in self.parts:
                part.restore()

    def note(self, value: Any, module: str, path: str, depth: int) -> None:
        """Notes ``value`` and what it leads to."""
        if depth > _DEPTH or len(self.parts) > _PARTS:
            return
        if isinstance(value, type) and _is_users(value):  # code may keep something in it
            self._class(value, module, path, depth)
        if isinstance(value, LEAVES) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if id(value) in self._names:
            self._module(value, self._names[id(value)], "", 0)
        elif isinstance(value, nn.Module):
            self._module(value, module, path, depth)
        elif isinstance(value, Tensor):
            plain = not path.startswith(tuple(f"{d}[" for d in MODULE_DICTS))
            self._tensor(value, module, path, depth, plain or self.values)
        elif isinstance(value, dict):
            self._container(Dict(value, module, path), depth)
        elif isinstance(value, list | deque):
            self._container(List(value, module, path), depth)
        elif isinstance(value, set):
            self._container(Set(value, module, path), depth)
        elif isinstance(value, tuple | frozenset):
            for i, element in enumerate([*value][:_ELEMENTS]):
                self.note(element, module, f"{path}[{i}]", depth + 1)
        elif isinstance(value, torch.Generator):
            self.parts.append(Generator(value, module, path))
        elif isinstance(value, MethodType):
            self.note(value.__self__, module, path, depth + 1)
            self.note(value.__func__, module, path, depth + 1)
        elif isinstance(value, functools.partial):
            for inner in (value.func, value.args, value.keywords):
                self.note(inner, module, path, depth + 1)
        elif isinstance(value, staticmethod | classmethod):
            self.note(value.__func__, module, path, depth)
        elif isinstance(value, _LRU_CACHE):
            self.parts.append(Cached(value, module, path))
            self.note(value.__wrapped__, module, path, depth + 1)
        elif isinstance(value, FunctionType):
            self._code(value, None, module, path, depth)
        elif _is_array(value):
            self.parts.append(Array(value, module, path))
        elif _is_users(type(value)):
            self._object(value, module, path, depth)

    def _module(self, module: nn.Module, name: str, path: str, depth: int) -> None:
        self.parts.append(Type(module, name, path))
        if isinstance(module, torch.jit.ScriptModule):
            self.parts.append(Mode(module, name, path))
        if isinstance(module, fx.GraphModule):  # its code is its graph's
            depth = max(depth, _DEPTH - 4)
        self._container(Attributes(vars(module), name, path), depth)
        if _is_users(type(module)):
            self._class(type(module), name, path, depth)

    def _object(self, value: Any, module: str, path: str, depth: int) -> None:
        state = _dict_of(value)
        if state is not None:
            self._container(Attributes(state, module, path), depth)
        slots = _slots_of(type(value))
        if slots:
            self._container(Slots(value, module, path, slots), depth)
        self._class(type(value), module, path, depth)

    def _tensor(self, value: Tensor, module: str, path: str, depth: int, copied: bool) -> None:
        self.parts.append(Held(value, module, path, copied))
        state = _dict_of(value)
        if state is not None:
            self._container(Attributes(state, module, path), depth)
        if value.is_leaf and value.grad is not None:
            self.note(value.grad, module, f"{MODULE_DICTS[0]}[{path!r}].grad", depth + 1)

    def _container(self, part: Part, depth: int) -> None:
        self._seen[id(part.owner)] = part.owner
        self.parts.append(part)
        for key, value in [*part.was.items()][:_ELEMENTS]:
            self.note(value, part.module, part.label(key), depth + 1)

    def _class(self, kind: type, module: str, path: str, depth: int) -> None:
        """Its attributes, and what the code of its calls leads to."""
        for base in kind.__mro__:
            if not _is_users(base) or id(base) in self._seen:
                continue
            self._container(Class(base, module, path), depth)
        for name in ("forward", "__call__"):
            self._code(getattr(kind, name, None), kind, module, name, depth + 1)

    def _code(self, found: Any, kind: type | None, module: str, path: str, depth: int) -> None:
        """What a function reads from its surroundings, and the functions that it calls."""
        if not isinstance(found, FunctionType):
            if found is not None:
                self.note(found, module, path, depth + 1)
            return
        key = id(found)
        if (key in self._seen and kind is not None) or not _is_users(found) or depth > _DEPTH:
            return
        self._seen[key] = found
        for cell in found.__closure__ or ():
            self._seen[id(cell)] = cell
            self._container(Cell(cell, module, path), depth)
        for default in (*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()):
            self.note(default, module, path, depth + 1)
        self._container(Attributes(found.__dict__, module, path), depth)
        names = tuple(dict.fromkeys(_names(found.__code__)))
        part = Globals(found.__globals__, module, path, names)
        if part.was or any(n not in found.__globals__ for n in names):
            self.parts.append(part)
        for name in names:
            label = f"{path}:{name}"
            if name in found.__globals__:
                self.note(found.__globals__[name], module, label, depth + 2)
            elif kind is not None and isinstance(getattr(kind, name, None), FunctionType):
                self._code(getattr(kind, name), kind, module, name, depth + 1)


def _is_users(thing: Any) -> bool:
    """Whether a class or a function is the user's, or of a library of models."""
    root = str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]
    known = root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")
    return not known or thing in _OPEN


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _dict_of(value: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def _slots_of(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ()) if _is_users(base) else ()
        found += [slots] if isinstance(slots, str) else [*slots]
    return tuple(n for n in found if n not in ("__dict__", "__weakref__"))


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes in a piece of code and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
