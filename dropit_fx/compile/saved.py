"""What a partition saves, read from its two graphs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from dropit_fx.capture.fake import real_result
from dropit_fx.private import BACKWARD, CUSTOM, PLACE, VALUE, hint, must_recompute, storage_id
from dropit_fx.runtime.copies import AGAIN, PACKING


@dataclass(frozen=True, kw_only=True)
class SavedValue:
    """One tensor that the compiled forward hands to the backward."""

    name: str
    nbytes: int  # of its whole storage
    packed: bool  # made by a pack op
    source: str  # the op that made it


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What a partition saves, as read from its two graphs.

    Attributes:
        saved: Every saved storage but parameters and inputs.
        packs_in_backward: Pack ops that ended up in the backward: their dense input was saved.
        unpacks_in_forward: Unpack ops that ended up in the forward: their dense result was saved.
    """

    saved: tuple[SavedValue, ...]
    packs_in_backward: tuple[str, ...]
    unpacks_in_forward: tuple[str, ...]

    @property
    def saved_bytes(self) -> int:
        """Bytes between forward and backward."""
        return sum(v.nbytes for v in self.saved)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed tensors among them."""
        return sum(v.nbytes for v in self.saved if v.packed)


def read_partition(
    forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int
) -> Partition:
    """Reads what a partition saves. Graph inputs (parameters among them) are not counted."""
    placeholders = set(forward.graph.find_nodes(op="placeholder"))
    free = {storage(n) for n in placeholders}
    saved: dict[int, SavedValue] = {}
    for node in forward.graph.find_nodes(op="output")[0].args[0][num_fwd_outputs:]:
        value = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor) or node in placeholders or storage(node) in free:
            continue
        origin = node.args[0] if node.target.__name__ == "getitem" else node
        saved[storage(node)] = SavedValue(
            name=node.name, nbytes=nbytes_of(node), packed=packs(node), source=str(origin.target)
        )
    return Partition(
        saved=tuple(saved.values()),
        packs_in_backward=tuple(
            n.name
            for n in backward.graph.nodes
            if n.op != "placeholder" and packs(n) and not must_recompute(n)
        ),
        unpacks_in_forward=tuple(n.name for n in forward.graph.nodes if _unpacks(n)),
    )


def packs(node: fx.Node) -> bool:
    """Whether a codec's ``pack`` made the node.

    From the forward's nodes, marks are copied to nodes of the backward with the same number.
    """
    return _is_marked(node, PACKING) and node.meta.get(PLACE) not in BACKWARD


def is_made_again(node: fx.Node) -> bool:
    """Whether a packed call's backward makes the node of what was kept for it."""
    return _is_marked(node, AGAIN) and node.meta.get(PLACE) in BACKWARD


def _is_marked(node: fx.Node, mark: dict[str, str]) -> bool:
    return (node.meta.get(CUSTOM) or {}).items() >= mark.items()


def _unpacks(node: fx.Node) -> bool:
    """Whether a node of a forward reads a packed tensor."""
    if node.op == "output" or packs(node):
        return False
    own = {storage(n) for n in node.all_input_nodes if packs(n)} - {-1}
    return bool(own - {storage(s) for n in node.all_input_nodes for s in _sources(n)})


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a pack reads."""
    if not packs(node):
        return [node]
    return [s for n in node.all_input_nodes for s in _sources(n)]


def storage(node: fx.Node) -> int:
    """Identifies the storage of a node's value; -1 for what is no tensor."""
    value = node.meta.get(VALUE)
    return storage_id(value) if isinstance(value, Tensor) else -1


def nbytes_of(node: fx.Node) -> int:
    """Bytes of the whole storage; 0 for what is no tensor, or in a size that depends on values."""
    if not isinstance(node.meta.get(VALUE), Tensor):
        return 0
    nbytes = hint(_real(node).untyped_storage().nbytes())
    return nbytes if isinstance(nbytes, int) else 0


def _real(node: fx.Node) -> Tensor:
    """What stands in the storage of a node's value first, as large as it is on real tensors."""
    maker = node
    while seen := [n for n in maker.all_input_nodes if storage(n) == storage(maker)]:
        maker = seen[0]
    is_one = maker.target is operator.getitem
    op: Any = maker.args[0] if is_one else maker
    made = real_result(op.target, *map_arg((op.args, op.kwargs), lambda n: n.meta[VALUE]))
    one: Tensor = maker.meta[VALUE] if made is None else made[maker.args[1]] if is_one else made
    return one
