"""``dropit-fx plan --frontier``: what a step loses at each peak, and what others lose there.

The plans go from the dense peak down to the least. Beside them stand the presets, the model with
its blocks checkpointed, and PyTorch's memory budgets, which are of the compiled step. All are
measured alike: the peak of one real step with all tensors counted, and its gradient beside that of
the dense step, from the same batch and seed; the dense step is compiled for the budgets, since a
compiled dropout draws otherwise. The seconds of the dense step and of the plans are told as plans
tell them; those of all steps are measured where that is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isfinite
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.bench.pareto import BUDGETS, Variant, checkpoint_blocks, left_out
from dropit_fx.bench.plot import label_points
from dropit_fx.capture.provenance import first_line
from dropit_fx.capture.trace import LOCK
from dropit_fx.capture.untouched import untouched
from dropit_fx.check.compare import losses, paired
from dropit_fx.config import make_config, presets
from dropit_fx.loss import SEED
from dropit_fx.measure import peak_memory
from dropit_fx.planner import PlannedConfig, Step
from dropit_fx.planner.asked import plan_frontier
from dropit_fx.planner.cards import find_card
from dropit_fx.planner.sensitivity import Progress
from dropit_fx.planner.size import shown
from dropit_fx.planner.speeds import CardSpeeds, shown_seconds, step_seconds
from dropit_fx.planner.timeline import Timeline, forecast
from dropit_fx.private_inductor import recompiling
from dropit_fx.report.palette import SERIES
from dropit_fx.report.plot import INK, MIB, figure_class, finish
from dropit_fx.report.rows import as_text, plain_table
from dropit_fx.rewriting import Rewriter
from dropit_fx.rules import Config

KINDS = DENSE, PLANNED, PRESET, CHECKPOINT, COMPILED = (
    "dense",
    "planned",
    "preset",
    "checkpoint",
    "compiled",
)
Module = Callable[..., Any]
Gradients = dict[str, Tensor | None]
Made = Callable[[], tuple[nn.Module, Module]]  # the owner of the parameters, and what is called


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way of taking the step.

    Attributes:
        name: As in tables and pictures.
        kind: One of ``KINDS``.
        peak: Of a real step, in bytes, all tensors counted.
        error: What the gradient of all parameters loses, relative to its norm.
        plan: The plan: its file, and the peak and the error that it tells; None for other kinds.
        told: Seconds of the step, as they are told of the dense one and of plans.
        seconds: As they were measured, the fastest of some; None where that was not asked for.
    """

    name: str
    kind: str
    peak: int
    error: float
    plan: dict[str, Any] | None = None
    told: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Frontier:
    """Peaks and errors of one step.

    Attributes:
        points: The dense step first, then the plans from the highest peak to the least, the
            presets, and what is recomputed.
        skipped: What cannot be taken, and why.
    """

    points: tuple[Point, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        dense = self.points[0]
        timed = dense.seconds is not None
        figures = ("peak", "of dense", "gradient error", "time told", *["measured"][: int(timed)])
        table = plain_table("step", *figures, figures=figures)
        for p in self.points:
            cells = [shown(p.peak), f"{p.peak / dense.peak:.1%}", f"{p.error:.2%}"]
            cells.append(_times(p.told, dense.told))
            table.add_row(p.name, *cells, *[_times(p.seconds, dense.seconds)][: int(timed)])
        return as_text(table) + "".join(f"{line}\n" for line in left_out(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        return {"points": [asdict(p) for p in self.points], "skipped": self.skipped}


def frontier_of(
    step: Step,
    count: int = 8,
    inner: str = "inductor",
    progress: Progress = lambda text, share: None,
    device: str | None = None,
    timed: bool = False,
) -> Frontier:
    """Plans a step for peak after peak, and takes it in all ways that there are.

    Args:
        step: Of a batch; its model is afterwards as it was.
        count: Of the plans, at most.
        inner: What compiles the dense step, and that at memory budgets.
        progress: Called with what is done, and the share of it that is.
        device: Whose seconds are told, as for ``dropit_fx.plan``.
        timed: Also measure the seconds of each step, here.

    Raises:
        PlanError: The step keeps nothing for its backward that can be packed.
        CaptureError: No tracer takes the model.
    """
    model, blocks = step.model, copy.deepcopy(step.model)
    with LOCK, untouched(model, generators=True):
        plans = plan_frontier(step, count, progress, device)
        rewriter = Rewriter(model, step.args, step.kwargs)

        def packed(config: Config) -> Made:
            return lambda: (model, rewriter.rewritten(config).module)

        def compiled(budget: float) -> Made:
            own = copy.deepcopy(model)
            return lambda: (own, Variant("", budget=budget).compiled(own, inner))

        ways: list[tuple[str, str, Made, PlannedConfig | None]]
        ways = [(DENSE, DENSE, lambda: (model, model), None)]
        ways += [(f"plan {p.predicted / p.dense:.1%}", PLANNED, packed(p), p) for p in plans]
        ways += [(n, PRESET, packed(make_config(preset=n)), None) for n in presets()]
        reason = checkpoint_blocks(blocks)
        ways += [] if reason else [(CHECKPOINT, CHECKPOINT, lambda: (blocks, blocks), None)]
        ways += [(COMPILED, COMPILED, compiled(1), None)]
        ways += [(f"budget={b}", COMPILED, compiled(b), None) for b in BUDGETS]

        told = forecast(step, rewriter.dense())
        lasts = _dense_seconds(step, told, device)
        points: list[Point] = []
        skipped = {CHECKPOINT: reason} if reason else {}
        exact: dict[str, Gradients] = {}
        for number, (name, kind, made, planned) in enumerate(ways):
            progress(name, number / len(ways))
            try:
                owner, module = made()
                peak, gradients = _taken(step, told, owner, module)
            except RuntimeError as error:
                if kind != COMPILED:
                    raise
                skipped[name] = first_line(error)
                continue
            dense = exact.setdefault(COMPILED if kind == COMPILED else DENSE, gradients)
            lost = losses(paired(dense, gradients))[0].relative
            point = Point(name=name, kind=kind, peak=peak, error=lost)
            if planned is not None:
                point = replace(point, plan=_told(planned), told=lasts + planned.seconds)
            elif kind == DENSE:
                point = replace(point, told=lasts)
            if timed:
                own = replace(step, model=owner, optimizer=None)
                with recompiling(100, 1000):
                    point = replace(point, seconds=step_seconds(own, module))
            points.append(point)
    progress("done", 1.0)
    return Frontier(tuple(points), skipped)


def _taken(step: Step, told: Timeline, owner: nn.Module, module: Module) -> tuple[int, Gradients]:
    """The peak of a real step and its gradients; the optimizer's part of it is told."""
    own = Step(owner, step.args, step.kwargs, step.loss)
    with recompiling(100, 1000), own.real() as (args, kwargs):

        def loss() -> Tensor:
            torch.manual_seed(SEED)
            return own.loss_of(module(*args, **kwargs))

        peak = sum(told.resident.values()) + peak_memory(loss)
        loss().backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad for n, p in owner.named_parameters()}
    return max(peak, *told.used[told.phases[-1] :], 0), gradients


def _dense_seconds(step: Step, told: Timeline, device: str | None) -> float:
    """Measured here, or told of a card."""
    if device is None:
        return step_seconds(step, step.model)
    return told.seconds(CardSpeeds(find_card(device)))


def _times(seconds: float | None, dense: float | None) -> str:
    """Seconds as people read them, and how many times dense's they are."""
    if seconds is None or not dense:
        return ""
    return f"{shown_seconds(seconds)} {seconds / dense:.2f}x"


def _told(plan: PlannedConfig) -> dict[str, Any]:
    error = plan.error if isfinite(plan.error) else None  # of what cannot be measured
    return {
        "peak": plan.predicted,
        "error": error,
        "seconds_more": plan.seconds,
        "gap": plan.gap,
        "file": plan.to_yaml(),
    }


def draw(found: Frontier, title: str, path: str | PathLike[str]) -> None:
    """Gradient error over peak, and time beside it; down and left is better.

    Args:
        found: What :func:`frontier_of` returns.
        title: Of the picture.
        path: Its suffix says the format.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    figure = figure_class()(figsize=(14, 6), layout="constrained")
    axes, times = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = INK, *SERIES[:4]
    for kind, colour, marker in zip(KINDS, colours, "soD^v", strict=True):
        if mine := _places(found, kind):
            axes.scatter(*zip(*mine, strict=True), c=colour, marker=marker, s=46, label=kind)
    line = _places(found, DENSE, PLANNED)
    axes.plot(*zip(*line, strict=True), color=SERIES[0], linewidth=1, zorder=1)
    finish(axes, title, "what the gradient loses, % of its norm")
    axes.set_xlabel("peak of a step, MiB")
    axes.set_yscale("symlog", linthresh=1)
    axes.grid(color="#eceef0")
    axes.set_axisbelow(True)
    axes.margins(0.12)
    named = [p for p in found.points if p.kind != PLANNED]
    label_points(axes, {p.name: _place(p) for p in named})
    axes.legend(frameon=False)
    _draw_times(times, found)
    figure.savefig(path, dpi=110)


def _draw_times(axes: Any, found: Frontier) -> None:
    """Seconds over peak: told as a line, measured ones as points in the colours of their kinds."""
    told = [(p.peak / MIB, p.told * 1e3) for p in found.points if p.told is not None]
    axes.plot(*zip(*told, strict=True), color=SERIES[0], linewidth=1, marker="o", label="told")
    for kind, colour, marker in zip(KINDS, (INK, *SERIES[:4]), "soD^v", strict=True):
        mine = [p for p in found.points if p.kind == kind and p.seconds is not None]
        if mine:
            places = zip(*((p.peak / MIB, (p.seconds or 0) * 1e3) for p in mine), strict=True)
            label = f"{kind}, measured"
            axes.scatter(*places, facecolors="none", edgecolors=colour, marker=marker, label=label)
    finish(axes, "a step, in eager mode but for compiled ones", "ms")
    axes.set_xlabel("peak of a step, MiB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _places(found: Frontier, *kinds: str) -> list[tuple[float, float]]:
    return [_place(p) for p in found.points if p.kind in kinds]


def _place(point: Point) -> tuple[float, float]:
    return point.peak / MIB, 100 * point.error
