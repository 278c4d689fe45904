"""Pass 2: what becomes of each read - a codec with its options, or ``keep`` with the reason.

Requires: ``plan.sites``. Ensures: one decision for each read, and no storage of which some reads
are packed and others kept: a tensor that one reader keeps whole is not freed by packing it for
another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from dropit_fx.codecs import CODEC, UNREAD
from dropit_fx.codecs.codec import Options
from dropit_fx.config import Config, ConfigError
from dropit_fx.kernels.dtypes import FLOATS
from dropit_fx.kernels.row_norms import MEMORY, new_name
from dropit_fx.ops.rule import Use
from dropit_fx.ops.table import CHECKPOINT
from dropit_fx.passes.plan import Decision, ParameterRead, Plan, SavedRead, Site
from dropit_fx.runtime import offload
from dropit_fx.runtime.copies import SAMPLES, WIDTH, channel_nbytes
from dropit_fx.words import shortened

_STATISTICS = ("mean", "rstd", "invstd")  # of a norm: one each for so many values
STRANDED = "a checkpointed region alone would hold it, behind an input that gets no gradient"
_NO_ROWS = (
    "this call of {} does not sum over its rows, or they do not lie one behind the other in memory"
)
AROUND_ZERO = "symmetric"  # with so many bits, 0 is a level wherever there is a 0
_GRID_BITS = 4
_ZEROS = "the slope of {} jumps at 0: a 0 stays one around 0, in four bits or more, not rotated"
_EXACT = {
    Use.CONTRACT: "the gradient of {} depends on it, and stays exact",
    Use.REDUCE: "small beside what is packed, it stays exact",
}


def choose_codecs(plan: Plan) -> Plan:
    """Fills ``plan.decisions`` from the config's rules."""
    decisions: list[Decision] = []
    few = _few_values(plan)
    for site in plan.sites:
        chosen = [_choose(r, plan.config, plan.notes.get(r.node, "")) for r in site.reads]
        chosen = [_offloaded(d, plan.config) for d in chosen]
        chosen = [_exact_for_few(d, few) for d in chosen]
        decisions += whole_or_none(site, chosen, plan.config)
    return replace(plan, decisions=beside_rounded(decisions))


def beside_rounded(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """What calls keep beside their operands, as far as these are read back rounded."""
    rounded = {(d.read.node, d.read.operand) for d in decisions if _is_rounded(d)}
    return tuple(_beside(d, rounded) if d.read.beside else d for d in decisions)


def _is_rounded(decision: Decision) -> bool:
    if decision.derived:
        return True
    codec = CODEC.get(decision.codec)
    if codec is None or codec.slope or not decision.packed or not decision.read.wanted:
        return False
    return not codec.lossless(decision.options)


def _beside(decision: Decision, rounded: set[tuple[str, str]]) -> Decision:
    read = decision.read
    if (read.node, read.beside) not in rounded:
        return Decision(read=read, codec=UNREAD)
    options = {"bits": read.bits}
    nbytes = CODEC["bitmask"].nbytes(read.numel, read.dtype, options)
    return Decision(read=read, codec="bitmask", options=options, nbytes=nbytes)


def _few_values(plan: Plan) -> dict[str, int]:
    """Norms whose statistics come from few values each, by node, with how many.

    A checkpointed region that has one stands for it: what the region is made again from, its norm
    is made again from.
    """
    if plan.config.force:
        return {}
    reads = [r for site in plan.sites for r in site.reads if r.read is not None]
    statistics: dict[str, int] = {}
    for r in reads:
        if r.read is not None and r.read.exact and r.operand in _STATISTICS:
            statistics[r.node] = max(statistics.get(r.node, 0), r.numel)
    counts = {
        r.node: r.numel // statistics[r.node]
        for r in reads
        if r.operand == "input" and statistics.get(r.node)
    }
    few = {node: n for node, n in counts.items() if n < plan.config.norm_values}
    for node, call in plan.calls.items():
        if call.rule is CHECKPOINT:
            inside = _few_values(plan.bodies[str(call.operands["body"].target)])
            few |= {node: min(inside.values())} if inside else {}
    return few


def _exact_for_few(decision: Decision, few: dict[str, int]) -> Decision:
    """What a norm reads whose gradient is a small difference of large numbers stays exact."""
    count, region = few.get(decision.read.node), decision.read.row is CHECKPOINT
    if count is None or decision.own or not decision.packed:
        return decision
    if not region and decision.read.operand != "input":
        return decision
    whose = "the statistics of a norm in the region" if region else "its statistics"
    return keep(decision, f"{whose} come from {count} values each: it stays exact")


_REGION = CHECKPOINT.reads[0]


def check_rules_matched(plans: tuple[Plan, ...], config: Config) -> None:
    """Raises ConfigError where a rule of the user's own matched nothing that any plan has.

    A codec's rule: no saved tensor. One that says what is trained: no read of a parameter.
    """
    every = [p for plan in plans for p in plan.with_bodies()]
    # what is saved no more, because a rule does not train it, was there to match
    reads = [r for p in every for s in (*p.sites, *p.unfused) for r in s.reads]
    parameters = [r for plan in plans for r in plan.parameters]
    layers = [m for p in every for m in p.unrepeated]
    for training in config.training:
        if not any(training.number in r.rules for r in parameters):
            raise ConfigError(
                f"rule {training} matched no read of a parameter."
                f" Modules with parameters: {_some(parameters)}."
            )
    for block in config.backprop:
        if not any(block.number in plan.blocks for plan in plans):
            raise ConfigError(f"rule {block} matched no module that is called in the graph.")
    for rule in config.rules:
        if rule.preset:
            continue
        if rule.codec == "keep" and any(rule.matches(m, CHECKPOINT.name, _REGION) for m in layers):
            continue  # a recurrent layer that is not made again
        if not any(r.read and rule.matches(r.module, r.op, r.read) for r in reads):
            packable = _some([r for r in reads if r.row])
            raise ConfigError(
                f"rule {rule} matched no saved tensor. Modules with packable ones: {packable}."
            )


def _some(reads: Sequence[SavedRead | ParameterRead]) -> str:
    """Whose they are: of many, numbers in names are ``*``; a dozen at most."""
    shown = sorted({(r.module or "<root>", r.op) for r in reads})
    if len(shown) > 12:
        shown = sorted({(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), op) for name, op in shown})
    told = [f"{name} ({op})" for name, op in shown]
    return ", ".join(told[:12]) + (", ..." if len(told) > 12 else "") or "none"


