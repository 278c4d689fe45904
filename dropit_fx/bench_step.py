"""``dropit-fx bench step``: a whole training step, dense, packed and as published.

Every variant takes its step in turn, so that the machine's moods reach all of them alike; what is
reported is the median of each and its ratio to the dense step of the same mode.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dropit_fx import measure
from dropit_fx.api import transform
from dropit_fx.model_spec import build
from dropit_fx.published import to_published

Step = Callable[[], Tensor]


def step_of(model: nn.Module, run: Callable[..., Any], x: Tensor, labels: Tensor) -> Step:
    """Forward, cross entropy, backward and one SGD update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(run(x), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.detach()

    return step


def bench_step(
    model: str = "timm:deit_tiny_patch16_224",
    batch: int = 16,
    size: int | None = None,
    presets: Sequence[str] = ("balanced", "dropit"),
    gamma: float | None = None,
    bits: int | None = None,
    rounds: int = 7,
    compiled: bool = True,
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
        json_path: Where to write the result.

    Returns:
        Variant -> ``seconds`` (median), ``ratio`` to dense of its mode, ``saved_bytes``,
        ``saved_ratio``, ``peak_bytes`` and ``peak_ratio`` (of forward and backward, gradients
        included, parameters not).
    """
    sugar: dict[str, Any] = {
        k: v for k, v in {"gamma": gamma, "bits": bits}.items() if v is not None
    }
    torch.manual_seed(0)
    dense, (x,) = build(model, batch, size)
    labels = torch.randint(0, dense(x[:2]).shape[-1], (batch,))
    runs: dict[str, tuple[nn.Module, Callable[..., Any]]] = {"eager, dense": (dense, dense)}
    for preset in presets:
        packed = transform(copy.deepcopy(dense), preset=preset, example_args=(x,), **sugar)
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
    result: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=len(runs) * (rounds + 2))
        steps: dict[str, Step] = {}
        for name, (module, run) in runs.items():
            progress.update(task, description=f"first step: {name}", advance=1)
            saved = measure.saved_bytes(lambda r=run: F.cross_entropy(r(x), labels))
            peak = measure.peak_memory(lambda r=run: F.cross_entropy(r(x), labels))
            steps[name] = step_of(module, run, x, labels)
            steps[name]()
            result[name] = {"saved_bytes": saved, "peak_bytes": peak}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name, step in steps.items():
                progress.update(task, description=f"round {number + 1}: {name}", advance=1)
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    for name, row in result.items():
        base = name.split(",")[0] + ", dense"
        row["seconds"] = statistics.median(times[name])
        # of each round its own ratio: a slow moment weighs on both sides
        pairs = zip(times[name], times[base], strict=True)
        row["ratio"] = statistics.median(a / b for a, b in pairs)
        row["saved_ratio"] = row["saved_bytes"] / result[base]["saved_bytes"]
        row["peak_ratio"] = row["peak_bytes"] / result[base]["peak_bytes"]
    Console().print(_table(f"{model}, batch {batch}", result))
    if json_path is not None:
        with open(json_path, "w") as file:
            json.dump({"model": model, "batch": batch, **sugar, "variants": result}, file, indent=2)
    return result


def _table(title: str, result: dict[str, Any]) -> Table:
    table = Table(title=title, box=None, header_style="bold", pad_edge=False)
    table.add_column("step")
    for name in ("median", "of dense", "saved", "of dense", "peak", "of dense"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in result.items():
        table.add_row(
            name,
            f"{row['seconds'] * 1e3:.0f} ms",
            f"{row['ratio']:.2f}x",
            f"{row['saved_bytes'] / 2**20:.1f} MiB",
            f"{row['saved_ratio']:.1%}",
            f"{row['peak_bytes'] / 2**20:.1f} MiB",
            f"{row['peak_ratio']:.1%}",
        )
    return table
