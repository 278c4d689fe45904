"""``dropit-fx bench step``: a whole training step, dense, packed and as published.

Every variant takes its step in turn, so that the machine's moods reach all of them alike; what is
reported is the median of each and its ratio to the dense step of the same mode.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dropit_fx import measure
from dropit_fx.api import transform
from dropit_fx.bench.device import find_device, timed
from dropit_fx.bench.model_spec import build
from dropit_fx.bench.published import to_published
from dropit_fx.report.rows import plain_table

Step = Callable[[], Tensor]
FIXED = ("parameters", "gradients", "optimizer")
Runs = dict[str, tuple[nn.Module, Callable[..., Any]]]  # the parameters' owner, what is called
Rows = dict[str, dict[str, Any]]


class Task:
    """A model, a batch and its labels: the same for every variant.

    Args:
        title: What it is, for people.
        model: In training mode.
        x: Its only input.
        autocast: The dtype that the forward runs in under autocast; None: without.
    """

    def __init__(
        self, title: str, model: nn.Module, x: Tensor, autocast: torch.dtype | None = None
    ) -> None:
        self.title, self.model, self.x, self.autocast = title, model, x, autocast
        with torch.no_grad():
            *shape, classes = _logits(copy.deepcopy(model)(x)).shape
        self.labels = torch.randint(0, classes, shape, device=x.device).flatten()

    @classmethod
    def of_spec(cls, spec: str, batch: int, size: int | None, device: str = "cpu") -> Task:
        """A model with random weights, by a spec as for ``dropit-fx report``.

        Args:
            spec: Of the model.
            batch: Batch size.
            size: Height and width of images; None: the model's own.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

        Raises:
            SpecError: There is no such model or device.
        """
        place = find_device(device)
        torch.manual_seed(0)
        model, (x,) = build(spec, batch, size)
        return cls(f"{spec}, batch {batch}", model.to(place), x.to(place))

    def loss(self, run: Callable[..., Any]) -> Tensor:
        """Cross entropy of what ``run`` says of the batch, over every position."""
        kind = self.x.device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            return F.cross_entropy(_logits(run(self.x)).flatten(0, -2), self.labels)

    def step(self, model: nn.Module, run: Callable[..., Any]) -> tuple[Step, torch.optim.Optimizer]:
        """Forward, loss, backward and one update by SGD with momentum; and what updates."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(run)
            torch.autograd.backward(loss)
            optimizer.step()
            return loss.detach()

        return step, optimizer


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def bench_step(
    model: str = "timm:deit_tiny_patch16_224",
    batch: int = 16,
    size: int | None = None,
    presets: Sequence[str] = ("balanced", "dropit"),
    gamma: float | None = None,
    bits: int | None = None,
    rounds: int = 7,
    compiled: bool = True,
    device: str = "cpu",
    json_path: str | None = None,
) -> dict[str, Any]:
    """Times the steps of one model and counts what each variant saves.

    Args:
        model: A spec as for ``dropit-fx report``.
        batch: Batch size.
        size: Height and width of images; None: the model's own.
        presets: Each is a variant.
        gamma: As for ``transform``; the published algorithm runs at 0.9 or this.
        bits: As for ``transform``.
        rounds: Steps of each variant that are counted, after one that is not.
        compiled: Also compile the dense and the packed model with inductor.
        device: Where they run.
        json_path: Where to write the result.

    Returns:
        Variant -> ``seconds`` (median), ``ratio`` to dense of its mode, ``saved_bytes``,
        ``saved_ratio``, ``peak_bytes`` and ``peak_ratio`` (of forward and backward, gradients
        included), ``parameters_bytes`` (with buffers), ``gradients_bytes``, ``optimizer_bytes``,
        ``whole_bytes`` and ``whole_ratio`` (the peak with parameters and the optimizer's state).
    """
    sugar: dict[str, Any] = {
        k: v for k, v in {"gamma": gamma, "bits": bits}.items() if v is not None
    }
    task = Task.of_spec(model, batch, size, device)
    dense = task.model
    runs: Runs = {"eager, dense": (dense, dense)}
    for preset in presets:
        packed = transform(copy.deepcopy(dense), preset=preset, example_args=(task.x,), **sugar)
        runs[f"eager, {preset}"] = (packed, packed)
    published = to_published(copy.deepcopy(dense), 0.9 if gamma is None else gamma)
    runs["eager, published"] = (published, published)
    if compiled:
        plain = copy.deepcopy(dense)
        runs["compiled, dense"] = (plain, torch.compile(plain))
        for preset in presets:
            plugged = copy.deepcopy(dense)
            plug_in = torch.compile(plugged, backend="dropit", options={"preset": preset, **sugar})
            runs[f"compiled, {preset}"] = (plugged, plug_in)
    result = take_turns(task, runs, rounds, lambda name: name.split(",")[0] + ", dense")
    Console().print(table(task.title, result))
    if json_path is not None:
        about = {"model": model, "batch": batch, "device": device, **sugar}
        Path(json_path).write_text(json.dumps(about | {"variants": result}, indent=2))
    return result


