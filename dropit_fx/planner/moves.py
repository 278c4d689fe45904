"""What may become of each saved tensor: groups that change together, and the levels of each.

All moves start from one rewritten graph, the *base*: every mask in its fewest bits, every value
rounded, and what can be made again made again. In it, each packed copy may be kept in more bits or
fewer, or whole; what is derived from it is then derived from that. Copies whose reads stand under
one rule of a config (module and op), or in one storage, change together: they are a group.
"""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from dropit_fx.codecs import CODEC
from dropit_fx.ops.rule import Use
from dropit_fx.passes.derive_values import unpacked
from dropit_fx.passes.insert_packing import unchecked
from dropit_fx.passes.plan import Copy, Decision, Plan, Site
from dropit_fx.passes.share_packed import by_site
from dropit_fx.planner.choice import Span
from dropit_fx.planner.timeline import SAVED, Lifetime, Timeline
from dropit_fx.rules import Config, Rule

BLOCK = 256  # elements that share a scale
# which divide by the deviation of a channel
_UNIFORM = ("batch_norm", "group_norm", "instance_norm")
LOSS_CLASSES = 4096  # logits of so many are never whole

Place = tuple[str, str]  # what a rule names: module and op
Made = Copy | tuple[str, str]  # a packed copy, or what a node keeps of its own: node, operand


class Level(NamedTuple):
    """One way of keeping the values of a group; its masks go in their fewest bits."""

    codec: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        told = [f"{k}={v}" for k, v in self.options if k in ("gamma", "bits")]
        return self.codec + (f"({', '.join(told)})" if told else "")


WHOLE = Level("keep")  # the group as it is, masks too
EXACT = Level("bitmask")  # for groups without copies of values: nothing is lost
_QUANT = tuple(Level("quant", (("bits", b), ("block", BLOCK))) for b in (8, 6, 5, 4, 3, 2))
_AGAIN = _QUANT[0]  # what a rule says of values that are all made again
_MINK = tuple(
    Level("mink", (("gamma", g), ("bits", b), ("block", BLOCK)))
    for g, b in ((0.5, 4), (0.6, 3), (0.7, 2), (0.8, 2))
)


def base_config() -> Config:
    """Everything in five bits or made again, as a preset would say it."""
    bitmask = Rule(codec="bitmask", preset=True)
    uniform = (("bits", 5), ("block", BLOCK), ("range", "uniform"))
    norms = Rule(op=_UNIFORM, codec="quant", options=uniform, preset=True)
    rest = Rule(codec="quant", options=uniform[:2], preset=True)
    return config_of((bitmask, norms, rest))


def config_of(rules: tuple[Rule, ...]) -> Config:
    """A config of these rules alone, with what a plan sets beside them."""
    return Config(rules=rules, preset=None, derive=True, loss_classes=LOSS_CLASSES)


