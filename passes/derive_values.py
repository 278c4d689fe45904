"""Pass 4: what can be made again from packed operands needs no copy of its own.

The input of a linear layer is often a cheap function of something that is packed anyway: the layer
norm before it keeps its own input, GELU its own. Where a faithful codec keeps that input, the
linear layer reads ``layer_norm(unpack(...))``: one packed copy serves the norm and all that is
behind it, down to the next op that mixes elements.

A recipe unpacks at most ``COPIES`` tensors. Without that bound the sum at the end of each residual
block would be made again from all the blocks before it, for each of its readers, and a compiler
that finds what these have in common keeps all the unpacked tensors from the first use to the last.

Requires: decisions whose formats are settled. Ensures: every derived value comes, through rows with
``derive``, from packed copies, from tensors that are kept whole, and from what is alive anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from dropit_fx.codecs import CODEC
from dropit_fx.core_types import Decision, Plan, Site
from dropit_fx.op_table import CHECKPOINT, bind, derivable_rule_of
from dropit_fx.passes.share_packed import by_site, packed_bytes

FAITHFUL_BITS = 4  # the fewest that the codecs call faithful
COPIES = 2  # the factors of a gated product, the summands behind a downsampling block


def derive_values(plan: Plan) -> Plan:
    """Replaces packed copies by recipes, where the config asks for it."""
    bodies = {name: derive_values(body) for name, body in plan.bodies.items()}
    plan = replace(plan, bodies=bodies)
    return _in_fewest_bytes(plan) if plan.config.derive else plan


def _in_fewest_bytes(plan: Plan) -> Plan:
    """With the formats as they were asked for, or finer ones from which more can be derived.

    Other values are made from four bits, not from three: then each needs a copy of its own, and
    fewer bits for one tensor would take more bytes in all.
    """
    asked = _derive(plan)
    if plan.config.force or not any(_finer(d) != d for d in plan.decisions):
        return asked
    finer = _derive(replace(plan, decisions=tuple(map(_finer, plan.decisions))))
    nodes = {n.name: n for n in plan.module.graph.nodes}
    bases, used = bases_of(finer), set[str]()
    for d in finer.decisions:
        used |= (copies(nodes[d.derived], finer, bases) or set()) if d.derived else set()
    back = [
        old if not new.derived and new.pack not in used else new
        for old, new in zip(plan.decisions, finer.decisions, strict=True)
    ]
    finer = replace(finer, decisions=tuple(back))
    fewer = packed_bytes(list(finer.decisions)) < packed_bytes(list(asked.decisions))
    return finer if fewer else asked


def _finer(decision: Decision) -> Decision:
    """The copy in the fewest bits that others may be made from, where that frees memory still."""
    if not _by_value(decision) or not decision.options.get("bits"):
        return decision
    codec, read, options = CODEC[decision.codec], decision.read, decision.options
    finer = options | {"bits": FAITHFUL_BITS}
    if codec.faithful(options) or not codec.faithful(finer):
        return decision
    more = codec.nbytes(read.numel, read.dtype, finer)
    nbytes = decision.nbytes + more - codec.nbytes(read.numel, read.dtype, options)
    if nbytes >= read.numel * read.dtype.itemsize:
        return decision
    return replace(decision, options=finer, nbytes=nbytes)


def _derive(plan: Plan) -> Plan:
    nodes = {n.name: n for n in plan.module.graph.nodes}
    bases = bases_of(plan)
    decisions: list[Decision] = []
    for site, mine in by_site(plan.sites, plan.decisions):
        for decision in mine:
            if _may_change(decision, site):
                reader, name = nodes[decision.read.node], str(decision.read.source)
                source = made_by(reader, name, plan)
                unpacked = None if source is None else copies(source, plan, bases)
                if source is not None and unpacked is not None and len(unpacked) <= COPIES:
                    bases.packed.pop(source.name, None)
                    decision = replace(
                        decision,
                        codec="derived",
                        options={},
                        nbytes=0,
                        pack=f"derived {source.name}",
                        derived=source.name,
                    )
            decisions.append(decision)
    return replace(plan, decisions=tuple(decisions))


def _may_change(decision: Decision, site: Site) -> bool:
    """Packed by value for a preset's rule; a rule of the user's own says how to keep it.

    What a checkpointed region reads has to be in its forward what it is, to the last bit.
    """
    derivable = _by_value(decision) and decision.read.rule is not CHECKPOINT
    return derivable and not decision.own and not site.alive


def _by_value(decision: Decision) -> bool:
    known = decision.pack is not None and decision.codec in CODEC
    return decision.packed and known and not CODEC[decision.codec].slope


def made_by(reader: fx.Node, name: str, plan: Plan) -> fx.Node | None:
    """The node that made the elements which ``reader`` sees as ``name``, or gives as its result.

    Views of all elements are seen through; None where they were written to in between.
    """
    facts = plan.values
    if reader.name == name:
        return reader
    if (reader.name, name) in facts.stale:
        return None
    node = next(n for n in reader.all_input_nodes if n.name == name)
    while node.name in facts.views:
        viewed = facts.views[node.name]
        node = next(n for n in node.all_input_nodes if n.name == viewed)
    return node


@dataclass
class Bases:
    """What the backward has whatever is derived, by the name of the node that made it."""

    packed: dict[str, Decision] = field(default_factory=dict)  # faithful copies
    whole: set[str] = field(default_factory=set)


def bases_of(plan: Plan) -> Bases:
    """The values that others may be made from."""
    nodes = {n.name: n for n in plan.module.graph.nodes}
    bases = Bases(whole=set(plan.values.alive))
    for decision in plan.decisions:
        read = decision.read
        if read.source is None or not read.wanted or read.read is None or read.bits is not None:
            continue
        maker = made_by(nodes[read.node], read.source, plan)
        if maker is None:
            continue
        if not decision.packed:
            bases.whole.add(maker.name)
        elif _by_value(decision) and CODEC[decision.codec].faithful(decision.options):
            bases.packed.setdefault(maker.name, decision)
    return bases


def recipe(node: fx.Node, plan: Plan, bases: Bases) -> dict[str, Decision | fx.Node] | None:
    """How ``node``'s result can be made again in the backward.

    Returns:
        For the operands that are not there as they are: the packed copy, or the node whose result
        is derived in turn. None where an operand is lost, or the op costs more than a pass over
        memory.
    """
    rule = None if node.name in plan.values.lost else derivable_rule_of(node)
    bound = bind(rule, node.args, node.kwargs, node.target) if rule is not None else None
    if bound is None:
        return None
    found: dict[str, Decision | fx.Node] = {}
    for name, value in bound.items():
        if not isinstance(value, fx.Node) or value.name in bases.whole:
            continue
        maker = made_by(node, value.name, plan)
        if maker is None:
            return None
        if maker.name in bases.whole:
            continue
        if maker.name in bases.packed:
            found[name] = bases.packed[maker.name]
        elif recipe(maker, plan, bases) is not None:
            found[name] = maker
        else:
            return None
    return found


def copies(node: fx.Node, plan: Plan, bases: Bases) -> set[str] | None:
    """The packed copies that are unpacked to make ``node``'s result again; None: it cannot be."""
    found = recipe(node, plan, bases)
    if found is None:
        return None
    names: set[str] = set()
    for how in found.values():
        if isinstance(how, Decision):
            names.add(str(how.pack))
        else:
            names |= copies(how, plan, bases) or set()
    return names
