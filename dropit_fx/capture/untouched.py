"""A model is afterwards what it was: what a run or a trace leaves in it is seen, and undone.

A run on fake tensors, and a tracer, execute the model's Python. What that assigns (a cache, a
counter, the last activation, what a hook appends to a list) would stay in the user's model as fake
tensors and proxies. :func:`untouched` notes everything that the model's code can reach before such
a run, tells what the run changed, and puts it back: the objects themselves are restored in place,
so that whoever else holds them sees no difference.
"""

from __future__ import annotations

import functools
import gc
import pickle
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dropit_fx.private import MODULE_DICTS, storage_id, unsafe_preserve_version_counter, version

_DEPTH = 10  # of containers and objects in each other, from a module on
_PARTS = 200_000  # that are noted at most
_ELEMENTS = 10_000  # of one container that are looked into; all are noted


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


@dataclass
class Untouched:
    """What happened inside an :func:`untouched` block.

    Attributes:
        look: What has changed so far.
        changes: What had changed when the block ended, before it was undone.
        chance: Names of the sources of random numbers that the block drew from.
    """

    look: Callable[[], list[Change]]
    changes: list[Change] = field(default_factory=list)
    chance: list[str] = field(default_factory=list)


@contextmanager
def untouched(
    model: nn.Module, *, values: bool = False, generators: bool = False
) -> Iterator[Untouched]:
    """Puts back what the block changes in ``model``, and tells what that was; after errors, too.

    Noted and restored: the attributes of every submodule (hooks, buffers, parameters and their
    gradients, training flags among them), the containers, objects, closures and class attributes
    that these and the code of the forward and of the hooks lead to, plain tensors with what they
    hold, and the random states of Python, NumPy and PyTorch. Globals of the model's code get back
    containers, numbers and tensors. Blocks may stand inside each other; the caller sees to it that
    no other thread runs the model meanwhile.

    Args:
        model: Any module.
        values: Copy parameters, gradients and buffers as well, for a block that may write into
            them (a run on real tensors). Without, such a write is told and not undone.
        generators: Watch every random generator of Python and NumPy that lives, wherever it is
            held, not their global ones alone; finding them takes a tenth of a second.

    Yields:
        What changed, complete when the block has ended::

            with untouched(model) as seen:
                trace(model)
            for change in seen.changes:  # Change(module, attribute, old, new)
                ...
            if seen.chance:  # e.g. ["Python's random", "torch's default generator"]
                ...
    """
    kept = _Kept(values, {id(m): n for n, m in model.named_modules()})
    for name, module in model.named_modules():
        kept.note(module, name, "", 0)
    sources = [(s, s.state()) for s in _sources(generators)]
    seen = Untouched(kept.changes)
    try:
        yield seen
    finally:
        seen.changes = kept.changes()
        kept.restore()
        for source, state in sources:
            if not _same_state(source.state(), state):
                seen.chance.append(source.name)
                source.restore(state)


# What is noted ----------------------------------------------------------------------------------


class _Part:
    """Something that can change, and what it was."""

    def __init__(self, owner: Any, module: str, path: str) -> None:
        self.owner, self.module, self.path = owner, module, path
        self.was = self.read()

    def read(self) -> dict[Any, Any]:
        """Key -> value, in order."""
        raise NotImplementedError

    def write(self, values: dict[Any, Any]) -> None:
        raise NotImplementedError

    def label(self, key: Any) -> str:
        return f"{self.path}[{key!r}]"

    def changes(self) -> Iterator[Change]:
        now = self.read()
        for key in (*self.was, *(k for k in now if k not in self.was)):
            old, new = self.was.get(key, ABSENT), now.get(key, ABSENT)
            if not _same(old, new):
                yield Change(self.module, self.label(key), old, new)

    def restore(self) -> None:
        now = self.read()
        if list(now) != list(self.was) or any(now[k] is not v for k, v in self.was.items()):
            self.write(self.was)


class _Dict(_Part):
    def read(self) -> dict[Any, Any]:
        return dict(self.owner)

    def write(self, values: dict[Any, Any]) -> None:
        kind: Any = OrderedDict if isinstance(self.owner, OrderedDict) else dict
        kind.clear(self.owner)  # whatever a subclass makes of assignments
        for key, value in values.items():
            kind.__setitem__(self.owner, key, value)


