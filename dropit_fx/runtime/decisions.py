"""What a checkpointed region decides by values: the experts of a token, the rows that are left.

Made again from a rounded input, a region may decide otherwise: sizes differ then, or, which nobody
would notice, tokens go through other experts. What is decided shows in what autograd saves, which
are the indices: integers that the region makes itself. What it was given, and buffers, are none;
nor is what it makes of them and of positions alone, which is told by following it op by op
(``followed.py``). Indices are compared with those that the region saves when it is made again.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dropit_fx.holders import kept_by, nodes_behind, tensors_in
from dropit_fx.private import disable_current_modes, storage_id
from dropit_fx.private_hooks import function_of_region, run_region_in, watch_region
from dropit_fx.runtime.followed import Followed, Shown
from dropit_fx.runtime.saved_hooks import Packing, is_plain

INDICES = (torch.int64, torch.int32, torch.int16)
REASON = "its region saves indices that it makes, of which some may depend on it"
KEPT = (
    "pack_checkpoints: {name} saves indices that may depend on its input, as routers of experts do."
    " Made again from a rounded input it may choose others, so its inputs are kept exactly. If none"
    " of them depends on activations, or if the region saves what it chooses by (a selective"
    " checkpoint of the router's logits), say so and have them packed:"
    " pack_checkpoints(model, trust_indices=True)."
)
REENTRANT = (
    "pack_checkpoints: {name} saves indices that may depend on its input, as routers of experts do."
    " Made again from a rounded input it may choose others, and the gradient would be that of"
    " another model. Use use_reentrant=False: the inputs of such a region are kept exactly then. If"
    " no index depends on activations: pack_checkpoints(model, trust_indices=True)."
)
OTHERWISE = (
    "pack_checkpoints: {name} is made again from a rounded input and computes something else than"
    " it did: it decides by values how much it computes, as where x[x > 0] is taken, or which"
    " indices it saves{trusted}. Leave its checkpoint out, have it save what it decides by"
    " (create_selective_checkpoint_contexts), or train without pack_checkpoints. PyTorch says:"
    " {error}"
)
# Odd: products by them lose no bits
_ODD = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


class Decisions:
    """Watches one region, and those in it.

    Args:
        model: That packs its checkpoints.
        packing: What packs the inputs of the region.
        trusted: Whether indices are taken to be the same for a rounded input.
        said: Called before a warning; whether it has been given.
        follow: Whether it pays to follow a region: by its module, or its function.
    """

    def __init__(
        self,
        model: nn.Module,
        packing: Packing,
        trusted: bool,
        said: Callable[[], bool],
        follow: MutableMapping[Any, bool],
    ) -> None:
        self._model, self._packing, self._trusted, self._said = model, packing, trusted, said
        self._follow, self._pays = follow, False
        self._followed: Followed | None = None

    def begin(self, region: Any, args: Any) -> None:
        """Has the inputs of a region kept exactly as soon as it saves indices that may differ."""
        self._function = function_of_region(region)
        # these live while it runs, and the set holds none of them
        self._given = {*map(storage_id, _indices(args))}
        run_region_in(region, self._following(args))
        self.watch(region)

    def watch(self, region: Any) -> None:
        """Watches that region, or one that it runs, whose inputs depend on its own."""
        watch_region(region, self._saved, self._failed)

    @contextmanager
    def _following(self, args: Any) -> Iterator[None]:
        key = _owner(self._function)
        if self._trusted or not self._packing.rounds or not self._follow.get(key, True):
            yield
            return
        try:
            with self._mode(self._function, args) as self._followed:
                yield
        finally:
            self._followed = None
        if self._pays:
            self._follow[key] = True
        self._follow.setdefault(key, False)

    def _mode(self, function: Any, args: Any) -> Followed:
        given = tensors_in(args)
        found = *tensors_in([*_bound(function)]), *self._model.buffers()
        return Followed((*given, *found), (x for x in given if x.is_floating_point()))

    def _saved(self, x: Tensor, again: bool) -> object:
        if x.dtype not in INDICES or not is_plain(x):
            return None
        rounds = self._packing.rounds
        if rounds and not (again or self._trusted or self._is_same(x)):
            self._packing.keep_exactly(REASON)
            if not self._said():
                warnings.warn(KEPT.format(name=self._name(self._function)), stacklevel=2)
        return _Chosen(_number(x) if self._packing.rounds else 0, self._packing)

    def _is_same(self, x: Tensor) -> bool:
        """Whether an index is the same when the region is made again."""
        bound = _indices([*_bound(self._function), *self._model.buffers()])
        found = storage_id(x) in self._given.union(map(storage_id, bound))
        if self._followed is None:
            return found
        same = self._followed.same(x)
        self._pays = self._pays or (same and not found)
        return same

    def _failed(self, error: Exception) -> NoReturn:
        if not self._packing.rounds:
            raise error
        trusted = ", or an index that trust_indices=True trusts" if self._trusted else ""
        first = str(error).partition("\n")[0]
        said = OTHERWISE.format(name=self._name(self._function), error=first, trusted=trusted)
        raise type(error)(said) from error

    def checked(self, function: Any) -> Callable[..., Any]:
        """The function of a reentrant region, which looks at what it saves when it is made again.

        It raises a RuntimeError where it saves indices that may differ, since what it is made from
        was rounded.
        """

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            if self._trusted or not torch.is_grad_enabled() or not self._packing.rounds:
                return function(*args)
            followed = self._mode(function, args)
            with Shown(followed), followed:
                output = function(*args)
            saved = [t for node in nodes_behind(output, 0) for _, t in kept_by(node)]
            if not all(map(followed.same, _indices(saved))):
                raise RuntimeError(REENTRANT.format(name=self._name(function)))
            return output

        return run

    def _name(self, function: Any) -> str:
        names = {module: name for name, module in self._model.named_modules()}
        for found in _bound(function):
            if isinstance(found, nn.Module) and names.get(found):
                return f"the checkpointed layer {names[found]!r} ({type(found).__name__})"
        function = _innermost(function)
        named = function if isinstance(function, FunctionType) else type(function)
        return f"the checkpointed {named.__module__}.{named.__qualname__}"


@dataclass(eq=False)
class _Chosen:
    """Indices that a region saved. Where nothing is rounded they equal any others."""

    number: int
    packing: Packing

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Chosen) and self.number == other.number
        return same or not self.packing.rounds

    __hash__ = None  # type: ignore[assignment]


def _number(x: Tensor) -> int:
    """A number that tells indices from others, their order among it."""
    if not x.numel():
        return 0
    with disable_current_modes(), torch.no_grad():
        once = x[tuple(slice(None) if t else 0 for t in x.stride())]  # what is expanded
        flat = once.flatten().long()
        mixed = (flat + torch.arange(len(flat), device=x.device) * _ODD[0]) * _ODD[1]
        return int(((mixed ^ (mixed >> 29)) * _ODD[2]).sum())


def _indices(values: Any) -> list[Tensor]:
    return [t for t in tensors_in(values) if t.dtype in INDICES and is_plain(t)]


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _owner(function: Any) -> Any:
    """By what a region is known in the next step: its module, or its code."""
    modules = (found for found in _bound(function) if isinstance(found, nn.Module))
    function = _innermost(function)
    return next(modules, getattr(function, "__code__", type(function)))


def _bound(value: Any, deep: int = 8) -> Iterator[Any]:
    """What a function finds: its module, arguments of partials, and what closures hold."""
    if deep and isinstance(value, tuple | list):
        for one in value:
            yield from _bound(one, deep - 1)
    elif deep and isinstance(value, functools.partial):
        yield from _bound((value.func, value.args, value.keywords), deep - 1)
    elif deep and isinstance(value, MethodType):
        yield from _bound((value.__self__, value.__func__), deep - 1)
    elif deep and isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield from _bound(cell.cell_contents, deep - 1)
            except ValueError:  # it is empty
                continue
    else:
        yield value
