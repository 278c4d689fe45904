"""What a checkpointed region decides by values: the experts of a token, the rows that are left.

Made again from a rounded input, a region may decide otherwise: sizes differ then, or, which nobody
would notice, tokens go through other experts. What is decided shows in what autograd saves, which
are the indices: integers that the region makes itself. What it was given, and buffers, are none.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dropit_fx.holders import kept_by, nodes_behind, tensors_in
from dropit_fx.private import storage_id
from dropit_fx.private_hooks import function_of_region, watch_region
from dropit_fx.runtime.saved_hooks import Packing, is_plain

INDICES = (torch.int64, torch.int32, torch.int16)
REASON = "its region saves indices that it makes, of which some may depend on it"
KEPT = (
    "pack_checkpoints: {name} saves indices that it makes itself, as routers of experts do. Made"
    " again from a rounded input it may choose others, so its inputs are kept exactly. If none of"
    " them depends on activations (relative positions, masks), or if the region saves what it"
    " chooses by (a selective checkpoint of the router's logits), say so and have them packed:"
    " pack_checkpoints(model, trust_indices=True)."
)
REENTRANT = (
    "pack_checkpoints: {name} saves indices that it makes itself, as routers of experts do. Made"
    " again from a rounded input it may choose others, and the gradient would be that of another"
    " model. Use use_reentrant=False: the inputs of such a region are kept exactly then. If no"
    " index depends on activations (relative positions, masks): pack_checkpoints(model,"
    " trust_indices=True)."
)
OTHERWISE = (
    "pack_checkpoints: {name} is made again from a rounded input and computes something else than"
    " it did: it decides by values how much it computes, as where x[x > 0] is taken{trusted}. Leave"
    " its checkpoint out, have it save what it decides by (create_selective_checkpoint_contexts),"
    " or train without pack_checkpoints. PyTorch says: {error}"
)


class Decisions:
    """Watches one region.

    Args:
        model: That packs its checkpoints.
        packing: What packs the inputs of this region, or of the one around it.
        trusted: Whether indices are taken to be the same for a rounded input.
        said: Called before a warning; whether it is to be given.
    """

    def __init__(
        self, model: nn.Module, packing: Packing, trusted: bool, said: Callable[[], bool]
    ) -> None:
        self._model, self._packing, self._trusted, self._said = model, packing, trusted, said

    def watch(self, region: Any, args: Any) -> None:
        """Keeps the inputs of a region exactly as soon as it saves indices, before its backward."""
        function = function_of_region(region)
        given = {*self._storages(args)}  # these live while it runs, and the set holds none of them

        def saved(x: Tensor) -> None:
            if (
                self._trusted
                or not self._packing.rounds
                or x.dtype not in INDICES
                or not is_plain(x)
            ):
                return
            if storage_id(x) not in given.union(self._found_by(function)):
                self._packing.keep_exactly(REASON)
                if not self._said():
                    warnings.warn(KEPT.format(name=self._name(function)), stacklevel=2)

        def failed(error: Exception) -> NoReturn:
            if not self._packing.rounds:
                raise error
            trusted = ", or an index that trust_indices=True trusts" if self._trusted else ""
            first = str(error).partition("\n")[0]
            said = OTHERWISE.format(name=self._name(function), error=first, trusted=trusted)
            raise type(error)(said) from error

        watch_region(region, saved, failed)

    def refuse(self, function: Any, args: Any, output: Any) -> None:
        """Looks at a reentrant region that was made again.

        Raises:
            RuntimeError: It saves indices that it made, and what it was made from was rounded.
        """
        if self._trusted or not self._packing.rounds:
            return
        saved = [t for node in nodes_behind(output, 0) for _, t in kept_by(node)]
        made = {*self._storages(saved)}
        if made and made - {*self._storages(args), *self._found_by(function)}:
            raise RuntimeError(REENTRANT.format(name=self._name(function)))

    def _found_by(self, function: Any) -> Iterator[int]:
        """The storages that a region finds without being given them, and those of buffers."""
        yield from self._storages([*_bound(function), *self._model.buffers()])

    def _storages(self, values: Any) -> Iterator[int]:
        indices = (t for t in tensors_in(values) if t.dtype in INDICES and is_plain(t))
        yield from map(storage_id, indices)

    def _name(self, function: Any) -> str:
        names = {module: name for name, module in self._model.named_modules()}
        for found in _bound(function):
            if isinstance(found, nn.Module) and names.get(found):
                return f"the checkpointed layer {names[found]!r} ({type(found).__name__})"
        while isinstance(function, functools.partial):
            function = function.func
        named = function if isinstance(function, FunctionType) else type(function)
        return f"the checkpointed {named.__module__}.{named.__qualname__}"


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
