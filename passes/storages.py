"""The values of a graph that runs: what keeps their storages, what made them, which are alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropit_fx.capture.fake import inner_tensors, is_made_of_tensors
from dropit_fx.capture.provenance import node_where
from dropit_fx.holders import stays_with_caller
from dropit_fx.passes.plan import Elements, Keeper, Values
from dropit_fx.private import (
    EXAMPLE_VALUE,
    STATIC_INPUT,
    TorchDispatchMode,
    free_unbacked_symbols,
    pytree,
    storage_id,
    version,
)
from dropit_fx.runtime.tensor_spec import has_gaps

FREE = (Keeper.PARAMETER, Keeper.BUFFER, Keeper.INPUT)  # the caller's, and no part of a step
_ALIVE = (*FREE, Keeper.CONSTANT)  # before and after


@dataclass
class Storage:
    """All that is known of one storage while the graph runs."""

    owner: str
    nodes: list[fx.Node] = field(default_factory=list)  # whose outputs live in it
    kept_by: Keeper | None = None


class Storages:
    """Follows the values of one graph: ``enter`` before each node runs, ``leave`` behind it.

    Args:
        state: The storages of parameters (True) and of buffers (False).
        given: What the caller calls with.

    Attributes:
        unseen: Storages that are written to where nobody sees it -> where that is.
    """

    def __init__(self, state: Mapping[int, bool], given: Any) -> None:
        tensors = (t for t in pytree.tree_leaves(given) if isinstance(t, Tensor))
        self._callers = {storage_id(t) for t in tensors if stays_with_caller(t)}
        keepers = {s: Keeper.PARAMETER if own else Keeper.BUFFER for s, own in state.items()}
        self._known = {s: Storage(owner=kind, kept_by=kind) for s, kind in keepers.items()}
        self.unseen: dict[int, str] = {}
        self._before: dict[int, int] = {}  # versions of a node's operands, before it runs,
        self._watched: dict[int, int] = {}  # and of their storages
        self._alive: dict[str, Keeper] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._seen: dict[tuple[str, str], Elements] = {}
        self._makers: dict[Elements, str] = {}
        # What is first seen of each storage counts its versions (a `.data` of it counts anew for
        # itself); and all its nodes.
        self._first: dict[int, tuple[Tensor, list[str]]] = {}
        self._differentiable: set[tuple[str, str]] = set()

    def of(self, tensor: Tensor, owner: str = "") -> Storage:
        """What is known of a tensor's storage; of a new one, whose it is."""
        return self._known.setdefault(storage_id(tensor), Storage(owner=owner))

    def keeper(self, tensor: Tensor) -> Keeper | None:
        """What keeps a tensor's storage, if that is known and anything does."""
        known = self._known.get(storage_id(tensor))
        return None if known is None else known.kept_by

    def is_free(self, tensor: Tensor) -> bool:
        """Whether a tensor is the caller's: a parameter, a buffer or an input."""
        return storage_id(tensor) in self._callers or self.keeper(tensor) in FREE

    def enter(self, n: fx.Node, env: Mapping[fx.Node, Any], operands: list[Tensor]) -> None:
        """Notes what a node is given."""
        self._before = {id(t): version(t) for t in operands}
        for operand in n.all_input_nodes:
            value = env[operand]
            if isinstance(value, Tensor):
                self._seen[n.name, operand.name] = self.now(value)
                if value.requires_grad:
                    self._differentiable.add((n.name, operand.name))
        self._watched = self._versions_of(operands)

    def before(self, x: Tensor) -> Elements:
        """An operand of the node as it was before the node ran."""
        written = self._watched.get(storage_id(x))
        return self.now(x) if written is None else elements(x, written)

    def now(self, x: Tensor) -> Elements:
        """A tensor as it is."""
        first, _ = self._first.get(storage_id(x), (x, ()))
        return elements(x, version(first))

    def written(self, operands: list[Tensor]) -> set[int]:
        """The storages among the operands that the node has written to."""
        return {storage_id(t) for t in operands if version(t) != self._before[id(t)]}

    def leave(self, n: fx.Node, operands: list[Tensor], result: Any) -> None:
        """Notes what a node has made, and what it has written."""
        now = self._versions_of(operands)
        for t in operands:  # a write through `.data` is not counted: autograd reads what it finds
            storage = storage_id(t)
            unseen = now.get(storage) == self._watched.get(storage, -1)
            if version(t) > self._before[id(t)] and unseen:
                self.unseen.setdefault(storage, node_where(n) or n.name)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                home = self.of(tensor, n.name)
                home.nodes.append(n)
                home.kept_by = home.kept_by or self._keeper(n, tensor)
                if home.kept_by in FREE and is_made_of_tensors(tensor):
                    for part in inner_tensors(tensor).values():
                        self.of(part, n.name).kept_by = home.kept_by
        self._describe(n, result)

    def _keeper(self, n: fx.Node, tensor: Tensor) -> Keeper | None:
        """What keeps a storage in which a node's result lives."""
        if n.op == "placeholder" and storage_id(tensor) in self._callers:
            is_parameter = isinstance(n.meta.get(EXAMPLE_VALUE, tensor), nn.Parameter)
            return Keeper.PARAMETER if is_parameter else Keeper.INPUT
        return {"get_attr": Keeper.CONSTANT, "output": Keeper.OUTPUT}.get(n.op)

    def _versions_of(self, tensors: list[Tensor]) -> dict[int, int]:
        """Of the storages of some tensors, as whoever holds what was first seen of them knows."""
        known = {storage_id(t) for t in tensors} & self._first.keys()
        return {storage: version(self._first[storage][0]) for storage in known}

    def _describe(self, n: fx.Node, result: Any) -> None:
        """What later passes ask of a value: does it stay, what made it, is it the same value?"""
        if not isinstance(result, Tensor):
            if not pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), result):
                self._alive[n.name] = Keeper.NUMBER
            return
        self._shapes[n.name] = tuple(result.shape)
        alike = result.detach()  # counts on with the tensor
        self._first.setdefault(storage_id(result), (alike, []))[1].append(n.name)
        keeper = self.of(result).kept_by
        if keeper in _ALIVE:
            self._alive[n.name] = keeper
        made = self.now(result)
        if not any(self._seen.get((n.name, m.name)) == made for m in n.all_input_nodes):
            self._makers.setdefault(made, n.name)  # else a view of what another has made

    def values(self, lost: set[str]) -> Values:
        """What was found, when the graph has run.

        Args:
            lost: Values that no row makes again.
        """
        versions = {storage: version(t) for storage, (t, _) in self._first.items()}
        for storage in self.unseen:  # nothing shows that it is what it was
            versions[storage] = -1
            lost = lost | set(self._first[storage][1])
        return Values(
            alive=self._alive,
            shapes=self._shapes,
            seen=self._seen,
            makers=self._makers,
            versions=versions,
            lost=frozenset(lost),
            differentiable=frozenset(self._differentiable),
        )


class Chance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether an op draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs or {})


def elements(x: Tensor, written: int) -> Elements:
    """What ``x`` shows, at a version of its storage."""
    dims = zip(x.stride(), x.shape, strict=True)
    strided = tuple(sorted(d for d in dims if d[1] != 1)) if has_gaps(x) else None
    at: Any = x.storage_offset()
    place = str(at) if free_unbacked_symbols(at) else int(at)  # `narrow` from a tensor's value on
    return Elements(storage_id(x), place, x.numel(), strided, x.dtype, written)


def is_state(n: fx.Node) -> bool:
    """Whether an input of a graph of Dynamo's is a parameter or a buffer of the model."""
    key, mark = STATIC_INPUT
    return mark in n.meta.get(key, ()) or isinstance(n.meta.get(EXAMPLE_VALUE), nn.Parameter)
