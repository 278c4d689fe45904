"""Saved means saved: the partitioner guard for compiled models, and the reading of what it made.

AOTAutograd traces forward and backward into one joint graph and cuts it where the least has to be
saved. To that cut, packing and unpacking are ordinary ops: it may save the dense tensor and pack it
in the backward, or unpack in the forward and save the result. :class:`KeepPacked` wraps the
partitioner: packed tensors count as forward outputs while the cut is made, and unpacking is tied to
the backward.

With ``torch._functorch.config.activation_memory_budget`` below 1, packed tensors stay what is saved
and the rest is made again, as far as the budget asks for it. It keeps its meaning: a share of what
the *dense* model saves. Random numbers are never drawn again for it: functorch would draw others,
but in checkpointed regions.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from dropit_fx.private import (
    BACKWARD,
    CUSTOM,
    IN_BACKWARD,
    OUTPUT_TRACES,
    OUTPUTS,
    PLACE,
    POLICY,
    STRIDES,
    VALUE,
    VISIBLE,
    CustomGraphPass,
    CustomPartitionerFn,
    OpOverload,
    at_memory_budget,
    get_hash_for_files,
    hint,
    memory_budget,
    min_cut_rematerialization_partition,
    must_recompute,
    schema,
    storage_id,
    takes_several_passes,
)
from dropit_fx.runtime.copies import PACKING

log = logging.getLogger(__name__)

_dropit = torch.ops.dropit
PACK_OPS = (
    _dropit.sparsify.default,
    _dropit.sparsify_channels.default,
    _dropit.sample.default,
    _dropit.pack_uint.default,
    _dropit.encode_steps.default,
    _dropit.pack_between.default,
)
UNPACK_OPS = (
    _dropit.unsparsify.default,
    _dropit.unsparsify_channels.default,
    _dropit.unpack_uint.default,
    _dropit.decode_steps.default,
    _dropit.apply_mask.default,
)

TRIES = 3  # cuts at a memory budget
LEAST = 1e-9  # of a budget: at 0 functorch saves the model's inputs, whatever must be saved
SLACK = 1.05  # a budget is met within 5 %, as functorch meets its own
Graphs = tuple[fx.GraphModule, fx.GraphModule]  # forward and backward


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


class KeepPacked(CustomPartitionerFn):
    """The partitioner guard.

    For a rewritten model:
    ``torch.compile(rewritten, options={"custom_partitioner_fn": KeepPacked()})``.

    Args:
        base: The partitioner to wrap.
        note: Called with each :class:`Partition`.
        dense_bytes: What the dense model saves, in bytes (``report(rewritten).dense_bytes``): a
            memory budget is a fraction of this. None: estimated from the tensors that are packed,
            which leaves out those that are derived, so that more is recomputed than need be.
    """

    def __init__(
        self,
        base: Callable[..., Graphs] | None = None,
        note: Callable[[Partition], None] | None = None,
        dense_bytes: int | None = None,
    ) -> None:
        self.base = base or functools.partial(
            min_cut_rematerialization_partition, compiler="inductor"
        )
        self.note = note
        self.dense_bytes = dense_bytes

    def uuid(self) -> Any:
        """Part of the compile caches' keys."""
        inner = self.base.uuid() if isinstance(self.base, CustomPartitionerFn) else ""
        return get_hash_for_files((__file__,)), inner, self.dense_bytes

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Graphs:
        """Partitions ``gm``, a joint graph, into forward and backward."""
        count = kwargs.pop("num_fwd_outputs")
        out = gm.graph.find_nodes(op="output")[0]
        flat = list(out.args[0])
        described = list(out.meta.get(OUTPUTS, [None] * len(flat)))
        packed: list[fx.Node] = []
        sources: dict[int, fx.Node] = {}
        drawn = False
        for node in gm.graph.nodes:
            if _draws(gm, node) and not must_recompute(node):
                node.meta[POLICY] = CheckpointPolicy.MUST_SAVE
                drawn = True
            if not _packs(node) or must_recompute(node):
                continue  # (a checkpointed region is recomputed whole, packing included)
            sources |= {_storage(n): n for n in node.all_input_nodes if not _packs(n)}
            readers = [u for u in node.users if not _packs(u)]
            if readers and node not in flat and _storage(node) not in sources | {-1: node}:
                maker = node.args[0] if node.target is operator.getitem else node
                for kept in (node, maker):
                    kept.meta[POLICY] = CheckpointPolicy.MUST_SAVE  # whatever the budget
                packed.append(node)
                for reader in readers:
                    if reader is not out and not must_recompute(reader):
                        reader.meta[PLACE] = IN_BACKWARD  # nothing else reads a packed tensor
        out.args = ((*flat[:count], *packed, *flat[count:]),)
        out.meta[OUTPUTS] = described[:count] + [None] * len(packed) + described[count:]
        static = kwargs.get("static_lifetime_input_indices") or ()

        def cut(budget: float) -> tuple[Graphs, Partition]:
            fixed = count + len(packed)
            with at_memory_budget(budget):
                graphs = self.base(gm, joint_inputs, num_fwd_outputs=fixed, **kwargs)
                if lost := _saved_and_overwritten(graphs[0], fixed):
                    _copy_before_they_are_overwritten(gm, lost)
                    graphs = self.base(gm, joint_inputs, num_fwd_outputs=fixed, **kwargs)
            _drop_outputs(graphs[0], slice(count, count + len(packed)))
            _read_what_was_packed(graphs[0])
            return graphs, read_partition(*graphs, count, static)

        budget = memory_budget()
        if drawn:
            budget = max(budget, LEAST)
        if not packed or budget == 1:
            graphs, partition = cut(budget)
        else:
            graphs, partition = self._within(budget, cut, sources.values())
        if self.note is not None:
            self.note(partition)
        return graphs

    def _within(
        self,
        budget: float,
        cut: Callable[[float], tuple[Graphs, Partition]],
        sources: Iterable[fx.Node],
    ) -> tuple[Graphs, Partition]:
        """The cut that keeps the packed tensors and recomputes others as far as it is asked to."""
        graphs, partition = cut(1)
        packed, saved = partition.packed_bytes, partition.saved_bytes
        dense = self.dense_bytes
        if dense is None:
            dense = saved - packed + sum(_nbytes(n) for n in sources)
        asked = budget * dense
        if saved <= SLACK * asked:
            return graphs, partition
        if packed > SLACK * asked:
            log.warning(
                "activation_memory_budget = %g asks for %.2f MiB; the packed tensors, which are"
                " never recomputed, take %.2f MiB",
                *(budget, asked / 2**20, packed / 2**20),
            )
        # what is left for the others; functorch counts in shares of what is saved without a budget,
        # and saves somewhat more than it was given
        share = max(asked - packed, 0) / saved
        for _ in range(TRIES):
            found = cut(max(share, LEAST))
            if found[1].saved_bytes < partition.saved_bytes:
                graphs, partition = found
            if partition.saved_bytes <= max(asked, packed):
                break
            share *= max(asked - packed, 0) / (found[1].saved_bytes - packed)
        return graphs, partition


