"""What a legal plan is: a table of checks, run after every pass.

Each check yields sentences about what is wrong; any sentence is a :class:`VerifyError`. The table
says from which pass on a check must hold.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from torch import fx

from dropit_fx.codecs import CAST, CODEC, UNREAD
from dropit_fx.ops.rule import INSIDE, OpRule, Use
from dropit_fx.ops.table import CHECKPOINT, DERIVABLE, RULES, bind, inputs_of
from dropit_fx.passes.derive_values import whole_values
from dropit_fx.passes.plan import Plan
from dropit_fx.passes.share_packed import LET_GO, by_site, packed_bytes, value_of
from dropit_fx.runtime.packed_call import PACKED_OPS, derived, pack, stand_in

KEEP: tuple[str, dict[str, Any]] = ("keep", {})
DROP: tuple[str, dict[str, Any]] = ("drop", {})


class VerifyError(AssertionError):
    """A pass made an illegal plan: a bug in the pass, never the user's fault."""


def verify(plan: Plan, done: Collection[str] | None = None) -> None:
    """Raises VerifyError with every violation of ``CHECKS``, here and in nested graphs.

    Args:
        plan: The plan.
        done: Names of the passes that have run; None for a finished plan.
    """
    due = [c.holds for c in CHECKS if done is None or c.since in done]
    wrong = [f"{check.__name__}: {text}" for check in due for text in check(plan)]
    if wrong:
        raise VerifyError("illegal plan\n  " + "\n  ".join(wrong))
    for body in plan.bodies.values():
        verify(body, done)


class _PackedRead(NamedTuple):
    """One entry of a packed call's ``packed=``."""

    call: fx.Node
    rule: OpRule
    operand: str
    how: Any  # the pack node, or the name of a codec


def _packed_reads(plan: Plan) -> Iterator[_PackedRead]:
    rules: dict[Any, OpRule] = {op: RULES[name] for name, op in PACKED_OPS.items()}
    for n in plan.module.graph.nodes:
        if n.target in rules:
            for operand, how in n.kwargs["packed"].items():
                yield _PackedRead(n, rules[n.target], operand, how)


def _packs(plan: Plan) -> list[fx.Node]:
    return [n for n in plan.module.graph.nodes if n.target is pack]


def well_formed(plan: Plan) -> Iterator[str]:
    """The graph passes fx's own lint: every node is defined before it is used."""
    try:
        plan.module.graph.lint()
    except RuntimeError as error:
        yield str(error).splitlines()[0]


def one_decision_each(plan: Plan) -> Iterator[str]:
    """Decisions stand for the sites' reads one for one, in their order."""
    reads = [r.label for s in plan.sites for r in s.reads]
    decided = [d.read.label for d in plan.decisions]
    if reads != decided:
        yield f"{len(reads)} reads but decisions for {len(decided)}, or in another order"


def served(plan: Plan) -> Iterator[str]:
    """A codec serves the use of every read that it is chosen for."""
    for d in plan.decisions:
        if not d.packed or d.codec in LET_GO:
            continue
        read, codec = d.read.read, CODEC.get(d.codec, CODEC["keep"])
        if read is None:
            yield f"{d.read.label} is packed, but no row knows it"
        elif d.derived:
            if read.bits is not None or read.use is Use.SHAPE:
                yield f"{d.read.label} is derived, but its backward does not read it by value"
        elif not codec.can_keep(read):
            yield f"{d.read.label} is packed as {d.codec!r}, which does not serve '{read.use}'"
        elif not d.read.lossy and not codec.lossless(d.options):
            yield f"{d.read.label} must stay exact, but {d.codec!r} is not lossless"


def reasons_given(plan: Plan) -> Iterator[str]:
    """Every kept read has a reason."""
    for d in plan.decisions:
        if not d.packed and not d.reason:
            yield f"{d.read.label} is kept without a reason"


def whole_or_none(plan: Plan) -> Iterator[str]:
    """No storage is packed for one reader and kept by another, or alive anyway."""
    if plan.config.force:
        return
    for site, decisions in by_site(plan.sites, plan.decisions):
        packed = [d.read.label for d in decisions if d.packed and d.codec not in LET_GO]
        kept = [d.read.label for d in decisions if not d.packed]
        if packed and kept:
            yield f"'{site.name}' is packed for {packed[0]} and kept for {kept[0]}"
        if packed and site.alive:
            yield f"'{site.name}' is packed, but it is {site.alive}"


