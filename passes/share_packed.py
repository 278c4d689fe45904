"""Pass 3: one value, one packed copy; and never a packing larger than what it replaces.

q, k and v read the same x: they share one copy, in the most accurate packing that any of them asks
for (the one with the most bytes, of those that serve all of them). Readers may see the value
through different views; what counts is that the elements are the same in memory order, and that
nothing wrote to them in between.

Requires: ``plan.decisions``. Ensures: decisions with the same ``pack`` key have the same codec and
options, and no site's packed bytes reach its dense bytes.
"""

from __future__ import annotations

from dataclasses import replace

from dropit_fx.codecs import CODEC
from dropit_fx.core_types import Decision, Plan, Site
from dropit_fx.passes.choose_codecs import keep

CAST = "cast"  # in the place of a codec: made again from the parameter


def share_packed(plan: Plan) -> Plan:
    """Gives each packed operand its ``pack`` key, and drops packings that do not pay."""
    groups: dict[object, list[Decision]] = {}
    for decision in plan.decisions:
        if is_copy(decision):
            groups.setdefault(value_of(decision), []).append(decision)
    best = {key: _most_accurate(group) for key, group in groups.items()}
    names = {key: f"{group[0].read.source}" for key, group in groups.items()}
    shared: list[Decision] = []
    for decision in plan.decisions:
        key = value_of(decision)
        if key in groups and decision in groups[key]:
            chosen, number = best[key], list(groups).index(key)
            decision = replace(
                decision,
                codec=chosen.codec,
                options=chosen.options,
                nbytes=chosen.nbytes,
                pack=f"{names[key]}#{number}",
            )
        shared.append(decision)
    bodies = {name: share_packed(body) for name, body in plan.bodies.items()}
    return replace(plan, decisions=_recast(_never_larger(plan, shared)), bodies=bodies)


def _most_accurate(group: list[Decision]) -> Decision:
    """The packing with the most bytes of those that serve every reader's use."""
    uses = {d.read.read.use for d in group if d.read.read is not None}
    able = [d for d in group if uses <= CODEC[d.codec].serves]
    return max(able or group, key=lambda d: d.nbytes)


def _recast(decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """Packed calls keep parameters, and cast them again: autocast's copies of them are let go."""
    swapped = {d.read.node for d in decisions if d.packed}
    return tuple(
        replace(d, codec=CAST, reason="")
        if d.read.recast and not d.packed and d.read.node in swapped
        else d
        for d in decisions
    )


def is_copy(decision: Decision) -> bool:
    """Whether it packs a value of the graph, which others may read as well."""
    read = decision.read
    named = read.source is not None and read.bits is None
    return decision.packed and named and decision.codec != "drop"


def value_of(decision: Decision) -> object:
    """Equal for reads of the same elements in the same precision; slopes are other values."""
    read = decision.read
    slopes = read.function if decision.codec in CODEC and CODEC[decision.codec].slope else ""
    return (read.identity, read.dtype, slopes)


def _never_larger(plan: Plan, decisions: list[Decision]) -> tuple[Decision, ...]:
    """House rule 2, storage by storage."""
    if plan.config.force:
        return tuple(decisions)
    out: list[Decision] = []
    for site, mine in by_site(plan.sites, decisions):
        size = packed_bytes(mine)
        if any(d.packed for d in mine) and size >= site.nbytes:
            reason = f"packed it would take {size} bytes, dense {site.nbytes}"
            mine = [keep(d, reason) if d.packed else d for d in mine]
        out += mine
    return tuple(out)


def by_site(
    sites: tuple[Site, ...], decisions: list[Decision] | tuple[Decision, ...]
) -> list[tuple[Site, list[Decision]]]:
    """Each site with the decisions for its reads."""
    pairs, at = [], 0
    for site in sites:
        pairs.append((site, list(decisions[at : at + len(site.reads)])))
        at += len(site.reads)
    return pairs


def packed_bytes(decisions: list[Decision]) -> int:
    """Bytes of what the decisions keep packed, a shared copy counted once."""
    seen: set[str] = set()
    total = 0
    for decision in decisions:
        if decision.packed and (decision.pack is None or decision.pack not in seen):
            total += decision.nbytes
            seen |= {decision.pack} if decision.pack else set()
    return total
