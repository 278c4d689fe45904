"""State dicts of a rewritten model: what has a say in its own, saves and loads as it does.

A module may save and load otherwise than tensor by tensor: extra state, hooks, methods of its class
(old checkpoints of batch norm). No node of a graph tells of that. So what stands in its place in
the rewritten model lends it the tensors, and lets it do both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from dropit_fx.private import (
    LOADED_HOOKS,
    LoadsItself,
    buffers,
    has_say_in_state,
    lend_tensors,
    load_own,
    parameters,
)

STANDS_FOR = "_dropit_stands_for"  # holds that module, in a tuple: it is no submodule


class SavesAs(LoadsItself):
    """A module that saves and loads as another, if it stands for one (:func:`save_as`)."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module it stands for."""
        with _lent(self) as module:
            own: Any = super() if module is None else module
            return own.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads as that module does."""
        with _lent(self) as module:
            own: Any = super() if module is None else module
            return own.load_state_dict(*args, **kwargs)

    def load_as_part(self, *args: Any) -> None:
        """Loads its own tensors, where something larger is loaded."""
        with _lent(self) as module:
            if module is None:
                super().load_as_part(*args)
            else:
                load_own(module, *args)


@contextmanager
def _lent(ours: nn.Module) -> Iterator[nn.Module | None]:
    """The module that ``ours`` stands for, which has the tensors of ``ours`` meanwhile."""
    (module,) = vars(ours).get(STANDS_FOR, (None,))
    if module is None:
        yield None
        return
    held = dict(ours.named_modules(remove_duplicate=False))
    parts = dict(module.named_modules(remove_duplicate=False))
    with lend_tensors([(held[n], part) for n, part in parts.items() if n in held]):
        yield module


def _loaded(ours: nn.Module, incompatible_keys: Any) -> None:
    """The hooks of the other module, where something larger was loaded."""
    with _lent(ours) as module:
        hooks: dict[int, Any] = vars(module)[LOADED_HOOKS]
        for hook in list(hooks.values()):
            hook(module, incompatible_keys)


def save_as(ours: fx.GraphModule, model: nn.Module) -> None:
    """Lets ``ours``, which is made of ``model``, save and load as that does, and all parts too."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not has_say_in_state(module):
            continue
        if name not in dict(ours.named_modules(remove_duplicate=False)):  # nothing reads it
            ours.add_submodule(name, nn.Module())
        own = ours.get_submodule(name)
        if type(own) is nn.Module:
            own.__class__ = SavesAs
        if own is module or not isinstance(own, SavesAs):
            continue  # it is that module itself
        held = dict(own.named_modules(remove_duplicate=False))
        for inner, part in module.named_modules(remove_duplicate=False):
            for of in (parameters, buffers) if inner in held else ():  # also what is None
                for leaf, tensor in of(part).items():
                    of(held[inner]).setdefault(leaf, tensor)
        vars(own)[STANDS_FOR] = (module,)
        vars(own)[LOADED_HOOKS][0] = _loaded
