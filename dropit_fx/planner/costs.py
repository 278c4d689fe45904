"""What each level of each group costs in seconds: packing, unpacking, and what is made again.

A copy is packed once, and unpacked for each that reads it and for each that is derived from it. A
derived value is a pass over memory for each op of its recipe; attention, which its own backward
makes again where nobody keeps its result, costs its products. Nothing is fused here: that is what
an eager step does, and a bound above a compiled one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

from torch import fx

from dropit_fx.codecs import CODEC
from dropit_fx.passes.derive_values import Bases, bases_of, recipe
from dropit_fx.passes.plan import Copy, Decision, Plan
from dropit_fx.planner.moves import WHOLE, Group, Level, Made, is_lossy, made_by
from dropit_fx.planner.speeds import Speeds

Seconds = tuple[tuple[float, ...], ...]  # of each group, one for each of its levels


def seconds_of(base: Plan, groups: Sequence[Group], speeds: Speeds) -> Seconds:
    """The seconds that each level adds to a step in which the group is kept whole.

    Args:
        base: The rewritten graph that the groups are of.
        groups: Their levels.
        speeds: Of the device.
    """
    again = _Again(base, speeds)
    reads: Counter[Made] = Counter()
    extra = []
    for group in groups:
        derived = [d for d in group.decisions if d.derived]
        extra.append(sum(again.seconds(d, reads) for d in derived))
        for d in group.decisions:
            if d.packed and not d.derived:
                reads[d.copy or (d.read.node, d.read.operand)] += 1

    def of_level(group: Group, level: Level, more: float) -> float:
        if level == WHOLE:
            return 0.0
        return more + sum(_of_copy(group, made, level, reads[made], speeds) for made in group.made)

    return tuple(
        tuple(of_level(group, level, more) for level in group.levels)
        for group, more in zip(groups, extra, strict=True)
    )


def _of_copy(group: Group, made: Made, level: Level, reads: int, speeds: Speeds) -> float:
    """Packed once, and unpacked so often."""
    decision = next(d for d in group.decisions if made_by(d) == made)
    codec, options = decision.codec, decision.options
    if is_lossy(decision):
        codec, options = level.codec, group.options(decision, level)
    if codec not in CODEC:
        return 0.0
    what = codec, options, int(decision.read.numel), decision.read.dtype
    return speeds.pack(*what) + reads * speeds.unpack(*what)


class _Again:
    """What is derived, of one plan."""

    def __init__(self, plan: Plan, speeds: Speeds) -> None:
        self._plan, self._speeds = plan, speeds
        self._bases: Bases = bases_of(plan)
        self._attended: set[str] = set()

    def seconds(self, decision: Decision, reads: Counter[Made]) -> float:
        """Of making a value again; the copies that are unpacked for it are counted as read."""
        return self._of_node(decision.derived or "", decision, reads)

    def _of_node(self, name: str, decision: Decision, reads: Counter[Made]) -> float:
        plan, dtype = self._plan, decision.read.dtype
        found = recipe(name, plan, self._bases)
        if found is None:
            return 0.0
        call, shapes = plan.calls[name], plan.values.shapes
        nodes = (v for v in call.operands.values() if isinstance(v, fx.Node))
        given = [shapes[n.name] for n in nodes if n.name in shapes]
        if call.rule.made_again is not None:
            if name in self._attended:
                return 0.0
            self._attended.add(name)
            query, key, value = given[:3]
            flops = 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
            return self._speeds.computes(int(flops), dtype)
        nbytes = sum(int(prod(shape)) for shape in (*given, shapes[name])) * dtype.itemsize
        total = self._speeds.moves(nbytes)
        for how in found.values():
            if isinstance(how, str):
                total += self._of_node(how, decision, reads)
            elif isinstance(how.copy, Copy):
                reads[how.copy] += 1
        return total