def take_turns(task: Task, runs: Runs, rounds: int, base: Callable[[str], str]) -> Rows:
    """Measures what every variant saves and allocates, then lets them step in turn.

    Args:
        task: What they are trained on.
        runs: The variants by name; each is compiled before any is timed.
        rounds: Steps of each variant that are counted, after one that is not.
        base: Name -> the variant that it is compared with.

    Returns:
        A row for each variant: see :func:`bench_step`.
    """
    result: Rows = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("compiling", total=len(runs) * (rounds + 1))
        steps: dict[str, Step] = {}
        for name, (module, run) in runs.items():
            progress.update(bar, description=f"first step: {name}")
            loss = functools.partial(task.loss, run)
            saved, peak = measure.saved_bytes(loss), measure.peak_memory(loss)
            steps[name], optimizer = task.step(module, run)
            steps[name]()
            result[name] = {"saved_bytes": saved, "peak_bytes": peak} | fixed(module, optimizer)
            result[name]["whole_bytes"] = peak + sum(
                result[name][f"{kind}_bytes"] for kind in FIXED if kind != "gradients"
            )
            progress.advance(bar)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name, step in steps.items():
                progress.update(bar, description=f"round {number + 1}: {name}")
                times[name].append(timed(step, task.x.device))
                progress.advance(bar)
    for name, row in result.items():
        dense = base(name)
        row["seconds"] = statistics.median(times[name])
        # of each round its own ratio: a slow moment weighs on both sides
        pairs = zip(times[name], times[dense], strict=True)
        row["ratio"] = statistics.median(a / b for a, b in pairs)
        for what in ("saved", "peak", "whole"):
            row[f"{what}_ratio"] = row[f"{what}_bytes"] / result[dense][f"{what}_bytes"]
    return result


def fixed(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of what no packing changes: ``{kind}_bytes`` for each of :data:`FIXED`."""
    states: list[dict[str, Any]] = list(optimizer.state.values())
    state = [v for s in states for v in s.values() if isinstance(v, Tensor)]
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds: tuple[list[Tensor], ...] = ([*model.parameters(), *model.buffers()], [*trained], state)
    return {
        f"{kind}_bytes": sum(t.nbytes for t in tensors)
        for kind, tensors in zip(FIXED, kinds, strict=True)
    }


def table(title: str, result: Rows) -> Table:
    """The rows for people."""
    figures = ("median", "saved", "peak", "whole")
    text = plain_table("step", *figures, figures=figures, title=title, padding=(0, 1, 0, 0))
    for name, row in result.items():
        text.add_row(
            name,
            f"{row['seconds'] * 1e3:.0f} ms {row['ratio']:5.2f}x",
            f"{row['saved_bytes'] / 2**20:.1f} MiB {row['saved_ratio']:6.1%}",
            f"{row['peak_bytes'] / 2**20:.1f} MiB {row['peak_ratio']:6.1%}",
            f"{row['whole_ratio']:.1%}",
        )
    first = next(iter(result.values()))
    sizes = ", ".join(f"{kind} {first[f'{kind}_bytes'] / 2**20:.1f} MiB" for kind in FIXED)
    text.caption = f"shares are of dense; whole: the peak and {sizes}, gradients once"
    return text
