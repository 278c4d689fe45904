"""A plan that follows training: made again every so many steps, of the graph that was traced once.

GACT adapts its bits so (``adapt_interval``), to what the gradients have become; here a plan may
change everything that one says: codecs, bits, what is kept and what is made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from dropit_fx.capture.trace import LOCK
from dropit_fx.capture.untouched import untouched
from dropit_fx.planner import PlanError, PlannedConfig, Step, plan_step
from dropit_fx.planner.asked import example_step
from dropit_fx.planner.search import Limits
from dropit_fx.planner.sensitivity import Progress
from dropit_fx.private import MODULE_DICTS, pytree
from dropit_fx.report.origin import Origin
from dropit_fx.report.rows import attach
from dropit_fx.rewriting import Rewriter
from dropit_fx.words import is_whole


class AutoPlan:
    """Keeps a model planned for one peak while it trains, in eager mode.

    ``packed`` is what ``transform(model, plan)`` would return, and stays the same object: a new
    plan changes its graph. Parameters, buffers and the optimizer's state are touched by no plan.
    Planning takes a few steps' time and, while it runs, more memory than a step.

    Args:
        model: As for ``dropit_fx.plan``; it is traced here, once.
        example_inputs: As for ``dropit_fx.plan``; the first plan is made of them.
        peak: As for ``dropit_fx.plan``; of a share, dense is that of the first plan.
        every: Steps from one plan to the next, 1 or more.
        loss: As for ``dropit_fx.plan``.
        optimizer: As for ``dropit_fx.plan``.
        error_limit: As for ``dropit_fx.plan``.
        time_limit: As for ``dropit_fx.plan``.
        device: As for ``dropit_fx.plan``.
        progress: As for ``dropit_fx.plan``.

    Attributes:
        packed: The rewritten model.
        planned: The plan that it runs under.
        plans: How many were made.

    Raises:
        ValueError: ``every`` is no whole number, or below 1.
        PlanError: As for ``dropit_fx.plan``, of the first plan.
        CaptureError: No tracer takes the model.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        peak: str | int | float,
        every: int = 1000,
        loss: Callable[[Any], Tensor] | None = None,
        optimizer: Optimizer | None = None,
        error_limit: float | None = None,
        time_limit: str | float | None = None,
        device: str | None = None,
        progress: Progress = lambda text, share: None,
    ) -> None:
        if not is_whole(every) or every < 1:
            raise ValueError(f"every={every!r}: steps from one plan to the next, 1 or more.")
        step = example_step(model, example_inputs, loss, optimizer)
        self._every, self._count = every, 0
        self._limits, self._progress = Limits(error_limit, time_limit), progress
        self._device = device
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._shapes = _shapes(step)
        with LOCK, untouched(model, generators=True):
            self._rewriter = Rewriter(model, step.args, step.kwargs)
        self._step = step  # of the shapes that the graph was traced with
        self.plans = 0
        self.packed: fx.GraphModule
        self.planned: PlannedConfig
        self._peak = peak
        self._plan(step)

    def after_step(self, batch: Any) -> bool:
        """Call it behind each step: every so many, a plan is made of this batch.

        Where the batch has other shapes than the first, the next that has them is taken. Where no
        plan can be made (a gradient that is not finite), a warning says so and the last one stays.

        Args:
            batch: As ``example_inputs`` of ``dropit_fx.plan``.

        Returns:
            Whether there is a new plan.
        """
        self._count += 1
        if self._count < self._every:
            return False
        step = example_step(self._model, batch, self._loss, self._optimizer)
        if _shapes(step) != self._shapes:
            return False
        self._count = 0
        try:
            self._plan(step)
        except PlanError as error:
            warnings.warn(f"the plan before stays: {error}", stacklevel=2)
            return False
        return True

    def _plan(self, step: Step) -> None:
        planned = plan_step(
            step, self._peak, self._limits, self._progress, self._rewriter, self._device
        )
        self._peak = planned.asked  # in bytes, from the first plan on
        if self.plans and planned == self.planned:
            self.planned, self.plans = planned, self.plans + 1
            return
        with LOCK, untouched(self._model, generators=True):
            plan = self._rewriter.rewritten(planned)
        made = plan.module
        origin = Origin.of(self._model, self._step.args, self._step.kwargs, planned)
        attach(made, plan, origin=origin)
        if self.plans:
            _take(self.packed, made)
        else:
            self.packed = made
        self.planned = planned
        self.plans += 1


def _shapes(step: Step) -> list[tuple[torch.Size, torch.dtype]]:
    """What one batch has in common with another that the same graph is planned on."""
    leaves = pytree.tree_leaves((step.args, step.kwargs))
    return [(t.shape, t.dtype) for t in leaves if isinstance(t, Tensor)]


def _take(module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Gives a module the graph of another, and what it calls; mode and hooks stay."""
    module.__dict__.update({name: other.__dict__[name] for name in MODULE_DICTS})
    module.meta.update(other.meta)
    module.graph = other.graph
    module.train(module.training)
