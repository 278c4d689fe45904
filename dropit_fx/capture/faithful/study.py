"""What a model does in both modes: what no graph can do is refused, the rest is compared."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dropit_fx.capture.faithful.hooks import INSIDE, NotCarried, called, is_torchs, place_of_forward
from dropit_fx.capture.faithful.one_run import Meaning, difference, meaning, named
from dropit_fx.capture.provenance import error_line, first_line
from dropit_fx.capture.untouched import Change, has_own_train, untouched
from dropit_fx.private import HOOK_DICTS, FakeTensor, compiling_state_context, pytree

log = logging.getLogger(__name__)
_MODES = ("eval", "training")


LOOKS = 3  # at what seems to draw: another thread may have drawn meanwhile


class Study:
    """What a model does in both modes, against which its graphs are held.

    Args:
        model: As the user has it; it is left so.
        args: Example inputs.
        kwargs: Example keyword inputs.

    Raises:
        NotCarried: In its own mode it does what no graph does: assigns attributes, draws in Python
            or NumPy, gives a tensor a hook.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs, self.training = args, kwargs, model.training
        self._of = model
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # torch.nn's own modules ask (`k is v`) to do the same by fewer ops
        own = type(model).__module__.startswith("torch.nn.")
        self._shared = not own and len({*map(id, tensors)}) < len(tensors)
        self._names = frozenset(n for n, _ in named(model))
        self._model: dict[bool, Meaning | str] = {}
        for training in (self.training, not self.training):
            with _in_mode(model, training):
                self._model[training] = self._look(model, training)

    def _look(self, model: nn.Module, training: bool) -> Meaning | str:
        """What it does in one mode, or why that is not known."""
        for _ in range(LOOKS):
            found: Meaning | None = None
            failed: Exception | None = None
            with untouched(model, generators=training == self.training) as seen:
                try:
                    found = meaning(model, called(model), self.args, self.kwargs)
                except Exception as error:  # the user's code ran: anything can be raised
                    failed = error
            if not seen.chance:
                break
        changes = [c for c in seen.changes if not _is_benign(model, c)]
        reason = ""
        if found is not None and found.lost:
            reason = found.lost[0]
        elif found is not None and found.attached:
            place = place_of_forward(model)
            reason = f"a tensor is given an attribute, {found.attached[0]}, in {place}"
        elif seen.chance:
            reason = f"it draws from {seen.chance[0]}, in {place_of_forward(model)}"
        elif changes:
            reason = _assigned(model, changes[0])
        elif type(failed).__name__ == "DynamicOutputShapeException":
            assert failed is not None
            reason = _sized_by_values(model, failed)
        if reason and training == self.training:
            raise NotCarried(reason) from failed
        if reason and found is not None:
            log.warning("in %s mode, %s: the graph leaves that out", _MODES[training], reason)
        if found is not None:
            return found
        assert failed is not None
        return (
            "cannot be shown to be so, since the model does not run on fake tensors of the"
            f" example's shapes: {error_line(failed)}: {first_line(failed)}"
        )

    def structure(self) -> Any:
        """The tree spec of what the model gives back; None where that depends on the mode."""
        found = [m.structure for m in self._model.values() if isinstance(m, Meaning)]
        return found[0] if found and all(one == found[0] for one in found) else None

    def difference(self, graph: nn.Module, training: bool, exported: bool = False) -> str:
        """What ``graph`` does otherwise than the model in this mode; ``""`` for nothing.

        Args:
            graph: A graph module with the model's parameters.
            training: The mode to look at.
            exported: It comes from ``torch.export``. A model's code may ask whether it is exported,
                and do the same by other ops then: what it does when told so counts as well.
        """
        model = self._model[training]
        if isinstance(model, str):
            return model
        with _in_mode(graph, training):
            found = meaning(graph, graph.forward, self.args, self.kwargs, self._names)
        wrong = difference(model, found)
        if not wrong and self._shared:
            return self._differs_for_one(graph, training)
        if not wrong or not exported:
            return wrong
        with _in_mode(self._of, training), untouched(self._of), compiling_state_context():
            told = meaning(self._of, self._of.forward, self.args, self.kwargs)
        return "" if not difference(told, found) else wrong

    def _differs_for_one(self, graph: nn.Module, training: bool) -> str:
        """What it does otherwise where inputs are one tensor, as in the example."""
        found = []
        for module, names in ((self._of, None), (graph, self._names)):
            with _in_mode(module, training), untouched(module):
                run = meaning(module, module.forward, self.args, self.kwargs, names, shared=True)
            found.append(run)
        wrong = difference(*found)
        hint = "; that is where inputs are one tensor: have the example give each its own"
        return wrong and wrong + hint


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Puts a module in training or eval mode for a while, if it is not."""
    if module.training == training:
        yield
        return
    with untouched(module, values=has_own_train(module)):  # which is the user's own then
        module.train(training)
        yield


def _assigned(model: nn.Module, change: Change) -> str:
    """Says which attribute, of which module, is assigned where."""
    owner = model.get_submodule(change.module)
    found = f"{_whose(change.module, owner)} changes {change.attribute!r} while it runs"
    return f"{found}, in {place_of_forward(owner)} (a cache: call the model once)"


def _sized_by_values(model: nn.Module, error: Exception) -> str:
    """Says which module makes something in a size that depends on values, and where."""
    names = {m: n for n, m in model.named_modules()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    running = [m for f in frames if isinstance(m := f.f_locals.get("self"), nn.Module)]
    owner = next((m for m in reversed(running) if m in names), model)
    made = f"{_whose(names[owner], owner)} makes a tensor in a size that depends on values"
    return f"{made}, in {error_line(error)}"


def _whose(name: str, module: nn.Module) -> str:
    return f"module '{name}' ({type(module).__name__})" if name else "the model itself"


def _is_benign(model: nn.Module, change: Change) -> bool:
    """A memory of results, PyTorch's own bookkeeping, or what its hooks make of parameters."""
    if hasattr(change.new, "cache_info"):
        return True
    if change.attribute.endswith(".grad"):  # of parameters that are fake already: our own backward
        return True
    if isinstance(change.new, FakeTensor) and change.old is change.new:
        return True  # fake already, and written: the proof compares what is written
    owner, attribute = model.get_submodule(change.module), change.attribute
    if type(owner).__module__.startswith("torch.nn.") and attribute.startswith("_flat_weight"):
        return True  # of recurrent layers
    parameters = dict(owner.named_parameters(recurse=False))
    made = any(f"{attribute}_{end}" in parameters for end in ("orig", "g"))
    moved = vars(type(owner)).get(INSIDE, ())
    return made and any(map(is_torchs, (*moved, *vars(owner)[HOOK_DICTS[0]].values())))
