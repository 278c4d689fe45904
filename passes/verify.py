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

from dropit_fx.codecs import CODEC, DERIVED
from dropit_fx.ops.rule import INSIDE, OpRule, Use
from dropit_fx.ops.table import CHECKPOINT, DERIVABLE, RULES, bind
from dropit_fx.passes.derive_values import whole_values
from dropit_fx.passes.detach_parameters import undetached
from dropit_fx.passes.insert_packing import unchecked
from dropit_fx.passes.plan import Keeper, Plan
from dropit_fx.passes.share_packed import LET_GO, by_site, is_in_graph, packed_bytes, value_of
from dropit_fx.runtime.copies import DROP, KEEP
from dropit_fx.runtime.packed_call import PACKED_OPS, derived, pack, unless_changed
from dropit_fx.runtime.regions import stand_in


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


def _calls(plan: Plan) -> Iterator[tuple[fx.Node, OpRule, dict[str, Any], dict[str, Any]]]:
    """Each packed call: its row, its arguments by name, and what it keeps."""
    rules: dict[Any, OpRule] = {op: RULES[name] for name, op in PACKED_OPS.items()}
    for n in plan.module.graph.nodes:
        if n.target in rules:
            kwargs: dict[str, Any] = dict(n.kwargs)
            packed, _ = kwargs.pop("packed"), kwargs.pop("gives", None)
            packed = {k: unchecked(v) if isinstance(v, fx.Node) else v for k, v in packed.items()}
            yield n, rules[n.target], bind(rules[n.target], n.args, kwargs) or {}, packed


def _derivations(plan: Plan) -> Iterator[tuple[fx.Node, str, dict[str, Any], dict[str, fx.Node]]]:
    """Each node that derives a value: of which row, its arguments by name, the copies it reads."""
    for n in plan.module.graph.find_nodes(op="call_function", target=derived):
        rule_name, args, copies, _ = _arguments(n)
        copies = {operand: unchecked(copy) for operand, copy in copies.items()}
        row = DERIVABLE.get(rule_name)
        yield n, rule_name, (bind(row, args, {}) if row is not None else None) or {}, copies


def well_formed(plan: Plan) -> Iterator[str]:
    """The graph passes fx's own lint: every node is defined before it is used."""
    try:
        plan.module.graph.lint()
    except RuntimeError as error:
        yield str(error).splitlines()[0]


def untrained_is_detached(plan: Plan) -> Iterator[str]:
    """What no rule trains is read detached."""
    for read in undetached(plan):
        yield f"'{read.node}' gives '{read.parameter}' a gradient: rule {read.rules[0]} does not"


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
        elif not d.read.lossy and not codec.lossless(d.options) and not codec.slope:
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
        if packed and site.kept_by:
            yield f"'{site.name}' is packed, but it is {site.kept_by}"


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
    copies: dict[object, set[str]] = defaultdict(set)  # by name
    for d in plan.decisions:
        if d.copy is not None and not d.derived:
            name, value = str(d.copy), value_of(d)
            formats[name].add(f"{d.codec} {d.options}")
            values[name].add(value)
            copies[value].add(name)
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
    for n, rule_name, bound, copies in _derivations(plan):
        if rule_name not in DERIVABLE:
            yield f"'{n.name}' derives {rule_name}, whose row does not say how"
        for name, value in bound.items():
            if not isinstance(value, fx.Node) or name in copies:
                continue
            if value.target is stand_in:
                value = value.args[0]
            if values.alive.get(value.name) is Keeper.NUMBER:
                continue
            seen = {e for (_, v), e in values.seen.items() if v == value.name}
            seen |= {e for e, maker in values.makers.items() if maker == value.name}
            if value.name not in values.alive and not seen & whole:
                yield f"'{n.name}' keeps '{value}' whole, which nobody else does"
            elif not any(map(values.stays, seen)):
                yield f"'{n.name}' keeps '{value}' whole, which is written to"


