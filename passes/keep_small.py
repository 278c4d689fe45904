"""Pass 5: what is no activation, or small beside the rest, is kept exactly.

A factor that is made of weights or of constants alone (a normalised weight, a product of two thin
ones, a filter bank) is a weight: dropping its elements would change the gradient of the input.
Where it cannot be made again, it is kept whole.

The input of a LoRA's second factor is a hundredth of what a step saves, and most of the error of
its gradient. A storage is small that is less than a tenth of the large ones (the upper quartile of
what has a lossy copy), which tells it from the late layers of a convolutional net. The smallest are
kept first, until together they are three in a hundred of all that is packed; counted with them are
autocast's copies of weights, which an op keeps that packs nothing more.

What a mask's constant may stand among is kept exactly as well: see `mask_constants`.

Requires: decisions with what is derived. Ensures: only storages with copies of their own change;
what is derived from a copy of theirs is then derived from the exact values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

from dropit_fx.codecs import CODEC
from dropit_fx.ops.table import CHECKPOINT
from dropit_fx.passes.choose_codecs import beside_rounded, keep
from dropit_fx.passes.derive_values import bases_of, recipe, unpacked
from dropit_fx.passes.mask_constants import mask_constants
from dropit_fx.passes.plan import Decision, Plan, Site
from dropit_fx.passes.share_packed import LET_GO, by_site, swapped_nodes

TENTH = 10  # of the large ones: nothing above is small
HUNDREDTHS = 3  # of the dense bytes of all that is not kept: no more is kept for this reason
MASKED = "a mask's {:g} stands among its values: beside it few bits tell no others apart"
FIXED = "made of weights or constants alone, it stays exact"
LOST = "made of what stays exact and is written to later: it cannot be made again"
_OF_INPUT = ("log_probs",)  # what an op makes inside that has the extremes of its input
REASON = "small beside what is packed, it is kept exactly"
BESIDE = "its op packs nothing, and keeps it: another input of it is small"


def keep_small(plan: Plan) -> Plan:
    """Keeps whole what is no activation, and small storages where the config asks for it."""
    if plan.config.force:
        return plan
    plan = _without_fixed(plan)
    return _without_small(plan) if plan.config.keep_small else plan


def _without_fixed(plan: Plan) -> Plan:
    """Keeps whole what is no activation, and what can no longer be made again then.

    Nothing is made from what is kept whole and written to later.
    """
    reasons = dict.fromkeys(_fixed(plan), FIXED) | _masked(plan)
    while lost := _not_derived(kept := _keeping(reasons, plan)):
        reasons[lost[0]] = LOST  # those behind it may come from it
    return kept


def _without_small(plan: Plan) -> Plan:
    """Keeps small storages whole, but for those that something cannot be made from any more."""
    reasons = dict.fromkeys(_small(plan), REASON)
    kept = _keeping(reasons, plan)
    if _not_derived(kept):
        used = unpacked(plan)
        pairs = by_site(plan.sites, plan.decisions)
        needed = {s.name for s, mine in pairs if any(d.copy in used for d in mine)}
        kept = _keeping({n: why for n, why in reasons.items() if n not in needed}, plan)
    return kept


def _keeping(reasons: dict[str, str], plan: Plan) -> Plan:
    """Keeps some storages whole, by name, and what an op keeps that packs nothing more."""
    kept = [
        (site, [keep(d, why) if why and d.packed else d for d in mine])
        for site, mine in by_site(plan.sites, plan.decisions)
        for why in [reasons.get(site.name)]
    ]
    left = beside_rounded([d for _, mine in kept for d in mine])
    kept = by_site(plan.sites, left)
    swapped = swapped_nodes(left)
    decisions: list[Decision] = []
    for _, mine in kept:
        stays = any(
            # a region that keeps nothing is not made again
            d.codec in LET_GO and d.read.node not in swapped and d.read.row is not CHECKPOINT
            for d in mine
            if not d.read.stranded
        )
        decisions += [keep(d, BESIDE) for d in mine] if stays else mine
    return replace(plan, decisions=tuple(decisions))


def _not_derived(plan: Plan) -> list[str]:
    """Storages of what is to be made again, and cannot be, in the order of the graph."""
    bases = bases_of(plan)
    return [
        site.name
        for site, mine in by_site(plan.sites, plan.decisions)
        if any(d.derived and recipe(d.derived, plan, bases) is None for d in mine)
    ]


def _fixed(plan: Plan) -> set[str]:
    """Storages of which a lossy copy is kept, and that depend on no input."""
    return {
        site.name
        for site, mine in by_site(plan.sites, plan.decisions)
        if any(_is_lossy(d) and d.read.fixed for d in mine)
    }


def _masked(plan: Plan) -> dict[str, str]:
    """Storages of which few bits are kept, and that a mask's constant may stand among."""
    constants = mask_constants(plan)
    if not constants:
        return {}
    nodes = {n.name: n for n in plan.module.graph.nodes}
    found: dict[str, str] = {}
    for site, mine in by_site(plan.sites, plan.decisions):
        for d in mine:
            names = [d.read.source]
            if d.read.source is None and d.read.operand in _OF_INPUT:
                names = [n.name for n in nodes[d.read.node].all_input_nodes]
            large = [constants[name] for name in names if name in constants]
            if large and _is_lossy(d) and not d.own and not CODEC[d.codec].slope:
                found[site.name] = MASKED.format(max(large, key=abs))
    return found


def _small(plan: Plan) -> set[str]:
    pairs = by_site(plan.sites, plan.decisions)
    lossy = [(s, mine) for s, mine in pairs if not s.kept_by and any(map(_is_lossy, mine))]
    if not lossy:
        return set()
    sizes = sorted(s.nbytes for s, _ in lossy)
    large = sizes[len(sizes) * 3 // 4]
    packed = sum(s.nbytes for s, mine in pairs if all(d.packed for d in mine))
    room = packed * HUNDREDTHS // 100
    beside = _kept_beside(pairs)
    names = Counter(site.name for site in plan.sites)
    found: set[str] = set()
    for site, mine in sorted(lossy, key=lambda pair: pair[0].nbytes):
        extra = [beside.get(d.read.node, 0) for d in mine]
        if site.nbytes * TENTH >= large:
            break
        if any(d.own for d in mine) or None in extra or names[site.name] > 1:
            continue
        room -= site.nbytes + sum(filter(None, extra))
        if room < 0:
            break
        found.add(site.name)
    return found


def _kept_beside(pairs: list[tuple[Site, list[Decision]]]) -> dict[str, int | None]:
    """What each op keeps that a packed call of it would not, if one read of it is packed no more.

    Those are autocast's copies of parameters; None where it is a copy that others pack.
    """
    reads: dict[str, int] = defaultdict(int)
    found: dict[str, int | None] = {}
    for site, mine in pairs:
        gone = [d for d in mine if d.codec in LET_GO]
        for d in mine:
            reads[d.read.node] += d.packed and d not in gone
        for d in gone:
            more = found.get(d.read.node, 0)
            alone = len(gone) == len(mine) and more is not None
            found[d.read.node] = (more or 0) + site.nbytes * site.dense if alone else None
    return {node: size if reads[node] == 1 else 0 for node, size in found.items()}


def _is_lossy(decision: Decision) -> bool:
    codec = CODEC.get(decision.codec)
    return decision.nbytes > 0 and codec is not None and not codec.lossless(decision.options)