class _Attributes(_Dict):
    """The ``__dict__`` of an object."""

    def label(self, key: Any) -> str:
        return f"{self.path}.{key}".removeprefix(".")


class _List(_Part):
    def read(self) -> dict[Any, Any]:
        return dict(enumerate(self.owner))

    def write(self, values: dict[Any, Any]) -> None:
        self.owner.clear()
        self.owner.extend(values.values())


class _Set(_Part):
    def read(self) -> dict[Any, Any]:
        return {element: element for element in self.owner}

    def write(self, values: dict[Any, Any]) -> None:
        self.owner.clear()
        self.owner.update(values)


class _Slots(_Part):
    def __init__(self, owner: Any, module: str, path: str, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(owner, module, path)

    def read(self) -> dict[Any, Any]:
        found = {n: getattr(self.owner, n, ABSENT) for n in self.names}
        return {n: v for n, v in found.items() if v is not ABSENT}

    def write(self, values: dict[Any, Any]) -> None:
        for name in self.names:
            if name in values:
                object.__setattr__(self.owner, name, values[name])
            elif hasattr(self.owner, name):
                object.__delattr__(self.owner, name)

    def label(self, key: Any) -> str:
        return f"{self.path}.{key}".removeprefix(".")


class _Class(_Part):
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
        return f"{self.path}.{self.owner.__name__}.{key}".removeprefix(".")


class _Globals(_Part):
    """The names that a function reads from its module.

    Only tensors and numbers are put back: a flag may say that something is registered.
    """

    def __init__(self, owner: Any, module: str, path: str, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(owner, module, path)

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


class _Cell(_Part):
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


class _Type(_Part):
    """The class of a module: lazy ones become another."""

    def read(self) -> dict[Any, Any]:
        return {"__class__": type(self.owner)}

    def write(self, values: dict[Any, Any]) -> None:
        self.owner.__class__ = values["__class__"]

    def label(self, key: Any) -> str:
        return f"{self.path}.{key}".removeprefix(".")


class _Cached(_Part):
    """A function under ``functools.lru_cache``: emptied if it holds a block's fake tensors."""

    def read(self) -> dict[Any, Any]:
        return {"misses": self.owner.cache_info().misses}

    def changes(self) -> Iterator[Change]:
        if self.read() != self.was and _holds_no_data(self.owner):
            yield Change(self.module, self.path, ABSENT, self.owner)

    def restore(self) -> None:
        if self.read() != self.was and _holds_no_data(self.owner):
            self.owner.cache_clear()


class _Tensor(_Part):
    def __init__(self, owner: Tensor, module: str, path: str, copied: bool) -> None:
        self.copy = _cloned(owner) if copied else None
        self.kind = type(owner)
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
            return not _equal_bits(self.owner, self.copy)
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
        if type(self.owner) is not self.kind:
            self.owner.__class__ = self.kind
        if now[""] != self.was[""] and self.alias is not None:
            self.owner.data = self.alias
        if self.copy is not None and not _equal_bits(self.owner, self.copy):
            self.owner.data.copy_(self.copy)
        written = now["written"] != self.was["written"]
        if self.copy is not None and written and self.preserved is not None:
            self.preserved.__exit__(None, None, None)
        if now[".grad"] is not self.was[".grad"] and self.owner.is_leaf:
            self.owner.grad = self.was[".grad"]
        if self.owner.is_leaf and self.owner.requires_grad != self.was["flags"][0]:
            self.owner.requires_grad_(self.was["flags"][0])


class _Array(_Part):
    """A NumPy array."""

    def read(self) -> dict[Any, Any]:
        return {}

    def __init__(self, owner: Any, module: str, path: str) -> None:
        super().__init__(owner, module, path)
        self.copy = owner.copy()

    def changes(self) -> Iterator[Change]:
        if self.owner.tobytes() != self.copy.tobytes():
            yield Change(self.module, self.path, self.copy, self.owner)

    def restore(self) -> None:
        if self.owner.dtype != object and self.owner.tobytes() != self.copy.tobytes():
            self.owner[...] = self.copy


class _Generator(_Part):
    """A random generator of PyTorch that the model holds."""

    def read(self) -> dict[Any, Any]:
        return {"": self.owner.get_state()}

    def changes(self) -> Iterator[Change]:
        if not torch.equal(self.read()[""], self.was[""]):
            yield Change(self.module, self.path, self.was[""], self.owner)

    def restore(self) -> None:
        if not torch.equal(self.read()[""], self.was[""]):
            self.owner.set_state(self.was[""])


class _Kept:
    """All parts that are reached from a model, each once."""

    def __init__(self, values: bool, names: dict[int, str]) -> None:
        self.values, self._names = values, names
        self.parts: list[_Part] = []
        self._seen: dict[int, Any] = {}  # id -> the object, held so that the id stays its own

    def changes(self) -> list[Change]:
        return [c for part in self.parts for c in part.changes()]

    def restore(self) -> None:
        with torch.no_grad():
            for part in self.parts:
                part.restore()

    def note(self, value: Any, module: str, path: str, depth: int) -> None:
        """Notes ``value`` and what it leads to."""
        if isinstance(value, _LEAVES) or depth > _DEPTH or len(self.parts) > _PARTS:
            return
        if id(value) in self._seen:
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
            self._container(_Dict(value, module, path), depth)
        elif isinstance(value, list | deque):
            self._container(_List(value, module, path), depth)
        elif isinstance(value, set):
            self._container(_Set(value, module, path), depth)
        elif isinstance(value, tuple | frozenset):
            for i, element in enumerate([*value][:_ELEMENTS]):
                self.note(element, module, f"{path}[{i}]", depth + 1)
        elif isinstance(value, torch.Generator):
            self.parts.append(_Generator(value, module, path))
        elif isinstance(value, MethodType):
            self.note(value.__self__, module, path, depth + 1)
            self.note(value.__func__, module, path, depth + 1)
        elif isinstance(value, functools.partial):
            for inner in (value.func, value.args, value.keywords):
                self.note(inner, module, path, depth + 1)
        elif isinstance(value, staticmethod | classmethod):
            self.note(value.__func__, module, path, depth)
        elif isinstance(value, _LRU_CACHE):
            self.parts.append(_Cached(value, module, path))
            self.note(value.__wrapped__, module, path, depth + 1)
        elif isinstance(value, FunctionType):
            self._function(value, module, path, depth)
        elif _is_array(value):
            self.parts.append(_Array(value, module, path))
        elif _is_users(type(value)):
            self._object(value, module, path, depth)

    def _module(self, module: nn.Module, name: str, path: str, depth: int) -> None:
        self.parts.append(_Type(module, name, path))
        if isinstance(module, fx.GraphModule):  # its code is its graph's
            depth = max(depth, _DEPTH - 4)
        self._container(_Attributes(vars(module), name, path), depth)
        if _is_users(type(module)):
            self._class(type(module), name, path, depth)

    def _object(self, value: Any, module: str, path: str, depth: int) -> None:
        state = _dict_of(value)
        if state is not None:
            self._container(_Attributes(state, module, path), depth)
        slots = _slots_of(type(value))
        if slots:
            self._container(_Slots(value, module, path, slots), depth)
        self._class(type(value), module, path, depth)

    def _tensor(self, value: Tensor, module: str, path: str, depth: int, copied: bool) -> None:
        self.parts.append(_Tensor(value, module, path, copied))
        state = _dict_of(value)
        if state:
            self._container(_Attributes(state, module, path), depth)
        if value.is_leaf and value.grad is not None:
            self.note(value.grad, module, f"{MODULE_DICTS[0]}[{path!r}].grad", depth + 1)

    def _container(self, part: _Part, depth: int) -> None:
        self._seen[id(part.owner)] = part.owner
        self.parts.append(part)
        for key, value in [*part.was.items()][:_ELEMENTS]:
            self.note(value, part.module, part.label(key), depth + 1)

    def _class(self, kind: type, module: str, path: str, depth: int) -> None:
        """Its attributes, and what the code of its calls leads to."""
        for base in kind.__mro__:
            if not _is_users(base) or id(base) in self._seen:
                continue
            self._container(_Class(base, module, path), depth)
        for name in ("forward", "__call__"):
            self._code(getattr(kind, name, None), kind, module, name, depth + 1)

    def _function(self, function: FunctionType, module: str, path: str, depth: int) -> None:
        self._code(function, None, module, path, depth)

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
            self._container(_Cell(cell, module, path), depth)
        for default in (*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()):
            self.note(default, module, path, depth + 1)
        self._container(_Attributes(found.__dict__, module, path), depth)
        names = tuple(dict.fromkeys(_names(found.__code__)))
        part = _Globals(found.__globals__, module, path, names)
        if part.was or any(n not in found.__globals__ for n in names):
            self.parts.append(part)
        for name in names:
            label = f"{path}:{name}"
            if name in found.__globals__:
                self.note(found.__globals__[name], module, label, depth + 2)
            elif kind is not None and isinstance(getattr(kind, name, None), FunctionType):
                self._code(getattr(kind, name), kind, module, name, depth + 1)


_LEAVES = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    ModuleType,
    BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
)
# of these libraries, only modules, tensors and generators change with a model
_LIBRARIES = frozenset({"torch", "numpy", "sympy", "dropit_fx", "triton"})
_LRU_CACHE: Any = type(functools.lru_cache(lambda: None))
_OPEN = (SimpleNamespace,)


def _is_users(thing: Any) -> bool:
    """Whether a class or a function is the user's, or of a library of models."""
    root = str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]
    known = root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")
    return not known or thing in _OPEN


