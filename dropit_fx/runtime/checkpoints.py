"""Checkpoints in eager mode, whatever turned them on: their inputs are saved by hooks that pack.

``torch.utils.checkpoint`` saves what a region is made again from as any saved tensor. It is asked
then which model's call this is: the call stack says so, and nothing has to be put back after an
error, or kept apart for threads. Checkpoints in a region are left to it: it makes them again.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dropit_fx.private import dynamo_skips, pytree
from dropit_fx.private_hooks import (
    forward_hooks,
    hooks_in_force,
    modules_at_work,
    of_a_region,
    region_at_work,
    save_checkpoints_in,
)
from dropit_fx.runtime.decisions import Decisions
from dropit_fx.runtime.saved_copies import Copies
from dropit_fx.runtime.saved_hooks import Held, Packing, outside_of_ours
from dropit_fx.runtime.saved_notes import Notes

_FORWARDS: set[CodeType] = set()  # of models that are packed: wrappers may call these
NO_CHECKPOINT = (
    "pack_checkpoints: {name} ran forward in training mode, and no checkpoint ran in it, so that"
    " nothing is packed. Turn checkpoints on: model.gradient_checkpointing_enable() or"
    " TrainingArguments(gradient_checkpointing=True) (transformers),"
    " model.set_grad_checkpointing() (timm), model.enable_gradient_checkpointing() (diffusers),"
    " checkpoint_wrapper(block) or torch.utils.checkpoint.checkpoint(block, x) (PyTorch). Those"
    ' inside of compiled code are packed by torch.compile(model, backend="dropit"). Without'
    " checkpoints, `with dropit_fx.pack_saved():` around the forward packs what it saves."
)
COMPILED = (
    "pack_checkpoints packs checkpoints that run in eager mode, and this model is compiled with"
    ' them inside. Use torch.compile(model, backend="dropit") without pack_checkpoints, which packs'
    " them too; or compile what runs inside of a checkpoint, not around it."
)


class CheckpointPacker:
    """A forward hook of a model, by which its checkpoints know that their inputs are packed.

    It copies and pickles with the model; a copy has notes of its own.

    Args:
        options: Of the codec ``quant``.
        look: As for ``Notes``.
        trust_indices: As for ``pack_checkpoints``.
    """

    def __init__(
        self,
        options: dict[str, Any],
        look: Callable[[], tuple[str, str]],
        trust_indices: bool = False,
    ) -> None:
        self.options, self._look, self._trust_indices = options, look, trust_indices
        self._begin()

    def _begin(self) -> None:
        self.copies = threading.local()
        self.notes: Notes | None = None  # of the first forward
        self._noting = self._seen = self._warned = False
        # by region, and by what a region is known by in the next step
        self._watched = weakref.WeakKeyDictionary[Any, Decisions]()
        self._follow = weakref.WeakKeyDictionary[Any, bool]()
        install()

    def __getstate__(self) -> dict[str, Any]:
        """The settings."""
        names = "options", "_look", "_trust_indices"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The settings again, with no notes."""
        self.__dict__.update(state)
        self._begin()

    def before(self, module: nn.Module, args: Any) -> None:
        """The forward pre-hook: what exists now was not made by the forward.

        Raises:
            RuntimeError: The model is compiled as a whole.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        if self.notes is None and module.training and torch.is_grad_enabled():
            self.notes, self._noting = Notes(self._look), True

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook.

        Raises:
            RuntimeError: No checkpoint has run yet, though the model trains.
        """
        if torch.compiler.is_compiling():
            return
        self._noting = False
        self.notes = self.notes if self._seen else None
        tensors = (t for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
        if not self._seen and module.training and any(t.requires_grad for t in tensors):
            raise RuntimeError(NO_CHECKPOINT.format(name=type(module).__name__))

    @contextmanager
    def saving(self, model: nn.Module, region: Any, args: Any) -> Iterator[Callable[[Any], Any]]:
        """Packs what is saved in a block, but for what the function that it wraps saves."""
        self._seen = True
        around = hooks_in_force()
        if of_a_region(around):  # whose inputs these depend on
            outer = self._watched.get(region_at_work(around))
            if outer is not None and region is not None:
                self._watched[region] = outer
                outer.watch(region)
            yield lambda function: function if outer is None else outer.checked(function)
            return
        if not hasattr(self.copies, "shared"):
            self.copies.shared = Copies()
        if self.notes is None:  # nothing has called `before`
            self.notes, self._noting = Notes(self._look), True
        notes = self.notes if self._noting else None
        hooks = outside_of_ours(around)
        packing = Packing(self.options, self.copies.shared, hooks, notes, at_checkpoint=True)
        trusted = self._trust_indices
        decisions = Decisions(model, packing, trusted, self._has_warned, self._follow)
        if region is not None:
            self._watched[region] = decisions
            decisions.begin(region, args)

        def wrapped(function: Any) -> Any:
            run = decisions.checked(function)

            def paused(*args: Any) -> Any:
                packing.paused = True
                try:
                    return run(*args)
                finally:
                    packing.paused = False

            return paused

        with saved_tensors_hooks(packing.pack, self.unpack):
            yield wrapped

    def _has_warned(self) -> bool:
        warned, self._warned = self._warned, True
        return warned

    def unpack(self, held: Held) -> Tensor:
        """The unpack hook: a backward ends the first forward, where nothing else does."""
        self._noting = False
        return held.restored()


@contextmanager
def _saving(region: Any, args: Any) -> Iterator[Callable[[Any], Any]]:
    """Around the saving of a checkpoint's inputs, and around all of a reentrant one."""
    if torch.is_grad_enabled():
        for module in modules_at_work(_FORWARDS):
            for hook in forward_hooks(module):
                if isinstance(hook, CheckpointPacker):
                    with hook.saving(module, region, args) as wrapped:
                        yield wrapped
                    return
    yield lambda function: function


for _name in ("before", "__call__", "saving", "unpack"):
    dynamo_skips(vars(CheckpointPacker)[_name])


def may_be_called_as_such(model: nn.Module) -> None:
    """Has checkpoints know a model also where its ``forward`` is called, and not the model."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is not None:
        _FORWARDS.add(code)


@functools.cache
def install() -> None:
    """Has every checkpoint of this process look for a model that packs; once."""
    save_checkpoints_in(_saving)
