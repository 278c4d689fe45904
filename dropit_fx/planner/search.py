"""From a step and a peak to a config: told, measured, chosen, and told again of what it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import fx, nn

from dropit_fx.passes.plan import Plan
from dropit_fx.planner.choice import choose, smallest
from dropit_fx.planner.costs import Seconds, seconds_of
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.goal import Goal, squares, time_bound, total
from dropit_fx.planner.moves import (
    Group,
    base_config,
    config_of,
    groups_of,
    places_by_level,
    rules_of,
    without_copies,
)
from dropit_fx.planner.notes import about, notes_of
from dropit_fx.planner.planned import PlannedConfig
from dropit_fx.planner.sensitivity import Progress, Sensitivity, measure_errors
from dropit_fx.planner.size import peak_bytes, shown
from dropit_fx.planner.speeds import CardSpeeds, MeasuredSpeeds, shown_seconds, step_seconds
from dropit_fx.planner.step import Step, device_of
from dropit_fx.planner.timeline import Timeline, forecast
from dropit_fx.planner.workspaces import Spec, measure_workspaces
from dropit_fx.rewriting import Rewriter
from dropit_fx.rules import Config, Rule

ROUNDS = 8  # of choosing, and telling the peak of what was chosen
RUNS = 3  # of what was chosen, until no op takes more for itself than was known
CLOSE = 0.98  # of the peak that was asked for: near enough


class Limits(NamedTuple):
    """What a plan may cost beside memory, as for ``planner.plan``."""

    error: float | None = None
    time: str | float | None = None


NO_LIMITS = Limits()


@dataclass
class _Found:
    """A choice, the config that it is, and what is told of it."""

    levels: tuple[int, ...]
    config: Config
    module: nn.Module
    told: Timeline
    gap: float
    real: int | None = None  # its peak, once it was asked for


class Rewrites(Protocol):
    """What makes the graphs that are looked at: a ``Rewriter``, or what stands in its place."""

    def dense(self) -> fx.GraphModule:
        """The graph with nothing packed, its checkpoints as they are."""

    def rewritten(self, config: Config) -> Plan:
        """A copy of the graph, rewritten."""

    def runs(self, module: fx.GraphModule) -> nn.Module:
        """What runs in a step where a graph is looked at."""

    def peak(self, config: Config | None) -> int | None:
        """The peak of a real step under a config (None: dense), where it is not as it is told."""


class Search:
    """Looks for the config of one step."""

    def __init__(
        self,
        step: Step,
        progress: Progress,
        rewriter: Rewrites | None = None,
        speeds: CardSpeeds | None = None,
    ) -> None:
        self.step, self.progress = step, progress
        self.speeds: CardSpeeds | MeasuredSpeeds = speeds or MeasuredSpeeds(device_of(step))
        self.workspaces: dict[Spec, int] = {}
        self.rewriter = rewriter or Rewriter(step.model, step.args, step.kwargs)
        self.groups: list[Group] = []
        self.base: Plan
        self.dense: Timeline
        self.dense_peak: int
        self.told: Timeline  # of the base
        self.seconds: Seconds  # of the levels
        self.errors: Sensitivity
        self.squares: Seconds  # the same, as they add up

    def run(self, peak: str | int | float, limits: Limits) -> PlannedConfig:
        """The config for one peak."""
        self._look()
        dense, asked = self.dense, peak_bytes(peak, self.dense_peak)
        if asked >= self.dense_peak:
            whole = Config(rules=(Rule(codec="keep"),), preset=None)
            found = _Found((), whole, self.base.module, dense, 0.0)
            return self._planned(asked, found, self.dense_peak)
        if not self.groups:
            raise PlanError(f"peak = {peak!r}: {self._nothing()}")
        least = self._least()
        if (smallest_peak := self._peak(least)) > asked:
            raise PlanError(
                f"peak = {peak!r} is {shown(asked)}, and the least that can be kept is"
                f" {shown(smallest_peak)} ({smallest_peak} bytes,"
                f" {smallest_peak / self.dense_peak:.0%} of dense); {standing(least.told)}"
            )
        self._measure()
        found = self._within(asked, limits, least)
        return self._planned(asked, found, self._peak(found))

    def _within(self, asked: int, limits: Limits, least: _Found) -> _Found:
        """Of least error, within a time where there is a limit; or of least time within an error.

        Where the limit is not kept, what would be the least says by how much.
        """
        by_error, by_time = (self.squares, self.seconds), (self.seconds, self.squares)
        error = math.inf if limits.error is None else limits.error
        seconds = math.inf
        if limits.time is not None:
            seconds = time_bound(limits.time, self.dense_seconds)
            goal, other = Goal(*by_error, seconds), Goal(*by_time)
        else:
            goal, other = Goal(*by_time, error**2), Goal(*by_error)
        if limits == NO_LIMITS:
            goal = other
        found = self._really_under(asked, goal, least) or self._really_under(asked, other, least)
        assert found is not None  # the other goal has no limit
        if (took := total(self.seconds, found.levels)) > seconds:
            raise PlanError(
                f"under {shown(asked)} a step takes {shown_seconds(took)} more at least, on"
                f" {self.speeds.name}, and time_limit = {limits.time!r} is"
                f" {shown_seconds(seconds)}: ask for a higher peak, or for a higher limit"
            )
        if (lost := self._error(found.levels)) > error * (1 + 1e-9):  # of sums in other orders
            raise PlanError(
                f"under {shown(asked)} the gradient loses {lost:.3g} of its norm, more than"
                f" error_limit = {limits.error}: ask for a higher peak, or for a higher limit"
            )
        return found

    def dense_seconds(self) -> float:
        """Of the dense step: measured at hand, or told of its ops."""
        if isinstance(self.speeds, CardSpeeds):
            return self.dense.seconds(self.speeds)
        return step_seconds(self.step, self.step.model)

    def _measure(self) -> None:
        """What each level of each group loses, and how long it takes."""
        self.errors = measure_errors(self.step, self.base, self.groups, self.progress)
        self.squares = squares(self.errors)
        self.progress("seconds of levels", 0.0)
        self.seconds = seconds_of(self.base, self.groups, self.speeds)
        self.speeds.remember()

    def frontier(self, count: int) -> list[PlannedConfig]:
        """Plans for peaks from the least up, closest together there, where the error falls most.

        Without those that another beats.
        """
        self._look()
        if not self.groups:
            raise PlanError(self._nothing())
        best = least = self._least()
        self._measure()
        goal = Goal(self.squares, self.seconds)
        low, high = least.told.peak, max(self.dense.peak, least.told.peak)
        plans = [self._planned(low, least, low)]
        for number in range(1, count):
            asked = low + (high - low) * number**2 // count**2
            found = self._under(asked, goal, best)
            if found is not None and goal.cost(found.levels) < goal.cost(best.levels):
                best = found
                plans = [p for p in plans if p.predicted < found.told.peak]
                plans.append(self._planned(asked, found, found.told.peak))
        return plans[::-1]

    def _look(self) -> None:
        """What there is to be chosen from."""
        self.progress("the base", 0.0)
        self.base = self.rewriter.rewritten(base_config())
        whole = self.rewriter.runs(self.rewriter.dense())
        self._run(whole)
        self._run(self.base.module)
        self.dense = forecast(self.step, whole, self.workspaces)
        self.dense_peak = self.rewriter.peak(None) or self.dense.peak
        self.told = forecast(self.step, self.base.module, self.workspaces)
        self.groups = groups_of(self.base, self.told)

    def _nothing(self) -> str:
        return (
            f"the step takes {shown(self.dense.peak)} dense, and keeps nothing for its backward"
            f" that can be packed; {standing(self.dense)}"
        )

    def _under(self, asked: int, goal: Goal, least: _Found) -> _Found | None:
        """What is chosen for a peak, told of the graph that it makes, which has run.

        None where nothing was found that keeps the goal's limit too.
        """
        for _ in range(RUNS):
            found = self._search(self.told, goal, asked, least)
            if found is None or found is least or not self._run(found.module):
                return found
            found = self._found(found.levels, found.gap)
            if found.told.peak <= asked:
                return found
        return least if goal.keeps(least.levels) else None

    def _really_under(self, asked: int, goal: Goal, least: _Found) -> _Found | None:
        """What is chosen, of which a real step keeps the peak, whatever is told of its ops."""
        target = asked * self.dense.peak // self.dense_peak
        for _ in range(RUNS):
            found = self._under(max(target, least.told.peak), goal, least)
            if found is None or (real := self._peak(found)) <= asked:
                return found
            target = target * asked // real
        return least if goal.keeps(least.levels) else None

    def _peak(self, found: _Found) -> int:
        if found.real is None:
            found.real = self.rewriter.peak(found.config) or found.told.peak
        return found.real

    def _found(self, levels: Sequence[int], gap: float = 0.0) -> _Found:
        config = config_of(rules_of(places_by_level(self.groups, levels)))
        module = self.rewriter.runs(self.rewriter.rewritten(config).module)
        told = forecast(self.step, module, self.workspaces)
        return _Found(tuple(levels), config, module, told, gap)

    def _run(self, module: nn.Module) -> bool:
        """Runs a step for what its ops take for themselves: whether that is more than was known."""
        before = dict(self.workspaces)
        for op, nbytes in measure_workspaces(self.step, module).items():
            self.workspaces[op] = max(nbytes, self.workspaces.get(op, 0))
        return self.workspaces != before

    def _least(self) -> _Found:
        """Every group at its smallest."""
        sizes = [[g.nbytes(level) for level in g.levels] for g in self.groups]
        levels = [smallest(of) for of in sizes]
        found = self._found(levels)
        return self._found(levels) if self._run(found.module) else found

    def _search(self, told: Timeline, goal: Goal, asked: int, least: _Found) -> _Found | None:
        """Chooses for a peak that is moved by what the last choice was off."""
        items, used = goal.items(self.groups), without_copies(self.groups, told)
        seen: dict[tuple[int, ...], _Found] = {}
        target, over = asked, None
        best = least if goal.keeps(least.levels) else None
        for number in range(ROUNDS):
            self.progress("choosing", number / ROUNDS)
            choice = choose(items, used, target, goal.most)
            if choice is None:
                break
            found = seen.get(choice.levels) or self._found(choice.levels, choice.gap)
            seen[choice.levels] = found
            off = found.told.peak - asked
            if off > 0:
                over, target = target, target - off
                continue
            cost = goal.cost(found.levels)
            if best is None or cost <= goal.cost(best.levels):
                best = found
            if found.told.peak >= CLOSE * asked or cost == 0:
                break
            target = target - off if over is None else (target + over) // 2
        self.progress("choosing", 1.0)
        return best

    def _error(self, levels: Sequence[int]) -> float:
        return math.sqrt(total(self.errors.errors, levels) / self.errors.gradient)

    def _planned(self, asked: int, found: _Found, peak: int) -> PlannedConfig:
        """As it is told; without levels it is the dense step."""
        told, config, levels = found.told, found.config, found.levels
        figures: dict[str, Any] = {"asked": asked, "dense": self.dense_peak, "predicted": peak}
        figures |= {"error": 0.0, "seconds": 0.0}
        notes: tuple[str, ...] = ()
        if levels:
            lasts = total(self.seconds, levels)
            figures |= {"error": self._error(levels), "seconds": lasts}
            notes = notes_of(config.rules, self.groups, levels, self.errors, self.seconds)
        said = about(self.step, told, figures, self.speeds.name)
        settings = dict(vars(config))
        return PlannedConfig(**settings, **figures, gap=found.gap, notes=notes, about=said)


def standing(told: Timeline) -> str:
    """What is in use at the peak."""
    alive = told.alive(told.peak_op)
    what = ", ".join(f"{kind} {shown(n)}" for kind, n in alive.items() if n)
    at = told.peak_op
    return f"at the peak, in the {told.phase(at)} ({told.ops[at]}), there are {what}"
