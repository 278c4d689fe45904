"""The pass behind the cut: saved inputs are returned as they are, not as copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from dropit_fx.private import STRIDES, VISIBLE, CustomGraphPass, get_hash_for_files
from dropit_fx.private_inductor import takes_several_passes


class _InTurn(CustomGraphPass):
    """Several passes as one, where inductor takes no list."""

    def __init__(self, passes: tuple[Callable[[fx.Graph], None], ...]) -> None:
        self.passes = passes

    def uuid(self) -> Any:
        """Part of the compile caches' keys; None where one of the passes has none."""
        keys = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return keys if all(keys) else None

    def __call__(self, graph: fx.Graph) -> None:
        """Runs them."""
        for one in self.passes:
            one(graph)


def in_turn(given: Any, last: CustomGraphPass) -> Any:
    """Inductor's option for a pass over its graphs: what is given (one, several, None), then ours.

    Inductor takes a list from 2.13 on.
    """
    before = tuple(given) if isinstance(given, list | tuple) else (given,) if given else ()
    if takes_several_passes():
        return [*before, last]
    return _InTurn((*before, last)) if before else last


class ReturnInputsAsTheyAre(CustomGraphPass):
    """Keeps inductor from saving channels-last copies of weights.

    Inductor lays out every ancestor of a convolution channels-last, saved weights and inputs among
    them: the backward is then handed a copy of each, which stays in memory beside the original.
    Marked as outputs that the user sees, they are returned as they are; the forward's own copy is
    freed when it is done.
    """

    def uuid(self) -> Any:
        """Part of the compile caches' keys."""
        return get_hash_for_files((__file__,))

    def __call__(self, graph: fx.Graph) -> None:
        """Marks the outputs of ``graph`` that are its inputs."""
        out = graph.find_nodes(op="output")[0]
        visible = out.meta.get(VISIBLE)
        if visible is None or STRIDES not in out.meta:
            return
        inputs = [
            i for i, n in enumerate(out.args[0]) if isinstance(n, fx.Node) and n.op == "placeholder"
        ]
        out.meta[VISIBLE] = sorted({*visible, *inputs})
