"""Whether a step fits into a device's memory, dense and packed, and which batch would.

Nothing runs but fake tensors: a step is told (``timeline``) at one batch after the other, and the
search ends where a batch fits and the next one does not. Memory grows nearly linearly with the
batch, so that a line through what is known finds that place in a few steps.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dropit_fx.capture.fake import fake_mode_of
from dropit_fx.capture.provenance import first_line
from dropit_fx.capture.trace import LOCK, CaptureError
from dropit_fx.capture.untouched import untouched
from dropit_fx.config import make_config
from dropit_fx.passes.choose_codecs import check_rules_matched
from dropit_fx.planner.asked import example_step
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.search import standing
from dropit_fx.planner.sensitivity import Progress
from dropit_fx.planner.size import peak_bytes, shown
from dropit_fx.planner.step import Step
from dropit_fx.planner.timeline import Timeline
from dropit_fx.planner.timeline import forecast as told_of
from dropit_fx.planner.waiting import without_waiting
from dropit_fx.private import pytree
from dropit_fx.rewriting import Rewriter
from dropit_fx.rules import Config

log = logging.getLogger(__name__)

DENSE = "dense"
TRIES = 24  # batches that are looked at; a line finds the place in four or five
FURTHEST = 64  # times the batch that fits: how far the next one may be from it


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One way of taking the step, beside a memory.

    Attributes:
        way: ``"dense"``, or what packs it.
        batch: The batch that was asked about.
        told: The step at that batch.
        fits: Whether its peak is no more than the memory.
        largest: The largest batch that fits, 0: none; None: was not looked for.
    """

    way: str
    batch: int
    told: Timeline
    fits: bool
    largest: int | None

    def __str__(self) -> str:
        told = self.told
        text = f"{self.way}: {shown(told.peak)}, {'fits' if self.fits else 'does not fit'}"
        text += f"; {shown(told.host)} wait on the host" if told.host else ""
        if self.largest is not None:
            found = (
                "no batch does" if not self.largest else f"a batch of {self.largest} is the most"
            )
            text += f"; {found}"
        where = textwrap.fill(standing(told), 80, initial_indent="  ", subsequent_indent="  ")
        return f"{text}\n{where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        told = self.told
        return {
            "way": self.way,
            "batch": self.batch,
            "peak": told.peak,
            "host": told.host,
            "fits": self.fits,
            "largest_batch": self.largest,
            "phase": told.phase(told.peak_op),
            "op": told.ops[told.peak_op],
            "alive": told.alive(told.peak_op),
        }


@dataclass(frozen=True)
class Forecast:
    """What is told of a step beside a memory; true where some way of taking it fits.

    Attributes:
        memory: In bytes.
        ways: The dense step, and the packed one.
    """

    memory: int
    ways: tuple[Fit, ...]

    def __bool__(self) -> bool:
        return any(way.fits for way in self.ways)

    def __str__(self) -> str:
        head = f"a batch of {self.ways[0].batch}, in {shown(self.memory)}"
        return "\n".join([head, *map(str, self.ways)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        return {"memory": self.memory, "ways": [way.to_dict() for way in self.ways]}


def forecast(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    memory: str | int | float,
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    search: bool = True,
    progress: Progress = lambda text, share: None,
) -> Forecast:
    """Tells whether a training step fits into a memory, dense and packed, and which batch would.

    Nothing runs, and no GPU is needed: the step is told on fake tensors. It is that of the ops that
    the model's own device has, but what ``offload`` sends to the host is told as on a GPU. What ops
    take for themselves while they run is not in it, nor what a device's driver and libraries and
    the gaps of its allocator take: leave room for these.

    Args:
        model: Any module that ``transform`` takes, in the mode in which it trains.
        example_inputs: A batch, as for ``dropit_fx.plan``; only shapes and dtypes are read.
        memory: Bytes, or a size such as ``"24GiB"`` or ``"80GB"``.
        config: As for ``transform``, a plan among it; None: the default preset.
        loss: From the model's output to a scalar, as for ``dropit_fx.plan``.
        optimizer: Over the model's parameters; its state and temporaries then count.
        search: Whether the largest batch is looked for: inputs are taken with another number of
            rows, all those that have as many as the first.
        progress: Called with what is done, and the share of it that is.

    Returns:
        A :class:`Forecast`; ``print`` writes it.

    Raises:
        PlanError: The memory cannot be understood, nothing has a gradient, or there is no batch to
            search over.
        CaptureError: No tracer takes the model.
        ConfigError: The config cannot mean anything, or a rule of it matches nothing.
    """
    room = memory_bytes(memory)
    packing = make_config(config)
    name = config if isinstance(config, str | PathLike) else packing.preset or "packed"
    step = example_step(model, example_inputs, loss, optimizer)
    batch = batch_of(step)
    if search and not batch:
        raise PlanError("no input has rows to search over: give example_inputs, or search=False")

    def fit(way: str, settings: Config | None, share: float) -> Fit:
        def at(count: int) -> Timeline:
            progress(f"{way}: a batch of {count}", share)
            return _told(step, batch, count, settings)

        told = at(batch)
        largest = _largest(at, room, batch, told) if search else None
        return Fit(way=way, batch=batch, told=told, fits=told.peak <= room, largest=largest)

    with LOCK, untouched(model, generators=True):
        ways = fit(DENSE, None, 0.0), fit(str(name), packing, 0.5)
    progress("told", 1.0)
    return Forecast(room, ways)


def memory_bytes(memory: str | int | float) -> int:
    """The bytes that a memory means.

    Raises:
        PlanError: It cannot be understood, or is not above 0.
    """
    try:
        return peak_bytes(memory, 0)  # a share of nothing is none
    except PlanError as error:
        raise PlanError(
            f'memory = {memory!r}: write bytes, or a size such as "24GiB" or "80GB"'
        ) from error


def batch_of(step: Step) -> int:
    """The rows of a step's first input that has some; 0: none has."""
    leaves = pytree.tree_leaves((step.args, step.kwargs))
    return next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()), 0)


