"""What a legal plan is: a table of checks, run after every pass.

Each check yields sentences about what is wrong; any sentence is a :class:`VerifyError`. A check that needs
what a later pass makes has nothing to say before.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from dropit_fx.codecs import CODEC
from dropit_fx.core_types import Plan, Use
from dropit_fx.op_table import bind, rule_of
from dropit_fx.packed_call import PACKED_OPS, pack
from dropit_fx.passes.share_packed import by_site, packed_bytes

_PACKED_RULE = {op: name for name, op in PACKED_OPS.items()}


class VerifyError(AssertionError):
    """A pass made an illegal plan: a bug in the pass, never the user's fault."""


def verify(plan: Plan) -> None:
    """Raises VerifyError with every violation of ``CHECKS``, here and in nested graphs."""
    wrong = [f"{name}: {text}" for name, check in CHECKS for text in check(plan)]
    if wrong:
        raise VerifyError("illegal plan\n  " + "\n  ".join(wrong))
    for body in plan.bodies.values():
        verify(body)


def _packs(plan: Plan) -> list[fx.Node]:
    return [n for n in plan.module.graph.nodes if n.target is pack]


def _calls(plan: Plan) -> list[fx.Node]:
    return [n for n in plan.module.graph.nodes if n.target in PACKED_OPS.values()]


def well_formed(plan: Plan) -> Iterator[str]:
    """The graph passes fx's own lint: every node is defined before it is used."""
    try:
        plan.module.graph.lint()
    except RuntimeError as error:
        yield str(error).splitlines()[0]


def one_decision_each(plan: Plan) -> Iterator[str]:
    """Decisions, once made, stand for the sites' reads one for one."""
    reads = [r.label for s in plan.sites for r in s.reads]
    decided = [d.read.label for d in plan.decisions]
    if plan.decisions and reads != decided:
        yield f"{len(reads)} reads but decisions for {len(decided)}, or in another order"


def served(plan: Plan) -> Iterator[str]:
    """A codec serves the use of every read that it is chosen for."""
    for d in plan.decisions:
        read = d.read.read
        if not d.packed:
            continue
        if read is None:
            yield f"{d.read.label} is packed, but no row knows it"
        elif read.use not in CODEC[d.codec].serves:
            yield f"{d.read.label} is packed as {d.codec!r}, which does not serve '{read.use}'"
        elif not read.lossy and not CODEC[d.codec].lossless(d.options):
            yield f"{d.read.label} must stay exact, but {d.codec!r} is not lossless"


def whole_or_none(plan: Plan) -> Iterator[str]:
    """House rule 1: no storage is packed for one reader and kept by another, or alive anyway."""
    if plan.config.force:
        return
    for site, decisions in by_site(plan.sites, plan.decisions):
        packed = [d for d in decisions if d.packed]
        kept = [d for d in decisions if not d.packed]
        if packed and kept:
            yield f"'{site.name}' is packed for {packed[0].read.label} and kept for {kept[0].read.label}"
        if packed and site.alive:
            yield f"'{site.name}' is packed, but it is {site.alive}"


def never_larger(plan: Plan) -> Iterator[str]:
    """House rule 2, once packs are shared."""
    if plan.config.force or not any(d.pack for d in plan.decisions):
        return
    for site, decisions in by_site(plan.sites, plan.decisions):
        if any(d.packed for d in decisions) and packed_bytes(decisions) >= site.nbytes:
            yield f"'{site.name}' takes {packed_bytes(decisions)} bytes packed, {site.nbytes} dense"


def one_copy(plan: Plan) -> Iterator[str]:
    """House rule 3: one value, one packed copy, in one format."""
    formats: dict[str, set[str]] = defaultdict(set)
    for d in plan.decisions:
        if d.pack:
            formats[d.pack].add(f"{d.codec} {d.options}")
    for key, found in formats.items():
        if len(found) > 1:
            yield f"'{key}' in {len(found)} formats: {sorted(found)}"
    twice = Counter((n.args[0], str(n.args[2:])) for n in _packs(plan))
    values = Counter((d.read.identity, d.read.dtype) for d in _leaders(plan))
    for (source, _), count in twice.items():
        if count > 1 and max(values.values(), default=1) > 1:
            yield f"'{source}' is packed {count} times"


