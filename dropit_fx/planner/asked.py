"""What is asked of the planner: a step, a peak, and what a plan may cost beside memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dropit_fx.capture.example_inputs import resolve
from dropit_fx.capture.trace import LOCK
from dropit_fx.capture.untouched import untouched
from dropit_fx.planner.cards import find_card
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.goal import time_bound
from dropit_fx.planner.planned import PlannedConfig
from dropit_fx.planner.search import NO_LIMITS, Limits, Rewrites, Search
from dropit_fx.planner.sensitivity import Progress
from dropit_fx.planner.size import peak_bytes
from dropit_fx.planner.speeds import CardSpeeds
from dropit_fx.planner.step import Step


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    peak: str | int | float,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    error_limit: float | None = None,
    time_limit: str | float | None = None,
    device: str | None = None,
    progress: Progress = lambda text, share: None,
) -> PlannedConfig:
    """Plans a config that keeps a training step under a peak of memory, at the least error.

    With ``error_limit`` alone, at the least time within that error; with ``time_limit``, at the
    least error within that time.

    The peak is that of all tensors of a step: parameters, buffers, inputs, gradients, the state of
    the optimizer, what is saved for the backward, logits and temporaries. One batch runs a few
    times: for what ops take for themselves, dense and packed, and for the errors that packing puts
    into the gradients; then the model is what it was. What is chosen is told again of the graph
    that it makes, and runs once, until it keeps the peak. The same question has the same answer.

    Args:
        model: Any module that ``transform`` takes, in the mode in which it trains.
        example_inputs: A batch of real inputs, on the model's device: a tensor, a tuple of
            positional inputs, or a mapping of keyword inputs. None: blank ones of a guessed shape.
        peak: Bytes; ``"6GiB"``, ``"800MB"``; or ``"40%"`` of the dense step's peak: that of
            the model as it runs, with what it checkpoints.
        loss: From the model's output to the scalar that is differentiated. None: its ``loss`` if it
            has one, otherwise a fixed random projection of all that has a gradient.
        optimizer: What moves the parameters; its state and temporaries then count.
        error_limit: The most that the gradient of all parameters may lose, relative to its norm, as
            it is told; None: what the peak takes.
        time_limit: The most seconds by which packing, unpacking and making again may lengthen an
            eager step, as they are told; ``"10%"``: a share of the dense step. None: no limit.
        device: Whose seconds are told: a card by name or by its limits (``planner.cards``). None:
            those of the device at hand, which are measured.
        progress: Called with what is done, and the share of it that is.

    Returns:
        A config for ``transform``, with ``predicted``, ``error`` and ``seconds``; ``save`` writes
        it as a file.

    Raises:
        PlanError: The peak cannot be understood or cannot be kept (the message names the least
            that can, and what stands there), a limit cannot (it names what can), or no backward
            keeps anything.
        CaptureError: No tracer takes the model.
        ModuleNotFoundError: scipy is missing (``pip install 'dropit-fx[plan]'``).
    """
    step = example_step(model, example_inputs, loss, optimizer)
    limits = Limits(error_limit, time_limit)
    return plan_step(step, peak, limits, progress, device=device)


def plan_step(
    step: Step,
    peak: str | int | float,
    limits: Limits = NO_LIMITS,
    progress: Progress = lambda text, share: None,
    rewriter: Rewrites | None = None,
    device: str | None = None,
) -> PlannedConfig:
    """As :func:`plan`, for a step; ``rewriter``: in the place of one that captures the model."""
    if limits.error is not None and not limits.error >= 0:
        raise PlanError(f"error_limit = {limits.error!r}: a relative error, 0 or more")
    if limits.time is not None:
        time_bound(limits.time, lambda: 1.0)
    peak_bytes(peak, 10**12)  # before anything runs
    speeds = None if device is None else CardSpeeds(find_card(device))
    with LOCK, untouched(step.model, generators=True):
        return Search(step, progress, rewriter, speeds).run(peak, limits)


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
    step: Step,
    count: int = 8,
    progress: Progress = lambda text, share: None,
    device: str | None = None,
) -> list[PlannedConfig]:
    """Plans for peaks from below the dense one's down to the least, the highest first.

    Args:
        step: As for :func:`plan_step`.
        count: Of the peaks; a plan that keeps two of them is there once.
        progress: As for :func:`plan`.
        device: As for :func:`plan`.

    Returns:
        Their predicted peaks fall, their errors grow.

    Raises:
        PlanError: The step keeps nothing for its backward that can be packed.
    """
    speeds = None if device is None else CardSpeeds(find_card(device))
    with LOCK, untouched(step.model, generators=True):
        return Search(step, progress, speeds=speeds).frontier(count)