def resized(step: Step, batch: int, count: int) -> Step:
    """The step on fake inputs, with ``count`` rows in the place of ``batch``."""
    mode = fake_mode_of(())

    def alike(t: Tensor) -> Tensor:
        rows = count if t.dim() and t.shape[0] == batch else t.shape[:1].numel()
        shape = (rows, *t.shape[1:]) if t.dim() else ()
        with mode:
            made = torch.empty(shape, dtype=t.dtype, device=t.device)
            if t.dim() and t.stride(0) in (0, max(t.stride())):  # each row behind the one before
                made = torch.empty_strided(shape, t.stride(), dtype=t.dtype, device=t.device)
        return made.requires_grad_(t.requires_grad)

    args, kwargs = pytree.tree_map_only(Tensor, alike, (step.args, dict(step.kwargs)))
    return Step(step.model, args, kwargs, step.loss, step.optimizer)


def _told(step: Step, batch: int, count: int, config: Config | None) -> Timeline:
    """The step at a batch, packed as a config says, or dense.

    What captures and what tells have inputs of their own: a mode of fake tensors has one parameter
    for all its runs, and autograd copies a gradient that hooks of an earlier run may still see.
    """
    given = resized(step, batch, count)
    if config is None:  # not its graph, which would not make again what its checkpoints do
        return told_of(given, step.model)
    plan = Rewriter(step.model, given.args, given.kwargs).rewritten(config)
    check_rules_matched((plan,), config)
    return without_waiting(told_of(resized(step, batch, count), plan.module), plan)


def _largest(at: Callable[[int], Timeline], memory: int, batch: int, told: Timeline) -> int:
    """The largest batch that fits, where one is told already; 0: none does.

    A batch on which the model does not run is none that fits.
    """
    low, high = 0, 0  # a batch that fits (0: none is known), and one that does not
    resident = sum(told.resident.values()) - told.resident["inputs"]
    before, last = (0, float(resident)), (batch, float(told.peak))
    for _ in range(TRIES):
        if last[1] <= memory:
            low = max(low, last[0])
        elif not high or last[0] < high:
            high = last[0]
        if high == low + 1:
            break
        slope = (last[1] - before[1]) / ((last[0] - before[0]) or 1)
        guess = last[0] + (memory - last[1]) / slope if 0 < slope < float("inf") else float("inf")
        furthest = high - 1 if high else FURTHEST * low
        count = int(min(max(guess, low + 1), furthest))
        try:
            peak = float(at(count).peak)
        except (CaptureError, PlanError, RuntimeError) as error:
            log.info("a batch of %d: %s", count, first_line(error))
            peak = float("inf")
        before, last = (last if last[1] < float("inf") else before), (count, peak)
    return low
