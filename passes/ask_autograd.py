"""Autograd is asked what it keeps of a run: by its hooks, and at its nodes for what these miss."""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from dropit_fx.holders import Box, attributes_of, grad_fn_of, next_sequence_number, nodes_behind
from dropit_fx.passes.plan import SavedRead
from dropit_fx.private import pytree, raw_saved, sequence_number, set_hooks_tracing, shows_saved

_MARK = "dropit_fx"  # in the metadata of the autograd nodes of each result


@dataclass
class Saved:
    """One tensor that autograd keeps. Holding it keeps its storage's id from being used again."""

    tensor: Tensor
    life: Callable[[], object]  # None when the graph that kept it is gone
    read: SavedRead | None = None
    owner: str = ""  # of its storage
    nbytes: int = 0  # at least, where the fake tensor is too small


class _Mark:
    """Tied to the autograd nodes of a result, it lives as long as one of them."""


class Behind(torch.autograd.Function):
    """Holds what is behind its inputs, as a checkpointed region of PyTorch does; ``apply(*xs)``."""

    @staticmethod
    def forward(*xs: Tensor) -> Tensor:
        """Nothing, in a dtype that autograd knows."""
        return xs[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing of the inputs themselves."""


class Autograd:
    """Notes what autograd keeps, node by node of a graph that runs.

    Attributes:
        lives: Of all that it has kept, the graph's inputs too.
        mark: Whether the autograd nodes of the last result are there still.
    """

    def __init__(self) -> None:
        self.lives: list[Callable[[], object]] = []
        self.mark: Callable[[], object] = lambda: None
        self._start = next_sequence_number()
        self._upto: list[tuple[int, fx.Node]] = []  # the last autograd node that each has made

    @contextmanager
    def noting(self) -> Iterator[list[Saved]]:
        """Yields a list of what is kept in a block, also where the caller switched hooks off.

        ``torch.compile`` does so while it splits a DistributedDataParallel model by its buckets.
        """
        noted: list[Saved] = []

        def note(tensor: Tensor) -> Box:
            box = Box(tensor.detach())  # the tensor itself would keep its own graph alive
            noted.append(Saved(box.tensor, weakref.ref(box)))
            self.lives.append(noted[-1].life)
            return box

        tracing = set_hooks_tracing(False)
        try:
            with saved_tensors_hooks(note, lambda box: box.tensor):
                yield noted
        finally:
            set_hooks_tracing(tracing)

    def mark_result(self, n: fx.Node, result: Any) -> None:
        """Ties a mark to the autograd nodes of a result: it goes when they go."""
        mark = _Mark()
        self.mark = weakref.ref(mark)
        highest = self._upto[-1][0] if self._upto else -1
        for tensor in pytree.tree_leaves(result):
            node = grad_fn_of(tensor) if isinstance(tensor, Tensor) else None
            if node is not None:
                # a node that made nothing here is older: an op that hands on its input
                marks: Any = node.metadata
                marks.setdefault(_MARK, []).append(mark)
                highest = max(highest, sequence_number(node))
        self._upto.append((highest, n))

    def unseen(self, out: Any) -> Iterator[tuple[fx.Node, Tensor, bool]]:
        """What autograd keeps from hooks and holds all the same, and whether it is a number.

        Numbers that it has wrapped; attributes of a custom function's context, and what the
        backward of one that Dynamo has traced finds in its closure. Read from the autograd nodes
        behind ``out``, which are numbered as they were made.
        """
        ends = [end for end, _ in self._upto]
        for node in nodes_behind(out, self._start):
            at = bisect.bisect_left(ends, sequence_number(node))
            if at == len(ends):
                continue
            n = self._upto[at][1]
            for _, value in raw_saved(node) if shows_saved() else ():
                if isinstance(value, Tensor) and not value.dim():
                    yield n, value, True
            for value in pytree.tree_leaves(attributes_of(node)):
                if isinstance(value, Tensor):
                    yield n, value, False
