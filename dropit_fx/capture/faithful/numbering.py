"""What a value is: a number by how it came about. Equal numbers are equal computations."""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.capture.provenance import is_users
from dropit_fx.holders import written_by
from dropit_fx.private import (
    FakeTensor,
    OpOverload,
    TorchDispatchMode,
    disable_current_modes,
    pytree,
    schema,
    storage_id,
)

WORD = (1 << 61) - 1
# copies, and the gradient of a slice of everything, which export writes out
_SAME = ("aten::clone", "aten::lift_fresh", "aten::lift_fresh_copy", "aten::slice_backward")


class Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers every value that is made while it is on, in the forward and in the backward.

    A storage has a number for its content; a tensor's number is that with its place in the
    storage. An op that writes gives the storage a new one.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(m): n for n, m in module.named_modules()}
        self.where: dict[int, str] = {}
        self._content: dict[int, int] = {}
        self._constants: dict[int, tuple[int, Tensor]] = {}
        self._held: list[Any] = []  # a key is a storage's address, good while the storage lives

    def name(self, tensor: Tensor, label: str, content: int | None = None) -> None:
        """Says what a tensor holds: what is called so, or the constant of this number."""
        self._set(tensor, hash(("given", label)) if content is None else content)

    def of(self, tensor: Tensor) -> int:
        """The number of a tensor."""
        place: tuple[Any, ...] = tuple(tensor.shape), tensor.dtype
        if tensor.layout == torch.strided:
            place += tuple(tensor.stride()), tensor.storage_offset()
        return hash((self._content_of(tensor), *place))

    def written_constants(self) -> dict[str, int]:
        """Constants that are not what they were when they were first seen."""
        found = {}
        for key, (first, tensor) in self._constants.items():
            if self._content[key] != first:
                found[f"constant of shape {tuple(tensor.shape)} ({first:x})"] = self._content[key]
        return found

    def here(self) -> str:
        """``module 'blocks.0' (file.py:12)``: the innermost module and line of the user's."""
        frame: FrameType | None = inspect.currentframe()
        line = module = ""
        while frame is not None and (not line or not module):
            code = frame.f_code
            if not line and is_users(code.co_filename) and "<" not in code.co_filename:
                line = f"{code.co_filename}:{frame.f_lineno}"
            owner = frame.f_locals.get("self") if code.co_argcount else None
            if not module and owner is not None and id(owner) in self.names:
                module = self.names[id(owner)] or "the model itself"
            frame = frame.f_back
        module = f"module '{module}'" if module else "a backward"
        return f"{module} ({line})" if line else module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") == "prim":  # it asks for a device
            return func(*args, **kwargs)
        if not isinstance(func, OpOverload):
            with self:  # a higher-order op: what its body does is what counts
                return func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        key = self._key(func, args, kwargs)
        written = written_by(func, args, kwargs)
        constant = given and not any(isinstance(t, FakeTensor) for t in given)
        if constant and not written and torch.Tag.nondeterministic_seeded not in func.tags:
            with disable_current_modes():
                out = func(*args, **kwargs)
        else:
            if any(map(_is_tracked, given)):
                args, kwargs = pytree.tree_map(_bare, (args, kwargs))
            out = func(*args, **kwargs)
        if schema(func).name in _SAME:
            key = self._copied(args[0], out, key)
        known = {self._key_of(t) for t in given}
        out = self._apart(out, known)
        if schema(func).name == "aten::copy_":
            key = self._copied(args[1], args[0], key)
        for tensor in written:
            old = self._content_of(tensor)
            whole = _covers(tensor)
            self._set(tensor, key if whole else hash(("write", old, self.of(tensor), key)))
            self.where.setdefault(self.of(tensor), self.here())
        for i, tensor in enumerate(pytree.tree_leaves(out)):
            if isinstance(tensor, Tensor) and self._key_of(tensor) not in known:
                if isinstance(tensor, FakeTensor):
                    self._set(tensor, hash((key, i)) if i else key)
                self.where.setdefault(self.of(tensor), self.here())
        return out

    def _apart(self, out: Any, known: set[int]) -> Any:
        """Several results of an op, each in memory of its own but for what shows an operand.

        Two may be one (gradients of an LSTM's biases): PyTorch's cache of fake tensors forgets it,
        and what is in the cache is by chance.
        """
        made: set[int] = set()

        def apart(result: Any) -> Any:
            if not isinstance(result, FakeTensor) or (key := self._key_of(result)) in known:
                return result
            again = key in made
            made.add(key)
            return result.clone() if again else result

        return pytree.tree_map(apart, out) if isinstance(out, tuple | list) else out

    def _key(self, func: Any, args: Any, kwargs: Any) -> int:
        """How an op's result comes about."""
        base = schema(func).name.rpartition("::")[2]
        base = base.removesuffix("_") if not base.endswith("__") else base
        if base == "add" and not isinstance(args[1], Tensor) and args[1] == 0:
            return self._content_of(args[0])  # as a count of batches does in eval mode
        if base == "add" and len(args) == 2 and not kwargs:
            a, b = args
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
                # sums of gradients come in an order that no one means
                return (self.of(a) + self.of(b)) & WORD
        drawn: Any = ()
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn = _draw()
        return hash((base, self._frozen((args, kwargs)), drawn))

    def _copied(self, source: Tensor, out: Tensor, key: int) -> int:
        """The content of a copy: the source's, where that is all of a storage as the copy is."""
        if source.shape != out.shape or {source.layout, out.layout} != {torch.strided}:
            return key
        place = [(t.stride(), t.storage_offset(), t.dtype, _covers(t)) for t in (source, out)]
        whole = place[0] == place[1] and place[0][-1]
        return self._content_of(source) if whole else hash(("copy", self.of(source)))

    def _frozen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, tuple | list):
            return tuple(map(self._frozen, value))
        if isinstance(value, dict):
            return tuple((k, self._frozen(v)) for k, v in sorted(value.items()))
        return frozen(value)

    def _key_of(self, tensor: Tensor) -> int:
        return storage_id(tensor) if tensor.layout == torch.strided else id(tensor)

    def _content_of(self, tensor: Tensor) -> int:
        key = self._key_of(tensor)
        if key not in self._content:
            self._set(tensor, constant(tensor))
            self._constants[key] = self._content[key], tensor
        return self._content[key]

    def _set(self, tensor: Tensor, number: int) -> None:
        self._held.append(tensor.untyped_storage() if tensor.layout == torch.strided else tensor)
        self._content[self._key_of(tensor)] = number