@dataclass(eq=False)
class Group:
    """Decisions that change together.

    Attributes:
        decisions: As they are in the base.
        sites: The storages that they read.
        made: The packed copies, and how long each is there.
        levels: What may become of it.
    """

    decisions: list[Decision] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    made: dict[Made, tuple[Lifetime, ...]] = field(default_factory=dict)
    levels: tuple[Level, ...] = ()
    whole_spans: tuple[Span, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """The modules and ops whose rules decide, in the order of the graph."""
        return tuple(dict.fromkeys(place_of(d) for d in self.decisions if d.read.read is not None))

    @property
    def lossy(self) -> list[Decision]:
        """The decisions that lose something."""
        return [d for d in self.decisions if is_lossy(d)]

    def nbytes(self, level: Level) -> int:
        """What is kept at a level, in bytes."""
        if level == WHOLE:
            return sum(site.nbytes for site in self.sites if site.dense and not site.kept_by)
        return sum(self.made_nbytes(made, level) for made in self.made)

    def made_nbytes(self, made: Made, level: Level) -> int:
        """Bytes of one packed copy at a level."""
        decision = next(d for d in self.decisions if made_by(d) == made)
        if not is_lossy(decision):
            return decision.nbytes
        read, codec = decision.read, CODEC[decision.codec]
        beside = decision.nbytes - codec.nbytes(read.numel, read.dtype, decision.options)
        options = self.options(decision, level)
        return beside + CODEC[level.codec].nbytes(read.numel, read.dtype, options)

    def options(self, decision: Decision, level: Level) -> dict[str, Any]:
        """The options that a decision has in the base, as a level has them."""
        options = CODEC[level.codec].defaults() | dict(level.options)
        if level.codec == "quant":
            options["range"] = decision.options["range"]
        if decision.options.get("by_channel"):
            options["by_channel"] = True
        return options

    def spans(self, level: Level) -> tuple[Span, ...]:
        """What a level changes in the memory of the base without this group's copies."""
        if level == WHOLE:
            return self.whole_spans
        return tuple(
            Span(*_life(lives), self.made_nbytes(made, level))
            for made, lives in self.made.items()
            if lives
        )


def place_of(decision: Decision) -> Place:
    """The module and the op of a decision's read."""
    return decision.read.module, decision.read.op


def made_by(decision: Decision) -> Made | None:
    """The packed copy that a decision keeps, or None where it keeps nothing."""
    if not decision.packed or decision.derived or not decision.nbytes:
        return None
    return decision.copy or (decision.read.node, decision.read.operand)


def is_lossy(decision: Decision) -> bool:
    """Whether a copy is kept that is not the tensor to the last bit."""
    codec = CODEC.get(decision.codec)
    if codec is None or made_by(decision) is None:
        return False
    return not codec.lossless(decision.options)


def groups_of(base: Plan, told: Timeline) -> list[Group]:
    """The groups of a rewritten graph, in its order.

    Args:
        base: Of the graph, as the pipeline left it under :func:`base_config`.
        told: The timeline of that graph.
    """
    joined = _Joined()
    for number, (_, decisions) in enumerate(by_site(base.sites, base.decisions)):
        for d in decisions:
            if d.packed and d.read.row is not None and not d.read.beside:
                joined.join(("site", number), ("place", *place_of(d), d.read.bits is not None))
                if (made := made_by(d)) is not None:
                    joined.join(("site", number), ("made", made))
    groups: dict[Any, Group] = {}
    for number, (site, decisions) in enumerate(by_site(base.sites, base.decisions)):
        if ("site", number) in joined:
            group = groups.setdefault(joined.root(("site", number)), Group())
            group.sites.append(site)
            group.decisions += [d for d in decisions if d.packed]
    nodes = {n.name: n for n in base.module.graph.nodes}
    sources = unpacked(base)
    found = []
    for group in groups.values():
        for d in group.decisions:
            if (made := made_by(d)) is not None:
                group.made.setdefault(made, lives_of(d, nodes, told))
        group.levels = _levels(group, sources)
        group.whole_spans = tuple(_whole_spans(group, told))
        found.append(group)
    return found


class _Joined:
    """Things that belong together, by what joins them."""

    def __init__(self) -> None:
        self._parents: dict[Any, Any] = {}

    def __contains__(self, thing: Any) -> bool:
        return thing in self._parents

    def root(self, thing: Any) -> Any:
        self._parents.setdefault(thing, thing)
        while self._parents[thing] != thing:
            thing = self._parents[thing]
        return thing

    def join(self, one: Any, other: Any) -> None:
        self._parents[self.root(other)] = self.root(one)


def _levels(group: Group, sources: set[Copy]) -> tuple[Level, ...]:
    """Nothing is made from fewer than four bits, nor where a slope jumps read from them."""
    lossy = group.lossy
    if not lossy:
        return (WHOLE, EXACT) if group.made else (EXACT,)
    fine = any(d.read.jumps or made_by(d) in sources for d in lossy)
    uses = {d.read.read.use for d in lossy if d.read.read is not None}
    levels = [lv for lv in _QUANT if not fine or dict(lv.options)["bits"] >= 4]
    if uses == {Use.CONTRACT} and not fine:
        levels += _MINK
    packed = sorted(levels, key=group.nbytes, reverse=True)
    return (WHOLE, *(lv for lv in packed if group.nbytes(lv) < group.nbytes(WHOLE)))


def pack_name(decision: Decision, nodes: Mapping[str, fx.Node]) -> str | None:
    """The node that makes the copy that a decision reads; None: its own call does."""
    packed: Any = nodes[decision.read.node].kwargs.get("packed", {})
    how = packed.get(decision.read.operand)
    return unchecked(how).name if isinstance(how, fx.Node) else None


def lives_of(
    decision: Decision, nodes: Mapping[str, fx.Node], told: Timeline
) -> tuple[Lifetime, ...]:
    """The storages of a copy, in the timeline."""
    name = pack_name(decision, nodes)
    if name is not None:
        return tuple(told.lives[i] for i in told.packs.get(name, ()))
    node = decision.read.node
    results = {i for name, i in told.values.items() if name == node}
    own = [(i, life) for i, life in enumerate(told.lives) if life.node == node]
    return tuple(life for i, life in own if life.kind == SAVED and i not in results)


def _life(lives: Iterable[Lifetime]) -> tuple[int, int]:
    """From when to when."""
    lives = tuple(lives)
    return min(life.born for life in lives), max(life.freed for life in lives)


def _whole_spans(group: Group, told: Timeline) -> Iterator[Span]:
    """The storages themselves, from where the base lets them go to where it lets the copies go."""
    lives = [life for lives in group.made.values() for life in lives]
    if not lives:
        return
    born, freed = _life(lives)
    for site in group.sites:
        if site.kept_by or not site.dense:
            continue
        number = told.values.get(site.name)
        start = born if number is None else max(told.lives[number].freed, 0)
        if start < freed:
            yield Span(start, freed, site.nbytes)


def without_copies(groups: Sequence[Group], told: Timeline) -> list[int]:
    """Bytes in use in each op of the base, but for the copies of all groups."""
    steps = [0] * (len(told.used) + 1)
    for life in {
        id(life): life for g in groups for lives in g.made.values() for life in lives
    }.values():
        steps[life.born] += life.nbytes
        steps[life.freed] -= life.nbytes
    used, level = [], 0
    for at, total in enumerate(told.used):
        level += steps[at]
        used.append(total - level)
    return used


def rules_of(chosen: Mapping[Place, Mapping[bool, Level]]) -> tuple[Rule, ...]:
    """The rules of a config that gives each place its levels, of values and of codes.

    The root module is named by a glob that every module matches: its rules come last.
    """
    rules = []
    for (module, op), levels in sorted(chosen.items(), key=lambda item: not item[0][0]):
        at: dict[str, Any] = {"module": (glob.escape(module) or "*",), "op": (op,)}
        given = sorted(levels.items(), key=lambda item: item[1] == WHOLE)
        for level in dict.fromkeys(level for _, level in given):
            derive = level not in (WHOLE, EXACT)
            rules.append(Rule(**at, codec=level.codec, options=level.options, derive=derive))
    return tuple(rules)


def places_by_level(
    groups: Sequence[Group], levels: Sequence[int]
) -> dict[Place, dict[bool, Level]]:
    """What each module and op gets, by whether it speaks of codes."""
    chosen: dict[Place, dict[bool, Level]] = defaultdict(dict)
    for group, number in zip(groups, levels, strict=True):
        level = group.levels[number]
        for d in group.decisions:
            if d.read.read is None or d.read.row is None:
                continue
            codes = d.read.bits is not None
            said = level
            if level != WHOLE:
                said = EXACT if codes else _AGAIN if level == EXACT else level
            if said.codec == "quant" and d.read.op in _UNIFORM:
                said = said._replace(options=(*said.options, ("range", "uniform")))
            chosen[place_of(d)][codes] = said
    return chosen


def place_of_rule(rule: Rule) -> Place:
    """The module and the op that a rule of :func:`rules_of` names."""
    name = rule.module[0]
    return ("" if name == "*" else re.sub(r"\[([*?[])\]", r"\1", name)), rule.op[0]