def _is_code(value: Any) -> bool:
    return isinstance(
        value, type | ModuleType | FunctionType | BuiltinFunctionType | property | staticmethod
    ) or (hasattr(type(value), "__get__") and not isinstance(value, nn.Module))


def _is_value(value: Any) -> bool:
    return isinstance(value, Tensor | int | float | complex | fx.Proxy) and type(value) is not bool


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


def _same(old: Any, new: Any) -> bool:
    simple = isinstance(old, int | float | complex | str | bytes) and type(old) is type(new)
    return old is new or (simple and (old == new or (old != old and new != new)))


def _cloned(tensor: Tensor) -> Tensor | None:
    try:
        return tensor.detach().clone()
    except Exception:  # a tensor without data
        return None


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    one = one.detach()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    try:
        equal = torch.equal(one, other)
        return equal or bool(((one == other) | ((one != one) & (other != other))).all())
    except Exception:  # nothing to compare: a fake tensor, a tensor on meta
        return True


def _holds_no_data(cached: Any) -> bool:
    """Whether the results that a function remembers hold a tensor of another kind than usual."""
    todo, seen = [(cached, 0)], set()
    while todo:
        value, depth = todo.pop()
        if isinstance(value, fx.Proxy) or (
            isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)
        ):
            return True
        if id(value) in seen or depth > 5 or isinstance(value, (*_LEAVES, FunctionType, Tensor)):
            continue
        seen.add(id(value))
        todo += [(inner, depth + 1) for inner in gc.get_referents(value)]
    return False


