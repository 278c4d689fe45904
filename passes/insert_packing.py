"""Pass 6: put the pack node before the first reader, and swap each reader for its packed call.

``packed=`` of a call names every read of its row: a copy, a codec with its options, or ``keep``.

Requires: decisions that say which copies they share. Ensures: every packed decision stands in the
graph, and nothing else changed; in-place ops that are packed run out of place, with later readers
redirected. What choices of rows remember of earlier steps is held by the module.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from dropit_fx.kernels.row_norms import MEMORY, named
from dropit_fx.ops.rule import OpRule, Use
from dropit_fx.ops.table import CHECKPOINT, is_inplace
from dropit_fx.passes.derive_values import bases_of, recipe
from dropit_fx.passes.match_layers import called
from dropit_fx.passes.plan import Copy, Decision, Plan
from dropit_fx.passes.share_packed import is_in_graph
from dropit_fx.private import ORIGIN
from dropit_fx.runtime.copies import DROP, KEEP
from dropit_fx.runtime.packed_call import PACKED_OPS, derived, pack, unless_changed
from dropit_fx.runtime.regions import place_of, stand_in

ROW_NORMS = "dropit_row_norms"  # in ``meta`` of a module: what holds them that its packs name


def insert_packing(plan: Plan) -> Plan:
    """Rewrites ``plan.module`` in place, and lets its regions read packed inputs."""
    writer = _Writer(plan)
    for node in list(plan.module.graph.nodes):
        if node.name in writer.by_node:
            writer.swap(node)
    memories = {d.options[MEMORY] for d in plan.decisions if d.packed and MEMORY in d.options}
    if memories:
        plan.module.meta[ROW_NORMS] = tuple(map(named, sorted(memories)))
    plan.module.graph.lint()
    plan.module.recompile()
    return plan


class _Writer:
    """Writes the decisions of one plan into its graph, node by node in their order."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph = plan.module.graph
        self.by_node: dict[str, list[Decision]] = defaultdict(list)
        self.by_copy: dict[Copy, list[Decision]] = defaultdict(list)
        for decision in plan.decisions:
            named = decision.read.read is not None  # else made inside the op, and let go
            if named and is_in_graph(decision):
                self.by_node[decision.read.node].append(decision)
                if decision.copy is not None:
                    self.by_copy[decision.copy].append(decision)
        if self.by_node:
            self._hoist_attributes()
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self.copies: dict[Copy, fx.Node] = {}  # and the node that makes each
        self.packed_of: dict[fx.Node, fx.Node] = {}  # of such a node: the value as it saw it
        # of calls that give their packed copies besides, and the name of the value before
        self.results: dict[fx.Node, str] = {}
        # the calls of rows as they stand in the graph, which changes
        self.calls = {name: dict(call.operands) for name, call in plan.calls.items()}
        # before anything changes: what each derived value is made from
        self.sources: dict[str, dict[str, Decision | str]] = {}
        self.statistics: dict[str, tuple[str, ...]] = {}
        self.read_by_derived: set[Copy] = set()
        self.nodes = {n.name: n for n in self.graph.nodes}  # by name: the value as it is now
        self.storages = {name: e.storage for (_, name), e in plan.values.seen.items()}
        self.bases = bases_of(plan)
        for decision in plan.decisions:
            if decision.derived and decision.derived not in self.sources:
                self._learn(decision.derived)

    def _hoist_attributes(self) -> None:
        """Moves parameter look-ups to the top, so that a shared pack can name every weight."""
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        for node in [n for n in self.graph.nodes if n.op == "get_attr"]:
            if node is not first:
                first.prepend(node)

    def _learn(self, name: str) -> None:
        """Notes what a derived value is made from, and what that is made from in turn."""
        rule = self.plan.calls[name].rule
        sources = recipe(name, self.plan, self.bases)
        assert sources is not None
        self.sources[name] = sources
        if name in self.by_node and rule.derive is not None:
            wanted = inspect.signature(rule.derive).parameters.keys() - self.calls[name].keys()
            self.statistics[name] = tuple(sorted(wanted))
        for source in sources.values():
            if isinstance(source, Decision):
                self.read_by_derived |= {source.copy} if source.copy else set()
            elif source not in self.sources:
                self._learn(source)

    def swap(self, node: fx.Node) -> None:
        """Replaces a reader by its packed call."""
        decisions = self.by_node[node.name]
        rule, bound = self.plan.calls[node.name].rule, self.calls[node.name]
        packed: dict[str, Any] = {}
        gives = {s: Copy(node.name, operand=s) for s in self.statistics.get(node.name, ())}
        for d in decisions:
            if d.copy is None or (d.read.operand == "result" and not d.derived):
                packed[d.read.operand] = (d.codec, dict(d.options))
                if d.copy is not None and (
                    len(self.by_copy[d.copy]) > 1 or d.copy in self.read_by_derived
                ):
                    gives["result"] = d.copy
            else:
                seen = bound.get(d.read.operand, node)
                packed[d.read.operand] = self._as_read(self._copy(d, node), seen, node)
        if rule is not CHECKPOINT:  # whose other inputs are arguments of the region
            packed |= _others(rule, bound, packed)
        args, kwargs = node.args, dict(node.kwargs)
        if node.target in rule.orders or is_inplace(node, {}):
            args, kwargs = tuple(bound.values()), {}
        kwargs["packed"] = packed
        if gives:
            kwargs["gives"] = tuple(gives)
        with self.graph.inserting_after(node):
            call = self.graph.call_function(PACKED_OPS[rule.name], args, kwargs)
        call.meta = dict(node.meta)
        self.order[call] = at = self.order[node]
        if rule is CHECKPOINT:
            _take_packed(self.plan.bodies[str(bound["body"].target)], tuple(packed))
        result = call
        if gives:
            result = self._item(call, 0, at)
            result.meta = dict(node.meta)
            self.results[result] = node.name
            for i, copy in enumerate(gives.values()):
                self.copies[copy] = self._item(call, i + 1, at)
                self.packed_of[self.copies[copy]] = result
        written = next(iter(bound.values())) if is_inplace(node, bound) else None
        self._replace(node, result, list(node.users))
        if isinstance(written, fx.Node) and written.name in self.plan.values.shapes:
            # out of place now: who read the written tensor afterwards reads the result
            later = [u for u in written.users if u is not call and self.order.get(u, -1) > at]
            self._replace(written, result, later)
        if (own := self.copies.get(Copy(node.name))) is not None:  # made again of its operands
            self.packed_of[own] = result
        self.graph.erase_node(node)
        call.name = node.name  # decisions and reports go by name
        self.nodes[node.name] = result

    def _replace(self, old: fx.Node, new: fx.Node, users: list[fx.Node]) -> None:
        """Lets ``users`` read ``new``, in the graph and in what is known of their arguments."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user in users)
        for user in users:
            known = self.calls.get(user.name, {})
            for name, value in known.items():
                known[name] = map_arg(value, lambda n: new if n is old else n)

    def _item(self, call: fx.Node, index: int, order: int) -> fx.Node:
        with self.graph.inserting_after(call):
            item = self.graph.call_function(operator.getitem, (call, index))
        self.order[item] = order
        return item

    def _copy(self, decision: Decision, reader: fx.Node) -> fx.Node:
        """The node that makes the packed copy; inserted before its first reader."""
        copy = decision.copy
        assert copy is not None
        if copy not in self.copies:
            with self.graph.inserting_before(reader):
                if decision.derived:
                    self.copies[copy] = self._derived(decision.derived, reader)
                else:
                    self.copies[copy] = self._pack(copy, decision, reader)
        if decision.derived:
            self._need(self.copies[copy], [decision])
        return self.copies[copy]

    def _as_read(self, copy: fx.Node, seen: fx.Node, reader: fx.Node) -> fx.Node:
        """The copy for who sees the value as ``seen``, on other ways than the copy was made on."""
        packed = self.packed_of[copy]
        if seen is packed:
            return copy
        between = set(self._changing(packed)) ^ set(self._changing(seen))
        if not between:
            return copy
        views = tuple((self._is_part(n), n, self._seen_by(n)) for n in sorted(between))
        with self.graph.inserting_before(reader):
            checked = self.graph.call_function(unless_changed, (copy, views))
        checked.meta = _origin(reader)
        self.order[checked] = self.order[reader]
        return checked

    def _changing(self, node: fx.Node | None) -> Iterator[fx.Node]:
        """Such ops on the way to a value, from first operand to first operand."""
        while node is not None:
            if called(node) in (*_VIEW_OR_COPY, *_PARTS) and self._seen_by(node) is not None:
                yield node
            node = self._looks_at(node)

    def _seen_by(self, node: fx.Node) -> fx.Node | None:
        """The tensor that such an op looks at: for one of several parts, what all are parts of.

        None for some of several parts, and for what is in memory of its own.
        """
        if not self._is_tensor(node):
            return None
        before = self._looks_at(node)
        while before is not None and not self._is_tensor(before):
            before = None if "gives" in before.kwargs else self._looks_at(before)
        own = self.storages.get(self.results.get(node, node.name))
        same = before and own == self.storages.get(self.results.get(before, before.name))
        return before if same else None

    def _is_part(self, node: fx.Node) -> bool | None:
        """Whether such an op may show a part, else a copy; None: a graph of its own does either."""
        before = self._looks_at(node)
        if before is not None and any(map(self._is_graph, before.all_input_nodes)):
            return None
        return called(node) in _PARTS

    def _looks_at(self, node: fx.Node) -> fx.Node | None:
        """The first operand of a node, which is no graph that it runs."""
        return next((n for n in node.all_input_nodes if not self._is_graph(n)), None)

    def _is_graph(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and node.name not in self.plan.values.shapes

    def _is_tensor(self, node: fx.Node) -> bool:
        known = node.name in self.plan.values.shapes and "gives" not in node.kwargs
        return known or node in self.results

    def _pack(self, copy: Copy, lead: Decision, reader: fx.Node) -> fx.Node:
        row = lead.read.row
        source = self._source(lead, reader)
        node = self.graph.call_function(
            pack,
            (source, (), lead.codec, dict(lead.options)),
            {"autocast": row is not None and row.autocast == "lower"},
        )
        node.meta = _origin(reader)
        self.packed_of[node] = source
        self.order[node] = self.order[reader]  # behind an in-place op, its source is redirected too
        self._need(node, self.by_copy[copy])
        return node

    def _source(self, lead: Decision, reader: fx.Node) -> fx.Node:
        """What to pack before ``reader``: as ``lead`` sees it, or what that is a view of."""
        at = self.order[reader]
        source: fx.Node = self.calls[lead.read.node][lead.read.operand]
        if self.order[source] > at:
            assert lead.read.identity is not None
            source = self.nodes[self.plan.values.makers[lead.read.identity]]
        return source

    def _need(self, copy: Any, decisions: list[Decision]) -> None:
        """Names the tensors whose gradients read a copy, through derived values too."""
        if copy.target is derived:
            for inner in copy.args[2].values():
                self._need(unchecked(inner), decisions)
        if copy.target is not pack:
            return
        needed = dict.fromkeys(copy.args[1])
        for d in decisions:
            assert d.read.read is not None
            bound = self.calls[d.read.node]
            for name in d.read.read.needed_by:
                value = bound.get(name)
                if isinstance(value, fx.Node) and self.order[value] < self.order[copy]:
                    needed[value] = None
        copy.args = (copy.args[0], tuple(needed), *copy.args[2:])

    def _derived(self, name: str, reader: fx.Node) -> fx.Node:
        rule, bound = self.plan.calls[name].rule, self.calls[name]
        packs: dict[str, fx.Node] = {}
        for operand, source in self.sources[name].items():
            if isinstance(source, str):
                copy = Copy(source)
                if copy not in self.copies:
                    self.copies[copy] = self._derived(source, reader)
                made = self.copies[copy]
            else:
                made = self._copy(source, reader)
            packs[operand] = self._as_read(made, bound[operand], reader)
        for statistic in self.statistics.get(name, ()):
            packs[statistic] = self.copies[Copy(name, operand=statistic)]
        like = self.nodes[name]
        if like is reader:  # its own result: pointwise, so the operand has the same layout
            like = next(v for v in bound.values() if isinstance(v, fx.Node))
        args = (rule.name, tuple(bound.values()), packs, like)
        node = self.graph.call_function(derived, args)
        node.meta = _origin(reader)
        self.packed_of[node] = self.nodes[name]
        self.order[node] = self.order[reader]
        return node


# What gives the same elements for the example, and others at another layout (then it copies) or in
# other sizes (then they are a part, or repeated): by name
_VIEW_OR_COPY = (
    *("reshape", "reshape_as", "flatten", "ravel", "contiguous"),
    *("to", "type", "type_as", "float", "half", "double", "bfloat16"),
)
_PARTS = (
    *("getitem", "narrow", "slice", "select", "diagonal", "unfold", "as_strided"),
    *("expand", "expand_as", "broadcast_to"),
)


def unchecked(copy: fx.Node) -> fx.Node:
    """The node that makes a copy, behind what checks how it is seen."""
    return copy.all_input_nodes[0] if copy.target is unless_changed else copy


def _take_packed(body: Plan, operands: tuple[str, ...]) -> None:
    """Lets a checkpointed region read packed forms of ``operands``, its last arguments."""
    graph = body.module.graph
    inputs = graph.find_nodes(op="placeholder")
    last = inputs[-1]
    for operand in operands:
        x = inputs[place_of(operand)]
        with graph.inserting_after(last):
            last = graph.placeholder(f"packed_{x.name}")
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            again = graph.call_function(stand_in, (x, last))
        x.replace_all_uses_with(again, delete_user_cb=lambda user, own=again: user is not own)
    graph.lint()
    body.module.recompile()


def _others(rule: OpRule, bound: dict[str, Any], packed: dict[str, Any]) -> dict[str, Any]:
    """The reads of a call that no decision packs: kept, or let go where no value is read."""
    return {
        read.operand: DROP if read.use is Use.SHAPE or read.beside else KEEP
        for read in rule.reads
        if read.operand not in packed
        and read.is_of(bound)
        and (read.operand not in rule.inputs or isinstance(bound[read.operand], fx.Node))
    }


def _origin(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k in ORIGIN}
