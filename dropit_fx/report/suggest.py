"""Which rules would lower what is kept most: tried out, not reckoned, and printed to be copied.

A candidate says of all tensors that the same ops read how they could be kept in fewer bits. The
largest few are tried: the pipeline runs again on the model's graph, with the rule in front of the
config's. The best joins the config, and what is left is tried behind it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import yaml

from dropit_fx.capture.trace import LOCK
from dropit_fx.capture.untouched import untouched
from dropit_fx.codecs import CODEC
from dropit_fx.config import OWN_KEYS, ConfigError
from dropit_fx.ops.rule import Use
from dropit_fx.ops.table import RULES
from dropit_fx.passes.choose_codecs import check_rules_matched
from dropit_fx.planner.size import shown
from dropit_fx.report.rows import Report, Row, report_of
from dropit_fx.rewriting import Rewriter
from dropit_fx.rules import Config, Rule

TRIES = 4  # of the candidates that may save most, for each rule
_BLOCK = ("block", 256)
_LEVELS = (
    ("quant", (("bits", 4), _BLOCK)),
    ("mink", (("gamma", 0.7), ("bits", 2), _BLOCK)),
)
# which divide by the deviation of a channel
_UNIFORM = {"batch_norm", "group_norm", "instance_norm"}
Progress = Callable[[str, float], object]  # what is done, and how much of it: 0 to 1


class Suggestion(NamedTuple):
    """A rule, and the bytes that it saves behind those before it."""

    rule: Rule
    saves: int


@dataclass(frozen=True)
class Suggestions:
    """Rules that save most: each the best of those tried behind the ones before it.

    Attributes:
        rules: In the order in which they go in front of the config's own.
        kept: What is kept without them, in bytes.
        preset: Of the config.
        settings: Those that no preset sets and this config does, such as ``offload``.
    """

    rules: tuple[Suggestion, ...]
    kept: int
    preset: str | None
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Lines of a config file, none longer than 80 characters where names allow it."""
        if not self.rules:
            return f"# no rule that was tried saves anything of {shown(self.kept)}\n"
        total = sum(s.saves for s in self.rules)
        lines = [f"# these save {shown(total)} of {shown(self.kept)}, and cost accuracy"]
        lines += [f"preset: {self.preset or 'null'}", *(f"{key}: true" for key in self.settings)]
        lines += ["rules:"]
        for rule, saves in self.rules:
            said: dict[str, Any] = {}
            for name, globs in (("module", rule.module), ("op", rule.op)):
                if globs != ("*",):
                    said[name] = globs[0] if len(globs) == 1 else list(globs)
            said |= {"codec": rule.codec, **dict(rule.options)}
            said |= {"derive": True} if rule.derive else {}
            text = yaml.safe_dump([said], sort_keys=False, width=76, indent=2)
            lines += [f"  # saves {shown(saves)}", *(f"  {line}" for line in text.splitlines())]
        return "\n".join(lines) + "\n"


def suggest(
    report: Report, count: int = 3, *, progress: Progress = lambda text, share: None
) -> Suggestions:
    """The rules that would lower what a rewritten model keeps most.

    Each was tried: the config takes it, and it saves what is told of it. They lose accuracy;
    ``dropit_fx.plan`` weighs that, and ``dropit_fx.check`` shows it. ``print`` writes them as lines
    of a config file.

    Args:
        report: ``dropit_fx.report(packed)``, of what ``transform`` returned; the model that it was
            given must be there still.
        count: How many, at most.
        progress: Called with what is done, and the share of it that is.

    Raises:
        ValueError: The model is gone, or the report is of parts of a model, of a copy, or of
            what ``torch.compile`` has made.
    """
    if report.origin is None or (model := report.origin.model()) is None:
        raise ValueError(
            "rules are tried on the model that transform was given: keep it, and take the report of"
            " what transform returned for the whole of it, not of a copy or a part"
        )
    config, (args, kwargs) = report.origin.config, report.origin.inputs()
    found: list[Suggestion] = []
    kept = report.kept_bytes
    with LOCK, untouched(model, generators=True):
        rewriter = Rewriter(model, args, kwargs)
        candidates = _candidates(report)
        for number in range(count):
            best: Suggestion | None = None
            rules = tuple(s.rule for s in found)
            for tried, rule in enumerate(candidates[:TRIES]):
                progress("trying rules", (number + tried / TRIES) / count)
                saves = kept - _kept(rewriter, replace(config, rules=(*rules, rule, *config.rules)))
                if saves > (best.saves if best else 0):
                    best = Suggestion(rule, int(saves))
            if best is None:
                break
            found.append(best)
            kept -= best.saves
            candidates = [c for c in candidates if not {*c.op} & {*best.rule.op}]
    progress("trying rules", 1.0)
    settings = tuple(key for key in OWN_KEYS if getattr(config, key))
    return Suggestions(tuple(found), report.kept_bytes, config.preset, settings)


def _kept(rewriter: Rewriter, config: Config) -> float:
    """Bytes that are kept under a config; infinite where it cannot be."""
    try:
        plan = rewriter.rewritten(config)
        check_rules_matched((plan,), config)
    except ConfigError:
        return float("inf")
    return report_of(plan).kept_bytes


def _candidates(report: Report) -> list[Rule]:
    """Rules for all that the same ops read, first what may save most."""
    groups: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.kept_bytes and not row.region and all(op in RULES for op in row.op.split("+")):
            groups.setdefault(row.op, []).append(row)
    found = []
    for joined, rows in groups.items():
        modules = tuple(dict.fromkeys(re.sub(r"\d+", "*", glob.escape(r.module)) for r in rows))
        places = dict.fromkeys([("*",) if "" in modules else modules, ("*",)])
        for codec, options in _LEVELS:
            ops = tuple(op for op in joined.split("+") if _keeps(codec, op))
            more = (("range", "uniform"),) if codec == "quant" and _UNIFORM & {*ops} else ()
            saves = sum(row.kept_bytes - _least(row, codec, dict(options)) for row in rows)
            for module in places if ops and saves > 0 else ():
                rule = Rule(
                    module=module, op=ops, codec=codec, options=(*options, *more), derive=True
                )
                found.append((saves, rule))
    return [rule for _, rule in sorted(found, key=lambda pair: -pair[0])]


def _keeps(codec: str, op: str) -> bool:
    """Whether a rule may name the codec beside the op."""
    reads = (read for read in RULES[op].reads if read.use is not Use.SHAPE)
    return any(map(CODEC[codec].can_keep, reads))


def _least(row: Row, codec: str, options: dict[str, Any]) -> int:
    """Bytes of a tensor in another format, as far as its row tells; no more than it has now."""
    numel = 1
    for size in row.shape:
        numel *= size
    full = CODEC[codec].defaults() | options
    return min(row.kept_bytes, int(CODEC[codec].nbytes(numel, getattr(torch, row.dtype), full)))