# Random numbers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A source of random numbers."""

    name: str
    state: Callable[[], Any]
    restore: Callable[[Any], object]


def _sources(living: bool) -> Iterator[_Source]:
    """Python's, NumPy's and PyTorch's own; ``living``: every generator of Python and NumPy."""
    yield _Source("Python's random", random.getstate, random.setstate)
    yield _Source("torch's default generator", torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for i in range(torch.cuda.device_count()):
            yield _Source(
                f"torch's generator of cuda:{i}",
                functools.partial(torch.cuda.get_rng_state, i),
                functools.partial(torch.cuda.set_rng_state, device=i),
            )
    numpy: Any = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random,)
    if numpy is not None:
        yield _Source("NumPy's random", numpy.random.get_state, numpy.random.set_state)
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    own: set[int] = {id(getattr(random.random, "__self__", None))}
    if numpy is not None:
        own.add(id(getattr(numpy.random.random, "__self__", None)))
    for found in _living(kinds) if living else ():
        if id(found) in own or isinstance(found, random.SystemRandom):
            continue
        kind = f"a {type(found).__module__}.{type(found).__qualname__}"
        if isinstance(found, random.Random):
            yield _Source(kind, found.getstate, found.setstate)
        elif isinstance(found, numpy.random.RandomState):
            yield _Source(kind, found.get_state, found.set_state)
        else:
            bits = found.bit_generator
            yield _Source(
                kind,
                functools.partial(getattr, bits, "state"),
                functools.partial(setattr, bits, "state"),
            )


def _living(kinds: tuple[type, ...]) -> Iterable[Any]:
    """Objects of these classes, wherever they are held."""
    return [o for o in gc.get_objects() if issubclass(type(o), kinds)]


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return pickle.dumps(one) == pickle.dumps(other)
