"""Saved means saved: the partitioner guard for compiled models.

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
import inspect
import logging
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from dropit_fx.compile.saved import (
    Partition,
    is_made_again,
    nbytes_of,
    packs,
    read_partition,
    storage,
)
from dropit_fx.private import (
    BACKWARD,
    IN_BACKWARD,
    OUTPUT_TRACES,
    OUTPUTS,
    PLACE,
    POLICY,
    VALUE,
    CustomPartitionerFn,
    OpOverload,
    get_hash_for_files,
    min_cut_rematerialization_partition,
    must_recompute,
    schema,
    to_copy,
)
from dropit_fx.private_inductor import at_memory_budget, memory_budget
from dropit_fx.runtime.regions import STANDS_FOR, bodies_of

log = logging.getLogger(__name__)

CASTS = (to_copy.default, torch.ops.prims.convert_element_type.default)
TRIES = 3  # cuts at a memory budget
LEAST = 1e-9  # of a budget: at 0 functorch saves the model's inputs, whatever must be saved
SLACK = 1.05  # a budget is met within 5 %, as functorch meets its own
Graphs = tuple[fx.GraphModule, fx.GraphModule]  # forward and backward


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
        return get_hash_for_files((__file__, inspect.getfile(Partition))), inner, self.dense_bytes

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Graphs:
        """Partitions ``gm``, a joint graph, into forward and backward."""
        count = kwargs.pop("num_fwd_outputs")
        originals = _take_stand_ins_out(gm)
        _make_again(gm)
        _cast_again(gm, kwargs.get("static_lifetime_input_indices") or ())
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
            if not packs(node) or must_recompute(node):
                continue  # (a checkpointed region is recomputed whole, packing included)
            sources |= {storage(n): n for n in node.all_input_nodes if not packs(n)}
            readers = [u for u in node.users if not packs(u)]
            if readers and node not in flat and storage(node) not in sources | {-1: node}:
                maker = node.args[0] if node.target is operator.getitem else node
                for kept in (node, maker):
                    kept.meta[POLICY] = CheckpointPolicy.MUST_SAVE  # whatever the budget
                packed.append(node)
                for reader in readers:
                    if reader is not out and not must_recompute(reader):
                        reader.meta[PLACE] = IN_BACKWARD  # nothing else reads a packed tensor
        # and what checkpointed regions read in the forward, where the graph has a stand-in of it
        extra = [*packed, *dict.fromkeys(_originals_of(gm.graph, originals).values())]
        out.args = ((*flat[:count], *extra, *flat[count:]),)
        out.meta[OUTPUTS] = described[:count] + [None] * len(extra) + described[count:]

        def cut(budget: float) -> tuple[Graphs, Partition]:
            fixed = count + len(extra)
            with at_memory_budget(budget):
                graphs = self.base(gm, joint_inputs, num_fwd_outputs=fixed, **kwargs)
                if lost := _saved_and_overwritten(graphs[0], fixed):
                    _copy_before_they_are_overwritten(gm, lost)
                    graphs = self.base(gm, joint_inputs, num_fwd_outputs=fixed, **kwargs)
            _drop_outputs(graphs[0], slice(count, fixed))
            _attend_once(graphs[1])
            _read_originals(graphs[0], originals)
            return graphs, read_partition(*graphs, count)

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
            dense = saved - packed + sum(nbytes_of(n) for n in sources)
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
    saved = {storage(n) for n in out.args[0][fixed:] if isinstance(n, fx.Node)} - {-1}
    return {n.name for n in written if storage(n) in saved}  # itself, or a view of it


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


def _cast_again(joint: fx.GraphModule, static: Collection[int]) -> None:
    """Has the backward cast parameters again, as packed calls do in eager mode under autocast.

    The partitioner would save the narrow copy, since what reads it there needs it in memory.
    """
    given = joint.graph.find_nodes(op="placeholder")
    writes = joint.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    written = {n.args[0] for n in writes}
    for parameter in [given[i] for i in static if given[i] not in written]:
        for node in parameter.users:
            if node.target in CASTS and _size(node) < _size(parameter) and _is_read_backwards(node):
                node.meta[POLICY] = CheckpointPolicy.MUST_RECOMPUTE


def _size(node: fx.Node) -> int:
    size: int = node.meta[VALUE].dtype.itemsize
    return size


def _is_read_backwards(node: fx.Node) -> bool:
    """Whether the backward reads a node or a view of it."""
    return any(
        user.meta.get(PLACE) in BACKWARD
        or (storage(user) == storage(node) and _is_read_backwards(user))
        for user in node.users
    )


def _make_again(joint: fx.GraphModule) -> None:
    """Has the backward make again what packed calls make again there of tensors that are kept.

    Where these are as they were in the forward (an input, what a config keeps dense), the
    partitioner finds the forward's nodes to be the same, leaves one of each pair, and would save
    its result as well.
    """
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}  # node of the backward -> the forward's that is left of both
    for node in joint.graph.nodes:
        if node.op != "call_function" or _draws(joint, node):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))
        alike = _first_alike(first, node, args, kwargs)
        if alike is node or alike.meta.get(PLACE) in BACKWARD:
            continue
        of_such = node.meta.get(PLACE) in BACKWARD and not same.keys().isdisjoint(node.args)
        if is_made_again(node) or of_such:  # a cast of it, say
            same[node] = alike
    for node, alike in same.items():
        if not same.keys() >= node.users.keys():
            alike.meta[POLICY] = CheckpointPolicy.MUST_RECOMPUTE


def _first_alike(first: dict[Any, fx.Node], node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    """The first node that calls the same with these arguments; ``first`` has those seen so far."""
    return first.setdefault((node.target, str(args), str(kwargs)), node)


def _attend_once(backward: fx.GraphModule) -> None:
    """Makes calls that are alike one, of ops that PyTorch takes to draw: attention without dropout.

    What is formed of attention's result reads that which attention's own backward makes again.
    """
    first: dict[Any, fx.Node] = {}
    for node in list(backward.graph.nodes):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            alike = _first_alike(first, node, node.args, node.kwargs)
            if alike is not node and not _draws(backward, node):
                node.replace_all_uses_with(alike)
                backward.graph.erase_node(node)
    backward.recompile()


def _draws(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node draws random numbers: run twice, it gives two results."""
    target = node.target
    if not isinstance(target, OpOverload):
        return any(_draws(body, n) for body in bodies_of(gm, node) for n in body.graph.nodes)
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


