"""Pass 4: what can be made again from packed operands needs no copy of its own.

The input of a linear layer is often a cheap function of something that is packed anyway: the layer
norm before it keeps its own input, GELU its own. Where a faithful codec keeps that input, the
linear layer reads ``layer_norm(unpack(...))``: one packed copy serves the norm and all that is
behind it, down to the next op that mixes elements.

A recipe unpacks at most ``COPIES`` tensors; attention's result, which its own backward makes again
anyway, counts as one. Without that bound the sum at the end of each residual block would be made
again from all the blocks before it, for each of its readers, and a compiler that finds what these
have in common keeps all the unpacked tensors from the first use to the last.

Values have identities: an operand is what it was when its op ran, through views and in-place
writes; what cannot be shown to be the same keeps its copy.

Requires: decisions whose formats are settled. Ensures: every derived value comes, through rows with
``derive``, from packed copies, from tensors that are kept whole, and from what is alive anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from dropit_fx.codecs import CODEC, DERIVED
from dropit_fx.ops.rule import Use
from dropit_fx.ops.table import CHECKPOINT
from dropit_fx.passes.plan import Copy, Decision, Elements, Keeper, Plan, Site
from dropit_fx.passes.share_packed import (
    by_site,
    leave_what_does_not_pay,
    packed_bytes,
    swapped_nodes,
)
from dropit_fx.runtime.regions import COMPUTED

FAITHFUL_BITS = 4  # the fewest that the codecs call faithful
_LIFTED = "from the {} bits asked for, nothing could be made again: all would take more bytes"
_LOST = (
    f"a copy of its own: what it could be made again from has fewer than {FAITHFUL_BITS} bits, and"
    " more would take more bytes in all"
)
COPIES = 2  # the factors of a gated product, the summands behind a downsampling block


def derive_values(plan: Plan) -> Plan:
    """Replaces packed copies by recipes, where the config asks for it.

    With the formats as they were asked for, or finer ones from which more can be derived. Other
    values are made from four bits, not from three: then each needs a copy of its own, and fewer
    bits for one tensor would take more bytes in all.
    """
    if not plan.config.derive:
        return plan
    plan = _repeat_kept(plan)
    asked = _derive(plan)
    lifted = tuple(map(_finer, plan.decisions))
    if plan.config.force or lifted == plan.decisions:
        return asked
    finer = _derive(replace(plan, decisions=lifted))
    used = unpacked(finer)
    back = [
        old if not new.derived and new.copy not in used else new
        for old, new in zip(plan.decisions, finer.decisions, strict=True)
    ]
    finer = replace(finer, decisions=tuple(back))
    fewer = packed_bytes(finer.decisions) < packed_bytes(asked.decisions)
    return finer if fewer else _saying_what_is_lost(asked, finer)


def _repeat_kept(plan: Plan) -> Plan:
    """Without what a rule keeps but lets be made again, where that gives the very bits.

    It is made of what stays anyway and of masks, on a CPU: on GPUs kernels may round otherwise than
    PyTorch's own. A computed weight is made by the same ops.
    """
    bases = bases_of(plan)
    decisions: list[Decision] = []
    for site, mine in by_site(plan.sites, plan.decisions):
        makers = [_repeated(d, plan, bases) for d in mine]
        if site.kept_by or not all(makers):
            decisions += mine
            continue
        bases.whole -= {d.read.identity for d in mine if d.read.identity is not None}
        decisions += [
            Decision(read=d.read, codec=DERIVED, copy=Copy(maker), derived=maker)
            for d, maker in zip(mine, makers, strict=True)
        ]
    if decisions == [*plan.decisions]:
        return plan
    return replace(plan, decisions=leave_what_does_not_pay(plan, decisions))


def _repeated(decision: Decision, plan: Plan, bases: Bases) -> str:
    """The node whose result a read is, if that can be repeated of what is there, else ``""``."""
    read = decision.read
    if decision.packed or read.read is None or read.identity is None:
        return ""
    maker = plan.values.makers.get(read.identity, "")
    call = plan.calls.get(maker)
    if read.read.use is not Use.CONTRACT or call is None or not call.rule.repeats:
        return ""
    rule = plan.config.rule_for(read.module, read.op, read.read)
    asked = rule is not None and rule.codec == "keep" and rule.derive and plan.device == "cpu"
    asked = asked and read.wanted
    if not (asked or call.rule is COMPUTED) or call.operands.get("inplace"):
        return ""
    return maker if recipe(maker, plan, bases) == {} else ""


def _saying_what_is_lost(asked: Plan, finer: Plan) -> Plan:
    """With a note on each copy that would not be needed if others had more bits."""
    decisions = [
        replace(d, note=_LOST) if more.derived and not d.derived and d.packed else d
        for d, more in zip(asked.decisions, finer.decisions, strict=True)
    ]
    return replace(asked, decisions=tuple(decisions))


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
    note = _LIFTED.format(options["bits"])
    return replace(decision, options=finer, nbytes=nbytes, note=note)


def _derive(plan: Plan) -> Plan:
    bases = bases_of(plan)
    decisions: list[Decision] = []
    for site, mine in by_site(plan.sites, plan.decisions):
        for decision in mine:
            identity = decision.read.identity
            if _may_change(decision, site) and identity is not None:
                source = plan.values.makers.get(identity)
                read = None if source is None else copies(source, plan, bases, anyway=True)
                if source is not None and read is not None and len(read) <= COPIES:
                    bases.packed.pop(identity, None)
                    decision = replace(
                        decision,
                        codec=DERIVED,
                        options={},
                        nbytes=0,
                        copy=Copy(source),
                        derived=source,
                    )
            decisions.append(decision)
    return replace(plan, decisions=tuple(decisions))


def _may_change(decision: Decision, site: Site) -> bool:
    """Packed by value for a preset's rule; a rule of the user's own says how to keep it.

    What a checkpointed region reads has to be in its forward what it is, to the last bit; so has
    a 0 at which a slope jumps.
    """
    exact = decision.read.row is CHECKPOINT or decision.read.jumps
    derivable = _by_value(decision) and not exact
    return derivable and not decision.own and not site.kept_by


def _by_value(decision: Decision) -> bool:
    known = decision.copy is not None and decision.codec in CODEC
    return decision.packed and known and not CODEC[decision.codec].slope


@dataclass
class Bases:
    """What the backward has whatever is derived."""

    packed: dict[Elements, Decision] = field(default_factory=dict)  # faithful copies
    codes: set[tuple[str, str]] = field(default_factory=set)  # (node, what it made): masks, indices
    whole: set[Elements] = field(default_factory=set)


def bases_of(plan: Plan) -> Bases:
    """The values that others may be made from."""
    bases = Bases(whole=whole_values(plan))
    for decision in plan.decisions:
        read = decision.read
        if read.bits is not None and decision.packed and read.wanted:
            bases.codes.add((read.node, read.operand))
        if read.identity is None or not read.wanted or read.read is None or read.bits is not None:
            continue
        if _by_value(decision) and CODEC[decision.codec].faithful(decision.options):
            bases.packed.setdefault(read.identity, decision)
    return bases


def whole_values(plan: Plan) -> set[Elements]:
    """What is kept as it is, and in the dtype that its op saw."""
    swapped = swapped_nodes(plan.decisions)
    return {
        d.read.identity
        for d in plan.decisions
        if d.read.identity is not None
        and not d.packed
        and d.read.wanted
        and ((d.read.dense and d.read.itself) or d.read.node in swapped)
        and d.read.dtype == d.read.identity.dtype
    }


def recipe(name: str, plan: Plan, bases: Bases) -> dict[str, Decision | str] | None:
    """How the result of the node ``name`` can be made again in the backward.

    Every operand is needed as it was when the node ran. One that is kept whole is there only if
    nothing writes to it afterwards, since the backward would be refused it.

    Returns:
        For the operands that are not there as they are: the packed copy, or the node whose result
        is derived in turn. None where an operand is lost, or the op costs more than a pass over
        memory and no backward makes its result anyway.
    """
    values = plan.values
    call = None if name in values.lost else plan.calls.get(name)
    if call is None or call.rule.derive is None:
        return None
    if any((name, made) not in bases.codes for made in call.rule.derive_from):
        return None
    found: dict[str, Decision | str] = {}
    for operand, value in call.operands.items():
        if not isinstance(value, fx.Node) or (value.name not in values.shapes):
            if isinstance(value, fx.Node) and values.alive.get(value.name) is not Keeper.NUMBER:
                return None
            continue
        elements = values.seen[name, value.name]
        is_there = value.name in values.alive or elements in bases.whole
        if is_there and values.stays(elements):
            continue
        maker = values.makers.get(elements)
        copy = bases.packed.get(elements)
        if copy is not None and _has_form_of(copy, value.name, maker, plan):
            found[operand] = copy
        elif maker is not None and maker != name and recipe(maker, plan, bases) is not None:
            found[operand] = maker
        else:
            return None
    return found


def _has_form_of(copy: Decision, value: str, maker: str | None, plan: Plan) -> bool:
    """Whether a copy can be read as ``value``, and be made of what ``maker`` gave."""
    shapes = plan.values.shapes
    if maker is None or not copy.options.get("by_channel"):
        return maker is not None
    return shapes[value] == shapes.get(maker) == copy.read.view


def copies(name: str, plan: Plan, bases: Bases, anyway: bool = False) -> set[Copy] | None:
    """The packed copies that are unpacked to make a node's result again; None: it cannot be.

    ``anyway``: with the result itself in the place of copies, where its own backward makes it too.
    """
    found = recipe(name, plan, bases)
    if found is None:
        return None
    if anyway and plan.calls[name].rule.made_again is not None:
        return {Copy(name)}
    used: set[Copy] = set()
    for how in found.values():
        if isinstance(how, str):
            used |= copies(how, plan, bases, anyway) or set()
        elif how.copy is not None:
            used.add(how.copy)
    return used


def unpacked(plan: Plan) -> set[Copy]:
    """The packed copies that all derived values of a plan are made from."""
    bases, found = bases_of(plan), set[Copy]()
    for d in plan.decisions:
        found |= (copies(d.derived, plan, bases) or set()) if d.derived else set()
    return found