def _saved_and_overwritten(forward: fx.GraphModule, fixed: int) -> set[str]:
    """Inputs that a backward is to make something from again, and that the forward writes into."""
    given = set(forward.graph.find_nodes(op="placeholder"))
    writes = forward.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    written = [n.args[0] for n in writes if n.args[0] in given]
    if not written:
        return set()
    out = forward.graph.find_nodes(op="output")[0]
    saved = {_storage(n) for n in out.args[0][fixed:] if isinstance(n, fx.Node)} - {-1}
    return {n.name for n in written if _storage(n) in saved}  # itself, or a view of it


def _copy_before_they_are_overwritten(joint: fx.GraphModule, names: Collection[str]) -> None:
    """Has the ops of a joint graph read copies of these inputs, and the copies never recomputed.

    PyTorch's partitioner saves such an input itself, and its new values are read in the backward:
    compiled by inductor, the gradient is wrong without a word.
    """
    graph = joint.graph
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for given in [n for n in graph.find_nodes(op="placeholder") if n.name in names]:
        with graph.inserting_before(first):
            held = graph.call_function(torch.ops.aten.clone.default, (given,))
        value = given.meta[VALUE]
        with value.fake_mode:
            held.meta |= {VALUE: value.clone(), POLICY: CheckpointPolicy.MUST_SAVE}
        given.replace_all_uses_with(
            held,
            delete_user_cb=lambda user, held=held: (
                user is not held and user.target is not torch.ops.aten.copy_.default
            ),
        )
    joint.recompile()