def _take_stand_ins_out(joint: fx.GraphModule) -> dict[str, str]:
    """Takes the ops away that say what a stand-in stands for; the names of both, of each."""
    found: dict[str, str] = {}
    for node in joint.graph.find_nodes(op="call_function", target=STANDS_FOR):
        value, original = node.args
        found[value.name] = original.name
        node.replace_all_uses_with(value)
        joint.graph.erase_node(node)
    return found


def _originals_of(graph: fx.Graph, originals: dict[str, str]) -> dict[fx.Node, fx.Node]:
    """Of each stand-in that a checkpointed region reads, what it stands for in the forward.

    A region inside of another reads a stand-in of a stand-in.
    """
    nodes = {n.name: n for n in graph.nodes}
    read = {v: o for v, o in originals.items() if v in nodes and must_recompute(nodes[v])}
    for value, original in read.items():  # in the order of the graph: the outer region's is known
        read[value] = read.get(original, original)
    return {nodes[value]: nodes[original] for value, original in read.items()}


def _read_originals(forward: fx.GraphModule, originals: dict[str, str]) -> None:
    """Lets checkpointed regions read their inputs, not what the backward will make of them."""
    for value, original in _originals_of(forward.graph, originals).items():
        value.replace_all_uses_with(original)
    forward.graph.eliminate_dead_code()
    forward.recompile()
