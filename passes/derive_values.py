"""Pass 4: what can be made again from packed operands needs no copy of its own.

The input of a linear layer is often a cheap function of something that is packed anyway: the layer
norm before it keeps its own input, GELU its own. Where a faithful codec keeps that input, the
linear layer reads ``layer_norm(unpack(...))``: one packed copy serves the norm and all that is
behind it, down to the next op that mixes elements.

Requires: decisions whose formats are settled. Ensures: every derived value comes, through rows with
``derive``, from packed copies, from tensors that are kept whole, and from what is alive anyway.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from dropit_fx.codecs import CODEC
from dropit_fx.core_types import Decision, Plan, Site
from dropit_fx.op_table import bind, rule_of
from dropit_fx.passes.share_packed import by_site


def derive_values(plan: Plan) -> Plan:
    """Replaces packed copies by recipes, where the config asks for it."""
    bodies = {name: derive_values(body) for name, body in plan.bodies.items()}
    if not plan.config.derive:
        return replace(plan, bodies=bodies)
    reads = {d.read.label: d for d in plan.decisions}
    nodes = {n.name: n for n in plan.module.graph.nodes}
    decisions: list[Decision] = []
    for site, mine in by_site(plan.sites, plan.decisions):
        for decision in mine:
            if _may_change(decision, site):
                source = producer(nodes[decision.read.node], str(decision.read.source), plan)
                if source is not None and derivable(source, reads, plan):
                    decision = replace(
                        decision,
                        codec="derived",
                        options={},
                        nbytes=0,
                        pack=f"derived {source.name}",
                        derived=source.name,
                    )
                    reads[decision.read.label] = decision
            decisions.append(decision)
    return replace(plan, decisions=tuple(decisions), bodies=bodies)


def _may_change(decision: Decision, site: Site) -> bool:
    """Packed by value for a preset's rule; a rule of the user's own says how to keep it."""
    read = decision.read
    return (
        decision.packed
        and decision.pack is not None
        and not decision.own
        and not CODEC[decision.codec].slope
        and read.source != read.node  # its own result: the op makes it before anyone can derive it
        and not site.alive
    )


def producer(reader: fx.Node, name: str, plan: Plan) -> fx.Node | None:
    """The node with a row that made the elements which ``reader`` sees as ``name``.

    Views of all elements are seen through; None where nothing is known to have made them, or where
    they were written to in between.
    """
    facts = plan.values
    if (reader.name, name) in facts.stale:
        return None
    node = next(n for n in reader.all_input_nodes if n.name == name)
    while node.name in facts.views:
        viewed = facts.views[node.name]
        node = next(n for n in node.all_input_nodes if n.name == viewed)
    return node if rule_of(node) is not None else None


def derivable(node: fx.Node, reads: dict[str, Decision], plan: Plan) -> bool:
    """Whether ``node``'s result can be made again in the backward from what is there anyway."""
    rule = rule_of(node)
    if rule is None or rule.derive is None:
        return False
    bound = bind(rule, node.args, node.kwargs, node.target)
    if bound is None:
        return False
    for name, value in bound.items():
        if not isinstance(value, fx.Node) or value.name in plan.values.alive:
            continue
        decision = reads.get(f"{node.name}.{name}")
        if decision is not None and is_base(decision):
            continue
        source = producer(node, value.name, plan)
        if source is None or not derivable(source, reads, plan):
            return False
    return True


def is_base(decision: Decision) -> bool:
    """Whether other values may be made from what this read keeps."""
    if not decision.read.wanted:
        return False
    if not decision.packed:
        return True
    return decision.codec in CODEC and CODEC[decision.codec].faithful(decision.options)