def _draws(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node draws random numbers: run twice, it gives two results."""
    target = node.target
    if not isinstance(target, OpOverload):
        bodies = [n for n in node.all_input_nodes if n.op == "get_attr"]
        parts = [getattr(gm, str(n.target), None) for n in bodies]
        return any(
            _draws(part, inner)
            for part in parts
            if isinstance(part, fx.GraphModule)
            for inner in part.graph.nodes
        )
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    # attention is tagged for its dropout, which most calls do without
    names = [a.name for a in schema(target).arguments]
    if "dropout_p" not in names:
        return True
    at = names.index("dropout_p")
    given = node.args[at] if at < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return not (isinstance(given, int | float) and given == 0)


def _drop_outputs(forward: fx.GraphModule, extra: slice) -> None:
    """Takes outputs away that were added for the time of the cut."""
    made = forward.graph.find_nodes(op="output")[0]
    for key in (OUTPUTS, OUTPUT_TRACES):
        if key in made.meta:
            kept = list(made.meta[key])
            del kept[extra]
            made.meta[key] = kept
    results = list(made.args[0])
    del results[extra]
    made.args = (tuple(results),)
    forward.recompile()


def _read_what_was_packed(forward: fx.GraphModule) -> None:
    """Lets checkpointed regions read their inputs, not what the backward will make of them."""
    for node in forward.graph.nodes:
        if node.target in UNPACK_OPS and must_recompute(node):
            part = node.args[0]
            made = part if part.target in PACK_OPS else part.args[0]
            if made.target in PACK_OPS:
                node.replace_all_uses_with(made.args[0])
    forward.graph.eliminate_dead_code()
    forward.recompile()


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


def read_partition(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    num_fwd_outputs: int,
    static: Sequence[int] = (),
) -> Partition:
    """Reads what a partition saves. Graph inputs (parameters among them) are not counted."""
    placeholders = set(forward.graph.find_nodes(op="placeholder"))
    free = {_storage(n) for n in placeholders}
    saved: dict[int, SavedValue] = {}
    for node in forward.graph.find_nodes(op="output")[0].args[0][num_fwd_outputs:]:
        value = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor) or node in placeholders or _storage(node) in free:
            continue
        origin = node.args[0] if node.target.__name__ == "getitem" else node
        saved[_storage(node)] = SavedValue(
            name=node.name,
            nbytes=_nbytes(node),
            packed=_packs(node),
            source=str(origin.target),
        )
    return Partition(
        saved=tuple(saved.values()),
        packs_in_backward=tuple(
            n.name
            for n in backward.graph.nodes
            if n.op != "placeholder" and _packs(n) and not must_recompute(n)
        ),
        unpacks_in_forward=tuple(n.name for n in forward.graph.nodes if _unpacks(n)),
    )


def _packs(node: fx.Node) -> bool:
    """Whether a codec's ``pack`` made the node.

    From the forward's nodes, marks are copied to nodes of the backward with the same number.
    """
    marked = (node.meta.get(CUSTOM) or {}).items() >= PACKING.items()
    return marked and node.meta.get(PLACE) not in BACKWARD


def _unpacks(node: fx.Node) -> bool:
    """Whether a node of a forward reads a packed tensor."""
    if node.op == "output" or _packs(node):
        return False
    own = {_storage(n) for n in node.all_input_nodes if _packs(n)} - {-1}
    return bool(own - {_storage(s) for n in node.all_input_nodes for s in _sources(n)})


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a pack reads."""
    if not _packs(node):
        return [node]
    return [s for n in node.all_input_nodes for s in _sources(n)]


def _storage(node: fx.Node) -> int:
    value = node.meta.get(VALUE)
    return storage_id(value) if isinstance(value, Tensor) else -1


def _nbytes(node: fx.Node) -> int:
    """Bytes of the whole storage; 0 for what is no tensor."""
    value = node.meta.get(VALUE)
    return hint(value.untyped_storage().nbytes()) if isinstance(value, Tensor) else 0
