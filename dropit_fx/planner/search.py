"""From a step and a peak to a config: told, measured, chosen, and told again of what it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx, nn
from torch.optim import Optimizer

from dropit_fx.capture.example_inputs import resolve
from dropit_fx.capture.trace import LOCK
from dropit_fx.capture.untouched import untouched
from dropit_fx.passes.plan import Plan
from dropit_fx.planner.choice import Item, choose, smallest
from dropit_fx.planner.errors import PlanError
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
from dropit_fx.planner.step import Step
from dropit_fx.planner.timeline import Timeline, forecast
from dropit_fx.planner.workspaces import Spec, measure_workspaces
from dropit_fx.rewriting import Rewriter
from dropit_fx.rules import Config, Rule

ROUNDS = 8  # of choosing, and telling the peak of what was chosen
RUNS = 3  # of what was chosen, until no op takes more for itself than was known
CLOSE = 0.98  # of the peak that was asked for: near enough


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    peak: str | int | float,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    error_limit: float | None = None,
    progress: Progress = lambda text, share: None,
) -> PlannedConfig:
    """Plans a config that keeps a training step under a peak of memory, at the least error.

    The peak is that of all tensors of a step: parameters, buffers, inputs, gradients, the state of
    the optimizer, what is saved for the backward, logits and temporaries. One batch runs a few
    times: for what ops take for themselves, dense and packed, and for the errors that packing puts
    into the gradients; then the model is what it was. What is chosen is told again of the graph
    that it makes, and runs once, until it keeps the peak. The same question has the same answer.

    Args:
        model: Any module that ``transform`` takes, in the mode in which it trains.
        example_inputs: A batch of real inputs, on the model's device: a tensor, a tuple of
            positional inputs, or a mapping of keyword inputs. None: blank ones of a guessed shape.
        peak: Bytes; ``"6GiB"``, ``"800MB"``; or ``"40%"`` of the dense step's peak.
        loss: From the model's output to the scalar that is differentiated. None: its ``loss`` if it
            has one, otherwise a fixed random projection of all that has a gradient.
        optimizer: What moves the parameters; its state and temporaries then count.
        error_limit: The most that the gradient of all parameters may lose, relative to its norm, as
            it is told; None: what the peak takes.
        progress: Called with what is done, and the share of it that is.

    Returns:
        A config for ``transform``, with ``predicted`` and ``error``; ``save`` writes it as a file.

    Raises:
        PlanError: The peak cannot be understood or cannot be kept (the message names the least
            that can, and what stands there), or no backward keeps anything.
        CaptureError: No tracer takes the model.
        ModuleNotFoundError: scipy is missing (``pip install 'dropit-fx[plan]'``).
    """
    step = example_step(model, example_inputs, loss, optimizer)
    return plan_step(step, peak, error_limit, progress)


def plan_step(
    step: Step,
    peak: str | int | float,
    error_limit: float | None = None,
    progress: Progress = lambda text, share: None,
    rewriter: Rewrites | None = None,
) -> PlannedConfig:
    """As :func:`plan`, for a step; ``rewriter``: in the place of one that captures the model."""
    if error_limit is not None and not error_limit >= 0:
        raise PlanError(f"error_limit = {error_limit!r}: a relative error, 0 or more")
    peak_bytes(peak, 10**12)  # before anything runs
    with LOCK, untouched(step.model, generators=True):
        return _Search(step, progress, rewriter).run(peak, error_limit)


def example_step(
    model: nn.Module,
    given: Any,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Optimizer | None = None,
) -> Step:
    """The step of a model on inputs as :func:`plan` takes them."""
    if given is None:
        args, kwargs = resolve(model, None, None)
    elif isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    else:
        args, kwargs = (tuple(given) if isinstance(given, tuple | list) else (given,)), {}
    return Step(model, args, kwargs, loss, optimizer)


def plan_frontier(
    step: Step, count: int = 8, progress: Progress = lambda text, share: None
) -> list[PlannedConfig]:
    """Plans for peaks from below the dense one's down to the least, the highest first.

    Args:
        step: As for :func:`plan_step`.
        count: Of the peaks; a plan that keeps two of them is there once.
        progress: As for :func:`plan`.

    Returns:
        Their predicted peaks fall, their errors grow.

    Raises:
        PlanError: The step keeps nothing for its backward that can be packed.
    """
    with LOCK, untouched(step.model, generators=True):
        return _Search(step, progress).frontier(count)


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

    module: fx.GraphModule

    def rewritten(self, config: Config) -> Plan:
        """A copy of the graph, rewritten."""

    def runs(self, module: fx.GraphModule) -> nn.Module:
        """What runs in a step where a graph is looked at."""

    def peak(self, config: Config | None) -> int | None:
        """The peak of a real step under a config (None: dense), where it is not as it is told."""


class _Search:
    """Looks for the config of one step."""

    def __init__(self, step: Step, progress: Progress, rewriter: Rewrites | None = None) -> None:
        self.step, self.progress = step, progress
        self.workspaces: dict[Spec, int] = {}
        self.rewriter = rewriter or Rewriter(step.model, step.args, step.kwargs)
        self.groups: list[Group] = []
        self.base: Plan
        self.dense: Timeline
        self.dense_peak: int
        self.told: Timeline  # of the base

    def run(self, peak: str | int | float, error_limit: float | None) -> PlannedConfig:
        self._look()
        dense, asked = self.dense, peak_bytes(peak, self.dense_peak)
        if asked >= self.dense_peak:
            whole = Config(rules=(Rule(codec="keep"),), preset=None)
            found = _Found((), whole, self.rewriter.module, dense, 0.0)
            return self._planned(asked, found, None, self.dense_peak)
        if not self.groups:
            raise PlanError(f"peak = {peak!r}: {self._nothing()}")
        least = self._least()
        if (smallest_peak := self._peak(least)) > asked:
            raise PlanError(
                f"peak = {peak!r} is {shown(asked)}, and the least that can be kept is"
                f" {shown(smallest_peak)} ({smallest_peak} bytes,"
                f" {smallest_peak / self.dense_peak:.0%} of dense); {standing(least.told)}"
            )
        errors = measure_errors(self.step, self.base, self.groups, self.progress)
        found = self._really_under(asked, errors, least)
        error = self._error(found.levels, errors)
        if error_limit is not None and error > error_limit:
            raise PlanError(
                f"under {shown(asked)} the gradient loses {error:.3g} of its norm, more than"
                f" error_limit = {error_limit}: ask for a higher peak, or for a higher limit"
            )
        return self._planned(asked, found, errors, self._peak(found))

    def frontier(self, count: int) -> list[PlannedConfig]:
        """Plans for peaks from the least up, closest together there, where the error falls most.

        Without those that another beats.
        """
        self._look()
        if not self.groups:
            raise PlanError(self._nothing())
        best = least = self._least()
        errors = measure_errors(self.step, self.base, self.groups, self.progress)
        low, high = least.told.peak, max(self.dense.peak, least.told.peak)
        plans = [self._planned(low, least, errors, low)]
        for number in range(1, count):
            asked = low + (high - low) * number**2 // count**2
            found = self._under(asked, errors, best)
            if self._error(found.levels, errors) < self._error(best.levels, errors):
                best = found
                plans = [p for p in plans if p.predicted < found.told.peak]
                plans.append(self._planned(asked, found, errors, found.told.peak))
        return plans[::-1]

    def _look(self) -> None:
        """What there is to be chosen from."""
        self.progress("the base", 0.0)
        self.base = self.rewriter.rewritten(base_config())
        whole = self.rewriter.runs(self.rewriter.module)
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

    def _under(self, asked: int, errors: Sensitivity, least: _Found) -> _Found:
        """What is chosen for a peak, told of the graph that it makes, which has run."""
        for _ in range(RUNS):
            found = self._search(self.told, errors, asked, least)
            if found is least or not self._run(found.module):
                return found
            found = self._found(found.levels, found.gap)
            if found.told.peak <= asked:
                return found
        return least

    def _really_under(self, asked: int, errors: Sensitivity, least: _Found) -> _Found:
        """What is chosen, of which a real step keeps the peak, whatever is told of its ops."""
        target = asked * self.dense.peak // self.dense_peak
        for _ in range(RUNS):
            found = self._under(max(target, least.told.peak), errors, least)
            if (real := self._peak(found)) <= asked:
                return found
            target = target * asked // real
        return least

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

    def _search(self, told: Timeline, errors: Sensitivity, asked: int, least: _Found) -> _Found:
        """Chooses for a peak that is moved by what the last choice was off."""
        items, used = self._items(errors), without_copies(self.groups, told)
        seen: dict[tuple[int, ...], _Found] = {}
        target, best, over = asked, least, None
        for number in range(ROUNDS):
            self.progress("choosing", number / ROUNDS)
            choice = choose(items, used, target)
            if choice is None:
                break
            found = seen.get(choice.levels) or self._found(choice.levels, choice.gap)
            seen[choice.levels] = found
            off = found.told.peak - asked
            if off > 0:
                over, target = target, target - off
                continue
            if self._error(found.levels, errors) <= self._error(best.levels, errors):
                best = found
            if found.told.peak >= CLOSE * asked or self._error(found.levels, errors) == 0:
                break
            target = target - off if over is None else (target + over) // 2
        self.progress("choosing", 1.0)
        return best

    def _items(self, errors: Sensitivity) -> list[list[Item]]:
        """The levels as the knapsack has them; what cannot be measured costs more than all."""
        most = 1e6 * max(
            errors.gradient, *(e for of in errors.errors for e in of if e < float("inf"))
        )
        return [
            [Item(min(e, most), g.spans(lv)) for e, lv in zip(of, g.levels, strict=True)]
            for g, of in zip(self.groups, errors.errors, strict=True)
        ]

    def _error(self, levels: Sequence[int], errors: Sensitivity) -> float:
        pairs = zip(errors.errors, levels, strict=True)
        return float((sum(of[i] for of, i in pairs) / errors.gradient) ** 0.5)

    def _planned(
        self, asked: int, found: _Found, errors: Sensitivity | None, peak: int
    ) -> PlannedConfig:
        error = 0.0 if errors is None else self._error(found.levels, errors)
        told, config = found.told, found.config
        figures = {"asked": asked, "dense": self.dense_peak, "predicted": peak, "error": error}
        notes = notes_of(config.rules, self.groups, found.levels, errors) if errors else ()
        said = about(self.step, told, figures)
        settings = dict(vars(config))
        return PlannedConfig(**settings, **figures, gap=found.gap, notes=notes, about=said)  # type: ignore[arg-type]


def standing(told: Timeline) -> str:
    """What is in use at the peak."""
    alive = told.alive(told.peak_op)
    what = ", ".join(f"{kind} {shown(n)}" for kind, n in alive.items() if n)
    at = told.peak_op
    return f"at the peak, in the {told.phase(at)} ({told.ops[at]}), there are {what}"