def packs_are_read(plan: Plan) -> Iterator[str]:
    """A pack node feeds packed calls with what they read, derived values, and nothing else."""
    operands = defaultdict(set)
    for _, _, bound, packed in _calls(plan):
        for operand, how in packed.items():
            if isinstance(how, fx.Node):
                operands[how].add(bound.get(operand))
    for _, _, bound, copies in _derivations(plan):
        for operand, copy in copies.items():
            operands[copy].add(bound.get(operand))
    for n in plan.module.graph.find_nodes(op="call_function", target=pack):
        source, needed, codec, options = _arguments(n)
        if not n.users:
            yield f"'{n.name}' packs for nobody"
        elif source not in operands[n]:
            yield f"'{n.name}' packs '{source}', which none of its readers reads"
        for user in n.users:
            if user.target not in (*PACKED_OPS.values(), derived, unless_changed):
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
    for call, rule, _, packed in _calls(plan):
        for operand, how in packed.items():
            read = rule.read(operand)
            if read is None and operand != INSIDE:
                yield f"'{call.name}': {rule.name} has no read {operand!r}"
            elif how in (KEEP, DROP):
                continue
            elif read is None or read.bits is not None or read.use is Use.SHAPE:
                if isinstance(how, fx.Node) or how[0] not in CODEC:
                    yield f"'{call.name}': {operand!r} is packed as {how}, which is no codec"
            elif not _is_copy(how) and (isinstance(how, fx.Node) or operand in rule.inputs):
                yield f"'{call.name}': {operand!r} is packed as {how}, which is no pack node"


def says_all_that_is_kept(plan: Plan) -> Iterator[str]:
    """``packed=`` names every read of a row, and what it keeps whole is alive or was counted."""
    values = plan.values
    decided = {d.read.label: d for d in plan.decisions}
    for call, rule, bound, packed in _calls(plan):
        # a region's other inputs are its arguments
        for read in rule.reads if rule is not CHECKPOINT else ():
            if not read.is_of(bound):
                continue
            value, decision = bound.get(read.operand), decided.get(f"{call.name}.{read.operand}")
            how = packed.get(read.operand)
            is_inner = read.operand not in rule.inputs
            is_there = is_inner or isinstance(value, fx.Node)
            if how is None and is_there:
                yield f"'{call.name}' does not say how {read.operand!r} is kept"
            if how == DROP and read.use is not Use.SHAPE and not read.beside:
                yield f"'{call.name}' lets {read.operand!r} go, whose values its backward reads"
            if how != KEEP or read.operand not in rule.inputs:
                continue
            needing = [bound.get(n) for n in read.needed_by]
            wanted = any(
                isinstance(v, fx.Node) and (call.name, v.name) in values.differentiable
                for v in needing
            )
            counted = decision is not None and (not decision.packed or decision.codec in LET_GO)
            is_made = isinstance(value, fx.Node) and value.name not in values.alive
            if wanted and is_made and not counted:
                yield f"'{call.name}' keeps {read.operand!r}, which nobody has counted"


def graph_follows_decisions(plan: Plan) -> Iterator[str]:
    """The graph packs what the decisions say, as they say it, and nothing else."""
    wanted = {d.read.label: d for d in plan.decisions if is_in_graph(d) and d.read.read is not None}
    found = {
        f"{call.name}.{operand}": how
        for call, _, _, packed in _calls(plan)
        for operand, how in packed.items()
        if how not in (KEEP, DROP) or f"{call.name}.{operand}" in wanted
    }
    for label in sorted(wanted.keys() - found.keys()):
        yield f"{label} was to be packed and is not"
    for label in sorted(found.keys() - wanted.keys()):
        yield f"{label} is packed and no decision says so"
    made: dict[object, set[fx.Node]] = defaultdict(set)  # by copy
    for label in sorted(wanted.keys() & found.keys()):
        decision, how = wanted[label], found[label]
        asked, got = f"{decision.codec} {decision.options}", f"{how}"
        if isinstance(how, fx.Node) and how.target is pack:
            _, _, codec, options = _arguments(how)
            got = f"{codec} {options}"
        elif _is_copy(how):
            got = f"{DERIVED} {{}}" if how.target is derived else asked
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


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


class Check(NamedTuple):
    """A check, and the pass after which it must hold."""

    since: str
    holds: Callable[[Plan], Iterator[str]]


CHECKS: tuple[Check, ...] = (
    Check("detach_parameters", untrained_is_detached),
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
