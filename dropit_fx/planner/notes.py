"""What the file of a plan says beside its rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dropit_fx.planner.costs import Seconds
from dropit_fx.planner.moves import WHOLE, Group, made_by, place_of, place_of_rule
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
    """What is said of each rule: bytes that it keeps, its part in the gradient's error, seconds."""
    nbytes: dict[object, int] = {}
    error: dict[object, float] = {}
    lasts: dict[object, float] = {}
    beside: dict[object, str] = {}
    for group, level, of, took in zip(groups, levels, errors.errors, seconds, strict=True):
        first = group.places[0] if group.places else None
        for place, size in _sizes(group, level):
            nbytes[place] = nbytes.get(place, 0) + size
        for place in group.places:
            if place == first:
                error[place] = error.get(place, 0.0) + of[level]
                lasts[place] = lasts.get(place, 0.0) + took[level]
            else:
                beside[place] = f"with {first[1]} of '{first[0]}'" if first else ""

    said = []
    for rule in rules:
        place = place_of_rule(rule)
        text = f"keeps {shown(nbytes[place])}" if nbytes.get(place) else "keeps nothing of its own"
        if error.get(place):
            text += f", gradient error {(error[place] / errors.gradient) ** 0.5:.2g}"
        text += f", {shown_seconds(lasts[place])}" if lasts.get(place) else ""
        said.append(text + (f", {beside[place]}" if place in beside else ""))
    return tuple(said)


def _sizes(group: Group, level: int) -> Iterator[tuple[object, int]]:
    """Bytes of what a group keeps, each with the place of its first reader."""
    if group.levels[level] == WHOLE:
        for site in group.sites:
            if site.dense and not site.kept_by:
                yield (site.reads[0].module, site.reads[0].op), site.nbytes
        return
    firsts = {made: place_of(d) for d in reversed(group.decisions) if (made := made_by(d))}
    for made, place in firsts.items():
        yield place, group.made_nbytes(made, group.levels[level])


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
