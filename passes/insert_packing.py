"""Pass 4: put the pack node before the first reader, and swap each reader for its packed call.

Requires: decisions whose pack keys are settled. Ensures: every packed decision stands in the graph,
    and
nothing else changed; in-place ops that are packed run out of place, with later readers redirected.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from dropit_fx.core_types import Decision, OpRule, Plan
from dropit_fx.op_table import bind, is_inplace
from dropit_fx.packed_call import PACKED_OPS, pack


def insert_packing(plan: Plan) -> Plan:
    """Rewrites ``plan.module`` (and the nested graphs) in place."""
    graph = plan.module.graph
    nodes = {n.name: n for n in graph.nodes}
    packed = [d for d in plan.decisions if d.packed]
    if packed:
        _hoist_attributes(graph)
    order = {n: i for i, n in enumerate(graph.nodes)}
    operands: dict[str, dict[str, Any]] = defaultdict(dict)
    groups: dict[str, list[Decision]] = defaultdict(list)
    for decision in packed:
        if decision.pack is not None:
            groups[decision.pack].append(decision)
        else:
            operands[decision.read.node][decision.read.operand] = decision.codec
    for group in groups.values():
        node = _insert_pack(graph, nodes, order, group)
        for decision in group:
            operands[decision.read.node][decision.read.operand] = node
    for name, packs in operands.items():
        rule = next(d.read.rule for d in packed if d.read.node == name)
        assert rule is not None
        _swap(graph, nodes[name], packs, rule, order)
    for body in plan.bodies.values():
        insert_packing(body)
    graph.lint()
    plan.module.recompile()
    return plan


def _hoist_attributes(graph: fx.Graph) -> None:
    """Moves parameter look-ups to the top, so that a shared pack can name every weight."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if node is not first:
            first.prepend(node)


def _insert_pack(
    graph: fx.Graph, nodes: dict[str, fx.Node], order: dict[fx.Node, int], group: list[Decision]
) -> fx.Node:
    first = min((nodes[d.read.node] for d in group), key=order.__getitem__)
    lead = next(d for d in group if d.read.node == first.name)
    needed: dict[fx.Node, None] = {}
    for decision in group:
        rule, read = decision.read.rule, decision.read.read
        assert rule is not None
        assert read is not None
        reader = nodes[decision.read.node]
        bound = bind(rule, reader.args, reader.kwargs) or {}
        for name in read.needed_by:
            value = bound.get(name)
            if isinstance(value, fx.Node) and order[value] < order[first]:
                needed[value] = None
    source = nodes[str(lead.read.source)]
    autocast = lead.read.rule is not None and lead.read.rule.autocast
    with graph.inserting_before(first):
        node = graph.call_function(
            pack, (source, tuple(needed), lead.codec, dict(lead.options)), {"autocast": autocast}
        )
    node.meta = {k: v for k, v in first.meta.items() if k in ("nn_module_stack", "stack_trace")}
    order[node] = order[first]  # behind an in-place op, its source is redirected too
    return node


def _swap(
    graph: fx.Graph, node: fx.Node, packs: dict[str, Any], rule: OpRule, order: dict[fx.Node, int]
) -> None:
    with graph.inserting_after(node):
        kwargs = {**node.kwargs, "packed": packs}
        new = graph.call_function(PACKED_OPS[rule.name], node.args, kwargs)
    new.meta = dict(node.meta)
    order[new] = at = order[node]
    written = node.args[0] if is_inplace(node, bind(rule, node.args, node.kwargs) or {}) else None
    node.replace_all_uses_with(new)
    if isinstance(written, fx.Node):
        # out of place now: who read the written tensor afterwards reads the result
        written.replace_all_uses_with(
            new, delete_user_cb=lambda user: user is not new and order.get(user, -1) > at
        )
    graph.erase_node(node)
    new.name = node.name  # decisions and reports go by name