def _is_tracked(value: Any) -> bool:
    """Whether it is a constant that autograd knows, which fake tensors cannot follow.

    A model may write what requires a gradient into a tensor of its own.
    """
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.requires_grad


def _bare(value: Any) -> Any:
    """The same without what autograd knows of it."""
    if not _is_tracked(value):
        return value
    with disable_current_modes():
        return value.detach()


def frozen(value: Any) -> Any:
    """What stands for a plain value in a number: itself with its type, or how it prints."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return type(value).__name__, value


def constant(tensor: Tensor) -> int:
    """By value: a tracer may have copied it."""
    real = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    if real is None or real.is_meta or real.layout != torch.strided:
        return hash(("unknown", tuple(tensor.shape), tensor.dtype))
    with disable_current_modes(), torch.no_grad():
        flat = torch.empty(0, dtype=real.dtype, device=real.device).set_(real.untyped_storage())
        data = flat.detach().cpu().contiguous().view(torch.uint8)
        return hash(("constant", data.numpy().tobytes()))


def _draw() -> int:
    """The generator's state, which then moves on: fake tensors draw nothing."""
    with disable_current_modes():
        state = hash(torch.random.get_rng_state().numpy().tobytes())
        torch.rand(1)
    return state


def _covers(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    if tensor.layout != torch.strided:
        return True
    return bool(tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes())