def never_larger(plan: Plan) -> Iterator[str]:
    """What is packed takes less room than the dense storage."""
    if plan.config.force:
        return
    for site, decisions in by_site(plan.sites, plan.decisions):
        size = packed_bytes(decisions)
        if any(d.packed for d in decisions) and size >= site.nbytes > 0:
            yield f"'{site.name}' takes {size} bytes packed, {site.nbytes} dense"


def one_copy(plan: Plan) -> Iterator[str]:
    """One value, one packed copy, in one format."""
    formats: dict[str, set[str]] = defaultdict(set)
    values: dict[str, set[object]] = defaultdict(set)
    copies: dict[object, set[str]] = defaultdict(set)
    for d in plan.decisions:
        if d.copy is not None and not d.derived:
            value = value_of(d)
            formats[d.copy].add(f"{d.codec} {d.options}")
            values[d.copy].add(value)
            copies[value].add(d.copy)
    for key, found in formats.items():
        if len(found) > 1:
            yield f"copy '{key}' has {len(found)} formats: {sorted(found)}"
    for key, held in values.items():
        if len(held) > 1:
            yield f"copy '{key}' stands for {len(held)} values"
    for keys in copies.values():
        if len(keys) > 1:
            yield f"one value has {len(keys)} copies: {sorted(keys)}"


def derived_from_what_is_there(plan: Plan) -> Iterator[str]:
    """A derived value comes, call by call, from what the backward has whatever happens to it."""
    values, whole = plan.values, whole_values(plan)
    for n in plan.module.graph.nodes:
        if n.target is not derived:
            continue
        rule_name, args, packs, _ = _arguments(n)
        if rule_name not in DERIVABLE:
            yield f"'{n.name}' derives {rule_name}, whose row does not say how"
            continue
        for name, value in (bind(DERIVABLE[rule_name], args, {}) or {}).items():
            if not isinstance(value, fx.Node) or name in packs:
                continue
            if value.target is stand_in:
                value = value.args[0]
            if value.name in values.alive and value.name not in values.shapes:
                continue  # a number
            seen = {e for (_, v), e in values.seen.items() if v == value.name}
            if value.name not in values.alive and not seen & whole:
                yield f"'{n.name}' keeps '{value}' whole, which nobody else does"
            elif not any(map(values.stays, seen)):
                yield f"'{n.name}' keeps '{value}' whole, which is written to"


def packs_are_read(plan: Plan) -> Iterator[str]:
    """A pack node feeds packed calls with what they read, derived values, and nothing else."""
    operands = defaultdict(set)
    for call, rule, operand, how in _packed_reads(plan):
        if isinstance(how, fx.Node):
            operands[how].add((bind(rule, call.args, _plain(call)) or {}).get(operand))
    for n in plan.module.graph.nodes:
        if n.target is derived:
            rule_name, args, packs, _ = _arguments(n)
            row = DERIVABLE.get(rule_name)
            bound = (bind(row, args, {}) if row is not None else None) or {}
            for operand, how in packs.items():
                operands[how].add(bound.get(operand))
    for n in _packs(plan):
        source, needed, codec, options = _arguments(n)
        if not n.users:
            yield f"'{n.name}' packs for nobody"
        elif source not in operands[n]:
            yield f"'{n.name}' packs '{source}', which none of its readers reads"
        for user in n.users:
            if user.target not in PACKED_OPS.values() and user.target is not derived:
                yield f"'{n.name}' is read by '{user.name}', which is no packed call"
        if codec not in CODEC or set(CODEC[codec].defaults()) - set(options):
            yield f"'{n.name}' has options {sorted(options)} for codec {codec!r}"
        if not all(isinstance(v, str | int | float | None) for v in options.values()):
            yield f"'{n.name}' has an option that is no plain value"
        if not needed:
            yield f"'{n.name}' names nobody who needs it, so it would never be made"


def _is_copy(how: Any) -> bool:
    """A node that makes a packed copy: a pack, a derived value, or a call that gives its result."""
    if not isinstance(how, fx.Node):
        return False
    if how.target is operator.getitem:
        call, index = _arguments(how)
        return bool(index > 0 and call.kwargs.get("gives"))
    return how.target in (pack, derived)


def calls_know_their_reads(plan: Plan) -> Iterator[str]:
    """A packed call gives its own row's reads: operands a copy, what it makes a codec."""
    for call, rule, operand, how in _packed_reads(plan):
        read = rule.read(operand)
        if read is None and operand != INSIDE:
            yield f"'{call.name}': {rule.name} has no read {operand!r}"
        elif how in (KEEP, DROP):
            continue
        elif read is None or read.bits is not None or read.use is Use.SHAPE:
            if isinstance(how, fx.Node) or how[0] not in CODEC:
                yield f"'{call.name}': {operand!r} is packed as {how}, which is no codec"
        elif not _is_copy(how) and (isinstance(how, fx.Node) or operand in inputs_of(rule)):
            yield f"'{call.name}': {operand!r} is packed as {how}, which is no pack node"


