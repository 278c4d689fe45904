"""What the file of a plan says beside its rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dropit_fx.passes.plan import SavedRead
from dropit_fx.planner.costs import Seconds
from dropit_fx.planner.moves import (
    WHOLE,
    Group,
    Place,
    made_by,
    place_of_rule,
    places_by_level,
)
from dropit_fx.planner.sensitivity import Sensitivity
from dropit_fx.planner.size import shown
from dropit_fx.planner.speeds import shown_seconds
from dropit_fx.planner.step import Step
from dropit_fx.planner.timeline import Timeline
from dropit_fx.planner.workspaces import measured_with
from dropit_fx.private import pytree
from dropit_fx.rules import Rule


def notes_of(
    rules: Sequence[Rule],
    groups: Sequence[Group],
    levels: Sequence[int],
    errors: Sensitivity,
    seconds: Seconds,
) -> tuple[str, ...]:
    """What is said of each rule: bytes that it keeps, its part in the gradient's error, seconds.

    Where one module and op have a rule for values and another for codes, each is told of its own.
    """
    nbytes: dict[_Told, float] = defaultdict(float)
    error: dict[_Told, float] = defaultdict(float)
    lasts: dict[_Told, float] = defaultdict(float)
    beside: dict[_Told, str] = {}
    for group, level, of, took in zip(groups, levels, errors.errors, seconds, strict=True):
        for part, size in _sizes(group, level):
            nbytes[part] += size
        parts = dict.fromkeys(_part(d.read) for d in group.decisions if d.read.read is not None)
        if not parts:
            continue
        first = min(parts, key=lambda part: part.codes)  # codes lose nothing
        error[first] += of[level]
        lasts[first] += took[level]
        module, op = first.place
        beside |= {p: f"with {op} of '{module}'" for p in parts if p.place != first.place}

    chosen = places_by_level(groups, levels)
    said = []
    for rule in rules:
        place = place_of_rule(rule)
        level_of = rule.codec, rule.options
        own = [_Told(place, codes) for codes, lv in chosen[place].items() if lv == level_of]
        held, lost, takes = (sum(f[p] for p in own) for f in (nbytes, error, lasts))
        text = f"keeps {shown(held)}" if held else "keeps nothing of its own"
        text += f", gradient error {(lost / errors.gradient) ** 0.5:.2g}" if lost else ""
        text += f", {shown_seconds(takes)}" if takes else ""
        said.append(", ".join([text, *dict.fromkeys(beside[p] for p in own if p in beside)]))
    return tuple(said)


class _Told(NamedTuple):
    """What a rule of a plan is about."""

    place: Place
    codes: bool  # small integers, such as masks; else values


def _part(read: SavedRead) -> _Told:
    return _Told((read.module, read.op), read.bits is not None)


def _sizes(group: Group, level: int) -> Iterator[tuple[_Told, int]]:
    """Bytes of what a group keeps, each with what its first reader's rule is about."""
    if group.levels[level] == WHOLE:
        for site in group.sites:
            if site.dense and not site.kept_by:
                yield _part(site.reads[0]), site.nbytes
        return
    firsts = {made: _part(d.read) for d in reversed(group.decisions) if (made := made_by(d))}
    for made, part in firsts.items():
        yield part, group.made_nbytes(made, group.levels[level])


def about(step: Step, told: Timeline, figures: Mapping[str, float], where: str) -> dict[str, str]:
    """The head of the file; ``where``: on what seconds are told."""
    shapes = [
        f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for t in pytree.tree_leaves((step.args, step.kwargs))
        if isinstance(t, Tensor)
    ]
    dense, predicted = int(figures["dense"]), int(figures["predicted"])
    alive = told.alive(told.peak_op)
    return {
        "model": type(step.model).__name__,
        "inputs": "; ".join(shapes),
        "optimizer": type(step.optimizer).__name__ if step.optimizer else "none",
        "pytorch": torch.__version__,
        "workspaces of ops measured with": measured_with(step, step.model) or "nothing: not on CPU",
        "peak asked for": f"{shown(figures['asked'])}",
        "peak predicted": f"{predicted} bytes, {shown(predicted)}: {predicted / dense:.1%} of dense"
        f" ({shown(dense)})",
        "at the peak": ", ".join(f"{kind} {shown(n)}" for kind, n in alive.items()),
        "gradient error": f"{figures['error']:.3g} of the norm of the gradient of all parameters",
        "seconds": f"{shown_seconds(figures['seconds'])} more than the dense step in eager mode,"
        f" packing, unpacking and making again: {where}",
    }
