"""Pass 3: one value, one packed copy; and never a packing larger than what it replaces.

q, k and v read the same x: they share one copy, in the most accurate packing that any of them asks
for (the one with the most bytes, of those that serve all of them). Readers may see the value
through different views; what counts is that the elements are the same in memory order, and that
nothing wrote to them in between.

A packed call keeps whole what it reads and nobody packs. Where autograd would have let that go, the
call has to free more than it keeps, or the node stays as it is.

Requires: ``plan.decisions``. Ensures: decisions with the same ``copy`` have the same codec and
options, no site's packed bytes reach its dense bytes, and the kept ones are those that the
rewritten graph keeps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from dropit_fx.codecs import CODEC, RECAST, UNREAD
from dropit_fx.ops.rule import Use
from dropit_fx.ops.table import CHECKPOINT
from dropit_fx.passes.choose_codecs import AROUND_ZERO, beside_rounded, keep, whole_or_none
from dropit_fx.passes.plan import Copy, Decision, Plan, Site

LET_GO = (RECAST, UNREAD, "drop")  # nothing is made of the tensor: a packed call has no use for it


def share_packed(plan: Plan) -> Plan:
    """Says which reads share a copy, and drops packings that do not pay."""
    shared = list(plan.decisions)
    groups: dict[object, list[int]] = {}
    for i, decision in enumerate(shared):
        if is_copy(decision):
            groups.setdefault(value_of(decision)[:-1], []).append(i)
    number = 0
    for indices in groups.values():
        for alike in _of_one_form([shared[i] for i in indices], indices):
            group = [shared[i] for i in alike]
            chosen = _most_accurate(group)
            for i in alike:
                shared[i] = replace(
                    shared[i],
                    codec=chosen.codec,
                    options=chosen.options,
                    nbytes=chosen.nbytes,
                    copy=Copy(str(group[0].read.source), number),
                )
            number += 1
    return replace(plan, decisions=leave_what_does_not_pay(plan, shared))


def _of_one_form(group: list[Decision], indices: list[int]) -> list[list[int]]:
    """Readers of one value that can share a copy.

    What is packed by channel is read in the shape whose second dimension the channels are. Whose
    slope jumps at 0 reads no copy in which a 0 may be a number beside it.
    """
    pairs = list(zip(group, indices, strict=True))
    jumping = [i for d, i in pairs if d.read.jumps]
    if jumping and not all(map(_keeps_zeros, group)):
        others = [(d, i) for d, i in pairs if not d.read.jumps]
        return [jumping, *_of_one_form([d for d, _ in others], [i for _, i in others])]
    shapes = {d.read.view for d in group if d.options.get("by_channel")}
    if not shapes or len({d.read.view for d in group}) == 1:
        return [indices]
    apart: dict[object, list[int]] = {}
    for decision, i in zip(group, indices, strict=True):
        apart.setdefault(decision.read.view if decision.read.view in shapes else None, []).append(i)
    return list(apart.values())


def _keeps_zeros(decision: Decision) -> bool:
    options = decision.options
    apart = options.get("by_channel") or options.get("hadamard")
    return not apart and options.get("range", AROUND_ZERO) == AROUND_ZERO


def _most_accurate(group: list[Decision]) -> Decision:
    """The packing with the most bytes of those that serve every reader's use.

    One of rows serves readers that see the same rows; else it is as the first reader sees them.
    """
    reads = [d.read.read for d in group if d.read.read is not None]
    alike = len({d.read.width for d in group}) == 1
    able = [
        d
        for d in group
        if all(map(CODEC[d.codec].can_keep, reads)) and (alike or CODEC[d.codec].contract is None)
    ]
    return max(able, key=lambda d: d.nbytes) if able else group[0]


def leave_what_does_not_pay(plan: Plan, shared: list[Decision]) -> tuple[Decision, ...]:
    """Without packed calls that do not pay; then says what the others keep."""
    decisions = _never_larger(plan, shared)
    while reasons := _dense_nodes(plan, decisions):
        again: list[Decision] = []
        for site, mine in by_site(plan.sites, decisions):
            mine = [
                keep(d, reasons[d.read.node]) if d.packed and d.read.node in reasons else d
                for d in mine
            ]
            again += whole_or_none(site, mine, plan.config)
        decisions = _never_larger(plan, again)
    return _let_go(plan, decisions)


def is_in_graph(decision: Decision) -> bool:
    """Whether the decision makes a packed call of its node."""
    return decision.packed and decision.codec not in (RECAST, UNREAD)


def swapped_nodes(decisions: Iterable[Decision]) -> set[str]:
    """The nodes that run as packed calls."""
    return {d.read.node for d in decisions if is_in_graph(d)}


def _dense_nodes(plan: Plan, decisions: tuple[Decision, ...]) -> dict[str, str]:
    """The nodes whose packed call would keep what it must not, or more than it frees."""
    swapped = swapped_nodes(decisions)
    reasons: dict[str, str] = {}
    freed: dict[str, float] = defaultdict(float)
    added: dict[str, int] = defaultdict(int)  # what a packed call keeps and autograd does not
    instead = {d.read.node for d in decisions if _is_instead(d)}
    for site, mine in by_site(plan.sites, decisions):
        kept = [d for d in mine if not d.packed and d.read.read is not None]
        for d in kept:
            read = d.read.read
            if d.read.node not in swapped or read is None or read.use is Use.SHAPE:
                continue
            name = f"{d.read.op} would keep '{d.read.operand}' whole"
            if d.read.bits is not None and read.like != read.operand:
                reasons[d.read.node] = f"{d.read.label} is kept ({d.reason})"
            elif not d.read.dense and d.read.written:
                reasons[d.read.node] = f"{name}, which is written to later"
            elif not d.read.dense and d.read.wanted and not site.dense:
                added[d.read.node] += site.nbytes
                reasons.setdefault(d.read.node, f"{name}, which autograd lets go")
        for d in mine if not plan.config.force else ():
            if d.packed and _is_instead(d):
                added[d.read.node] += d.nbytes
                why = f"{d.read.op} would keep '{d.read.operand}' beside what stays in memory"
                reasons.setdefault(d.read.node, why)
        nodes = {d.read.node for d in mine}
        stays = any(d.read.node not in swapped or not _is_inside(d) for d in kept)
        if site.dense and not stays:
            share = (site.nbytes - packed_bytes(mine)) / len(nodes)
            for node in nodes - (instead if site.kept_by else set()):
                freed[node] += share
    return {
        node: reason
        for node, reason in reasons.items()
        if node not in added or added[node] >= freed[node]
    }


def _is_inside(decision: Decision) -> bool:
    """Whether a packed call lets it go: made inside the op, or read for its shape alone."""
    read = decision.read
    return read.row is not None if read.read is None else read.read.use is Use.SHAPE


def _let_go(plan: Plan, decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """Packed calls keep nothing that they make inside or read for its shape alone.

    They keep parameters and cast them again, so that autocast's copies go, where no other node
    keeps them; and nothing for gradients that nobody asks for. Nor does a region keep its inputs
    that has nothing left to make again.
    """
    idle = _idle_regions(plan, decisions)
    decisions = tuple(_gone(d, UNREAD) if d.read.node in idle else d for d in decisions)
    swapped, out = swapped_nodes(decisions), []
    for _, mine in by_site(plan.sites, decisions):
        mine = [
            _gone(d, "drop") if not d.packed and d.read.node in swapped and _is_inside(d) else d
            for d in mine
        ]
        going = [
            replace(d, codec=RECAST if d.read.recast else UNREAD, reason="")
            if not d.packed and d.read.node in swapped and (d.read.recast or not d.read.wanted)
            else d
            for d in mine
        ]
        out += going if all(d.packed for d in going) else mine
    return tuple(out)


def _is_instead(decision: Decision) -> bool:
    read = decision.read.read
    return read is not None and read.instead


def _gone(decision: Decision, codec: str) -> Decision:
    return replace(decision, codec=codec, options={}, nbytes=0, reason="", copy=None)


def _idle_regions(plan: Plan, decisions: Iterable[Decision]) -> set[str]:
    """The checkpointed regions of whose ops none keeps anything, by their calls."""
    calls = {d.read.node: plan.calls[d.read.node] for d in decisions if d.read.row is CHECKPOINT}
    bodies = {node: plan.bodies[str(call.operands["body"].target)] for node, call in calls.items()}
    return {node for node, body in bodies.items() if _keeps_nothing(body)}


def _keeps_nothing(body: Plan) -> bool:
    """Whether the ops of a region keep neither what they make nor an input of the region.

    Numbers do not count: a checkpoint does not see them, and they do not hold it.
    """
    swapped = swapped_nodes(body.decisions)
    holds = any(packed or node not in swapped for node, packed in body.held.items())
    return not holds and all(d.codec in LET_GO or d.read.number for d in body.decisions)


def is_copy(decision: Decision) -> bool:
    """Whether it packs a value of the graph, which others may read as well."""
    read = decision.read
    named = read.source is not None and read.bits is None
    return decision.packed and named and decision.codec not in ("drop", UNREAD)


def value_of(decision: Decision) -> tuple[object, ...]:
    """Equal for reads of the same elements in the same precision; slopes are other values.

    Packed by channel, it is read in one shape only; packed around zero, by those that need that.
    """
    read = decision.read
    slopes = read.function if decision.codec in CODEC and CODEC[decision.codec].slope else ""
    view = read.view if decision.options.get("by_channel") else None
    form = view, decision.options.get("range"), bool(decision.options.get("hadamard"))
    return (read.identity, read.dtype, slopes, form)


def _never_larger(plan: Plan, decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Nothing is larger packed than dense: the check ``never_larger``."""
    if plan.config.force:
        return tuple(decisions)
    out: list[Decision] = []
    for site, mine in by_site(plan.sites, decisions):
        size = packed_bytes(mine)
        if any(d.packed for d in mine) and size >= site.nbytes:
            reason = f"packed it would take {size} bytes, dense {site.nbytes}"
            mine = [keep(d, reason) if d.packed else d for d in mine]
        out += mine
    return beside_rounded(out)


def by_site(
    sites: tuple[Site, ...], decisions: Sequence[Decision]
) -> list[tuple[Site, list[Decision]]]:
    """Each site with the decisions for its reads."""
    pairs, at = [], 0
    for site in sites:
        pairs.append((site, list(decisions[at : at + len(site.reads)])))
        at += len(site.reads)
    return pairs


def packed_bytes(decisions: Iterable[Decision], counted: set[Copy] | None = None) -> int:
    """Bytes of what the decisions keep packed, a shared copy once; ``counted`` ones are nothing.

    Those that were not are added to ``counted``.
    """
    counted = set() if counted is None else counted
    total = 0
    for decision in decisions:
        if decision.packed and (decision.copy is None or decision.copy not in counted):
            total += decision.nbytes
            counted |= {decision.copy} if decision.copy else set()
    return total