def says_all_that_is_kept(plan: Plan) -> Iterator[str]:
    """``packed=`` names every read of a row, and what it keeps whole is alive or was counted."""
    values = plan.values
    decided = {d.read.label: d for d in plan.decisions}
    rules: dict[Any, OpRule] = {op: RULES[name] for name, op in PACKED_OPS.items()}
    for call in plan.module.graph.nodes:
        rule = rules.get(call.target)
        if rule is None or rule is CHECKPOINT:  # its other inputs are arguments of the region
            continue
        bound, packed = bind(rule, call.args, _plain(call)) or {}, call.kwargs["packed"]
        for read in rule.reads:
            value, decision = bound.get(read.operand), decided.get(f"{call.name}.{read.operand}")
            how = packed.get(read.operand)
            is_there = read.operand not in inputs_of(rule) or isinstance(value, fx.Node)
            if how is None and is_there:
                yield f"'{call.name}' does not say how {read.operand!r} is kept"
            if how == DROP and read.use is not Use.SHAPE:
                yield f"'{call.name}' lets {read.operand!r} go, whose values its backward reads"
            if how != KEEP or read.operand not in inputs_of(rule):
                continue
            needing = [bound.get(n) for n in read.needed_by]
            wanted = any(isinstance(v, fx.Node) and _requires_grad(v, plan) for v in needing)
            counted = decision is not None and (not decision.packed or decision.codec in LET_GO)
            is_made = isinstance(value, fx.Node) and value.name not in values.alive
            if wanted and is_made and not counted:
                yield f"'{call.name}' keeps {read.operand!r}, which nobody has counted"


def _requires_grad(value: fx.Node, plan: Plan) -> bool:
    return value.name in plan.values.differentiable


def graph_follows_decisions(plan: Plan) -> Iterator[str]:
    """The graph packs what the decisions say, as they say it, and nothing else."""
    wanted = {
        d.read.label: d
        for d in plan.decisions
        if d.packed and d.codec not in (CAST, UNREAD) and d.read.read is not None
    }
    found = {
        f"{r.call.name}.{r.operand}": r.how
        for r in _packed_reads(plan)
        if r.how not in (KEEP, DROP) or f"{r.call.name}.{r.operand}" in wanted
    }
    for label in sorted(wanted.keys() - found.keys()):
        yield f"{label} was to be packed and is not"
    for label in sorted(found.keys() - wanted.keys()):
        yield f"{label} is packed and no decision says so"
    made: dict[str, set[fx.Node]] = defaultdict(set)
    for label in sorted(wanted.keys() & found.keys()):
        decision, how = wanted[label], found[label]
        asked, got = f"{decision.codec} {decision.options}", f"{how}"
        if isinstance(how, fx.Node) and how.target is pack:
            _, _, codec, options = _arguments(how)
            got = f"{codec} {options}"
        elif _is_copy(how):
            got = "derived {}" if how.target is derived else asked
        elif not isinstance(how, fx.Node):
            got = f"{how[0]} {how[1]}"
        if isinstance(how, fx.Node) and decision.copy is not None:
            made[decision.copy].add(how)
        if asked != got:
            yield f"{label} is packed as {got} and was to be {asked}"
    for key, nodes in made.items():
        if len(nodes) > 1:
            yield f"copy '{key}' is made {len(nodes)} times"
    if len(set().union(*made.values())) < len(made):
        yield f"{len(made)} values share fewer pack nodes"


def _plain(call: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in call.kwargs.items() if k not in ("packed", "gives")}


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


class Check(NamedTuple):
    """A check, and the pass after which it must hold."""

    since: str
    holds: Callable[[Plan], Iterator[str]]


CHECKS: tuple[Check, ...] = (
    Check("find_saved", well_formed),
    Check("choose_codecs", one_decision_each),
    Check("choose_codecs", served),
    Check("choose_codecs", reasons_given),
    Check("choose_codecs", whole_or_none),
    Check("share_packed", never_larger),
    Check("share_packed", one_copy),
    Check("insert_packing", derived_from_what_is_there),
    Check("insert_packing", packs_are_read),
    Check("insert_packing", calls_know_their_reads),
    Check("insert_packing", says_all_that_is_kept),
    Check("insert_packing", graph_follows_decisions),
)
