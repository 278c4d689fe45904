"""A model is afterwards what it was: what a run or a trace leaves in it is seen, and undone.

A run on fake tensors, and a tracer, execute the model's Python. What that assigns (a cache, a
counter, the last activation, what a hook appends to a list) would stay in the user's model as fake
tensors and proxies. :func:`untouched` notes everything that the model's code can reach before such
a run, tells what the run changed, and puts it back: the objects themselves are restored in place,
so that whoever else holds them sees no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from dropit_fx.capture.untouched.chance import same_state, sources
from dropit_fx.capture.untouched.parts import Change
from dropit_fx.capture.untouched.reach import Reached

__all__ = ["Change", "Untouched", "has_own_train", "untouched"]


def has_own_train(model: nn.Module) -> bool:
    """Whether a module of the model's has a ``train()`` of its own, which may write into weights.

    Adapters merge theirs into the weights that they stand beside. A block that changes the mode of
    such a model copies its values.
    """
    return any(type(m).train is not nn.Module.train for m in model.modules())


@dataclass
class Untouched:
    """What happened inside an :func:`untouched` block.

    Attributes:
        changes: What had changed when the block ended, before it was undone.
        chance: Names of the sources of random numbers that the block drew from.
    """

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
    kept = Reached(values, {id(m): n for n, m in model.named_modules()})
    for name, module in model.named_modules():
        kept.note(module, name, "", 0)
    states = [(s, s.state()) for s in sources(generators)]
    seen = Untouched()
    try:
        yield seen
    finally:
        seen.changes = kept.changes()
        kept.restore()
        for source, state in states:
            if not same_state(source.state(), state):
                seen.chance.append(source.name)
                source.restore(state)