def _leaders(plan: Plan) -> list[Any]:
    return list({d.pack: d for d in plan.decisions if d.pack}.values())


def reasons_given(plan: Plan) -> Iterator[str]:
    """House rule 6: every kept read has a reason."""
    for d in plan.decisions:
        if not d.packed and not d.reason:
            yield f"{d.read.label} is kept without a reason"


def packs_are_read(plan: Plan) -> Iterator[str]:
    """A pack node feeds packed calls, and nothing else; its arguments are plain values."""
    for n in _packs(plan):
        if not n.users:
            yield f"'{n.name}' packs for nobody"
        for user in n.users:
            if user.target not in _PACKED_RULE:
                yield f"'{n.name}' is read by '{user.name}', which is no packed call"
        _, needed, codec, options = n.args
        if codec not in CODEC or set(options) != set(CODEC[codec].defaults()):
            yield f"'{n.name}' has options {sorted(options)} for codec {codec!r}"
        plain = (str, int, float, bool, type(None))
        if not all(isinstance(v, plain) for v in options.values()):
            yield f"'{n.name}' has an option that is no plain value"
        if not needed:
            yield f"'{n.name}' names nobody who needs it, so it would never be made"


def calls_know_their_reads(plan: Plan) -> Iterator[str]:
    """A packed call names reads of its own row, operands as pack nodes and inner tensors as codecs."""
    for n in _calls(plan):
        rule_name = _PACKED_RULE[n.target]
        packed = n.kwargs.get("packed")
        if not packed:
            yield f"'{n.name}' packs nothing"
            continue
        for operand, how in packed.items():
            row = next(r for r in (_rule(rule_name),))
            read = row.read(operand)
            if read is None:
                yield f"'{n.name}': {rule_name} has no read {operand!r}"
            elif (read.bits is not None or read.use is Use.SHAPE) != isinstance(how, str):
                yield f"'{n.name}': {operand!r} is packed as {how}"
            elif isinstance(how, fx.Node) and not _same_numel(plan, n, operand, how):
                yield f"'{n.name}': {operand!r} and what '{how.name}' packs are not the same value"


def _rule(name: str) -> Any:
    from dropit_fx.op_table import RULES

    return RULES[name]


def _same_numel(plan: Plan, call: fx.Node, operand: str, packed: fx.Node) -> bool:
    identities = {d.read.identity for d in plan.decisions if d.read.node == call.name and d.read.operand == operand}
    sources = {d.read.identity for d in plan.decisions if d.read.source == getattr(packed.args[0], "name", "")}
    return not identities or bool(identities & sources)


def graph_follows_decisions(plan: Plan) -> Iterator[str]:
    """Once the graph is rewritten, it packs what the decisions say, and nothing else."""
    calls = {n.name: n for n in _calls(plan)}
    if not calls and not _packs(plan):
        return
    wanted = {(d.read.node, d.read.operand) for d in plan.decisions if d.packed}
    found = {(n.name, operand) for n in calls.values() for operand in n.kwargs.get("packed", {})}
    for node, operand in sorted(wanted - found):
        yield f"{node}.{operand} was to be packed and is not"
    for node, operand in sorted(found - wanted):
        yield f"{node}.{operand} is packed and no decision says so"


Check = Callable[[Plan], Iterator[str]]
CHECKS: tuple[tuple[str, Check], ...] = (
    ("well_formed", well_formed),
    ("one_decision_each", one_decision_each),
    ("served", served),
    ("whole_or_none", whole_or_none),
    ("never_larger", never_larger),
    ("one_copy", one_copy),
    ("reasons_given", reasons_given),
    ("packs_are_read", packs_are_read),
    ("calls_know_their_reads", calls_know_their_reads),
    ("graph_follows_decisions", graph_follows_decisions),
)