def _choose(read: SavedRead, config: Config, said: str) -> Decision:
    def kept(reason: str) -> Decision:
        return Decision(read=read, codec="keep", nbytes=0, reason=reason)

    if read.stranded:
        return Decision(read=read, codec=UNREAD, note=STRANDED)
    if read.obstacle:
        return kept(read.obstacle)
    if read.row is None:
        return kept(said or f"no row for {read.op} in the op table")
    if read.read is None:
        return kept(f"{read.row.name} keeps it inside, its row does not know it")
    if read.beside:
        return Decision(read=read, codec=UNREAD)
    if read.recast:
        return kept("autocast's copy of a parameter, not an activation")
    rule = config.rule_for(read.module, read.op, read.read)
    if rule is None:
        return kept("no rule of the config names it")
    if rule.codec == "keep":
        if rule.derive and rule.preset:
            return kept("nothing that stays gives its bits again")
        return kept(shortened(f"the config says so: {rule}"))
    if read.read.use is Use.SHAPE:
        return Decision(read=read, codec="drop")
    if read.read.exact:
        return kept(_EXACT[Use.REDUCE])
    codec, sizes = CODEC[rule.codec], Options()
    options: Options = {"bits": read.bits} if read.bits is not None else rule.full_options()
    if read.between is not None:
        options |= dict(zip(("low", "high"), read.between, strict=True))
    if codec.slope and not read.function:
        return kept(f"no table of slopes for these arguments of {read.row.name}")
    if codec.slope:
        options["function"] = read.function
    if codec.contract is not None:
        if not read.width:
            return kept(_NO_ROWS.format(read.row.name))
        sizes[WIDTH] = read.width
        if read.read.by_sample is not None:
            options[SAMPLES] = True
    if codec.remembers(options):
        options[MEMORY] = new_name(read.label)
    if not read.lossy and not codec.lossless(options) and not codec.slope:
        if read.read.why_exact:
            return kept(read.read.why_exact)
        return kept(_EXACT.get(read.read.use, _EXACT[Use.REDUCE]).format(read.read.needed_by[0]))
    if read.bits is None and read.dtype not in FLOATS:
        return kept(f"its dtype is {str(read.dtype).removeprefix('torch.')}")
    note = ""
    if read.jumps and options != (zeros := _keeping_zeros(options)):
        options, note = zeros, _ZEROS.format(read.row.name)
    nbytes = codec.nbytes(read.numel, read.dtype, options | sizes) if read.wanted else 0
    if read.read.by_channel and read.wanted and not codec.lossless(options):
        options["by_channel"] = True
        nbytes += channel_nbytes(read.view or read.shape)
    return Decision(
        read=read,
        codec=rule.codec,
        options=options,
        nbytes=nbytes,
        own=not rule.preset and not rule.derive,
        note=note,
    )


def _offloaded(decision: Decision, config: Config) -> Decision:
    """With the layer whose backward reads the copy, where it is to wait for that on the host."""
    read = decision.read
    if decision.nbytes < offload.SMALLEST or read.read is None:
        return decision
    rule = config.rule_for(read.module, read.op, read.read)
    if rule is None or not config.offloads(rule):
        return decision
    return replace(
        decision,
        options=decision.options | {offload.OFFLOAD: offload.layer_of(read.module, read.node)},
    )


def _keeping_zeros(options: Options) -> Options:
    """The options of the values of a ``quant`` that gives back 0 for 0; others are as they are."""
    if "range" not in options or options["bits"] is None:
        return options
    around = {"range": AROUND_ZERO, "bits": max(options["bits"], _GRID_BITS), "hadamard": False}
    return options | {name: value for name, value in around.items() if name in options}


def whole_or_none(site: Site, decisions: list[Decision], config: Config) -> list[Decision]:
    """All readers of a storage are packed, or none: the check ``whole_or_none``.

    Not counted are readers that are not there when the graph has run.
    """
    packed = [d for d in decisions if d.packed and not d.read.stranded]
    if not packed or config.force:
        return decisions
    keeper = next((d for d in decisions if not d.packed), None)
    if site.kept_by:
        reason = f"stays in memory anyway: '{site.name}' is {site.kept_by}"
    elif keeper is not None:
        reason = f"'{site.name}' is also kept whole by {keeper.read.label} ({keeper.reason})"
    else:
        return decisions
    return [keep(d, reason) if d.packed and not d.read.stranded else d for d in decisions]


def keep(decision: Decision, reason: str) -> Decision:
    """The same read, kept dense."""
    return Decision(read=decision.read, codec="keep", reason=reason)
