"""What the examples share: each trains its models dense and packed, and compares what comes out.

A script names its models and its data (`Example`, `Task`); `run` is the rest: every seed is trained
once dense and once with each preset, from the same weights, on the same batches. What comes out:
loss and test accuracy while training, what is saved for the backward, the peak of memory, and the
time of a step; as a table, as JSON and as a picture.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before torch is imported: threads that wait in a loop slow these small steps down many times over
# as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from picture import demo_picture
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.config import presets

DENSE = "dense"
POINTS = 40  # of a loss curve, each the mean of equally many steps, or nearly so
BATCHES = 8  # whose gradients are compared
COSTS = ("saved_bytes", "peak_memory", "time")
MIB = 2**20


@dataclass(frozen=True)
class Data:
    train_x: Tensor  # (N, ...)
    train_y: Tensor  # (N,)
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """One model, and what it learns."""

    build: Callable[[], nn.Module]
    data: Callable[[], Data]
    batch: int
    lr: float  # the greatest of a one-cycle schedule
    epochs: int
    parts: tuple[str, ...] = ()  # of parameters' names: gradients that are compared with dense's


@dataclass(frozen=True, kw_only=True)
class Example:
    """One script."""

    name: str  # of the files that it writes
    tasks: Mapping[str, Task]
    packages: tuple[str, ...]  # whose versions the JSON has, beside those of torch and dropit-fx
    seeds: int = 3  # defaults of its options
    rounds: int = 25
    compiled: bool = True


def run(example: Example, description: str | None, argv: Sequence[str] | None = None) -> int:
    """The whole script: reads the command line, trains, measures, prints and writes."""
    options = arguments(example, description).parse_args(argv)
    console = Console()
    start = time.perf_counter()
    path = options.out / f"{example.name}.json"
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        if options.times_only:
            results = json.loads(path.read_text())
            time_again(example, results, options, progress)
        else:
            results = {"settings": settings(example, options), "models": {}}
            for name in options.models:
                results["models"][name] = examine(name, example.tasks[name], options, progress)
            results["settings"]["seconds"] = round(time.perf_counter() - start)

    picture = path.with_suffix(".png")
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(compact(results) + "\n")
    demo_picture(results, picture)
    console.print()
    console.print(table(results))
    console.print(f"\n{note(results)} Written: {path}, {picture}", highlight=False)
    return 0


def arguments(example: Example, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    epochs = ", ".join(f"{name} {task.epochs}" for name, task in example.tasks.items())
    parser.add_argument(
        "--presets",
        nargs="+",
        type=preset,
        default=["balanced"],
        metavar="PRESET",
        help=f"{', '.join(presets())}, or a config file: trained beside dense (default: balanced)",
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        default=example.seeds,
        help=f"so many, from 0 (default: {example.seeds})",
    )
    parser.add_argument("--epochs", type=positive, help=f"of each training (default: {epochs})")
    parser.add_argument(
        "--limit", type=positive, help="so many examples to train on and to test (default: all)"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=example.rounds,
        help=f"timed steps of each (default: {example.rounds})",
    )
    parser.add_argument("--models", nargs="+", choices=example.tasks, default=list(example.tasks))
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=example.compiled,
        help="also train one seed compiled, which takes longer",
    )
    parser.add_argument(
        "--times-only",
        action="store_true",
        help="train nothing: time the steps of what the JSON in --out has, and write it again",
    )
    parser.add_argument("--out", type=Path, default=Path("build", example.name), metavar="DIR")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def preset(text: str) -> str:
    """The name of a preset, or of a config file."""
    if text not in presets() and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no preset and no file")
    return text


def packing(variant: str) -> dict[str, str]:
    """What a preset or a config file is to ``transform`` and to the backend."""
    return {"preset": variant} if variant in presets() else {"config": variant}


def settings(example: Example, options: argparse.Namespace) -> dict[str, Any]:
    tasks = {name: example.tasks[name] for name in options.models}
    packages = ("dropit-fx", "torch", *example.packages)
    return {
        "presets": options.presets,
        "batch": {name: task.batch for name, task in tasks.items()},
        "epochs": {name: options.epochs or task.epochs for name, task in tasks.items()},
        "seeds": options.seeds,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    module: nn.Module  # holds the weights
    dense: nn.Module  # has them too, and is as it was built
    run: Callable[[Tensor], Tensor]  # is called to train it


def make(task: Task, variant: str, compiled: bool, seed: int) -> Made:
    """A model, dense or packed by the preset or the file that `variant` names."""
    torch.manual_seed(seed)
    module = dense = task.build().train()
    if compiled:
        plug_in = {} if variant == DENSE else {"backend": "dropit", "options": packing(variant)}
        return Made(module, dense, torch.compile(module, **plug_in))
    if variant != DENSE:
        example = task.data().train_x[: task.batch]
        module = dropit_fx.transform(module, **packing(variant), example_args=(example,))
    return Made(module, dense, module)


def examine(
    name: str, task: Task, options: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Trains one model with each seed, then measures the last of each variant."""
    results: dict[str, Any] = {}
    data, epochs = limited(task.data(), options.limit), options.epochs or task.epochs
    for way in ("eager", "compiled") if options.compile else ("eager",):
        seeds = range(options.seeds if way == "eager" else 1)
        found: dict[str, Any] = {}
        last: dict[str, Made] = {}
        for variant in (DENSE, *options.presets):
            line = progress.add_task(f"{name}, {way}, {variant}", total=len(seeds) * epochs)
            runs = []
            for seed in seeds:
                last[variant] = make(task, variant, way == "compiled", seed)
                torch.manual_seed(seed)  # the same dropout for each variant
                runs.append(
                    train(last[variant], data, task, epochs, seed, partial(progress.advance, line))
                )
            found[variant] = {"runs": runs, **memory(last[variant], data, task)}
            if task.parts and variant != DENSE:
                found[variant]["gradient_error"] = gradient_errors(last[variant], data, task)
        times = time_steps(last, data, task, options.rounds, f"{name}, {way}, time", progress)
        for variant, seconds in times.items():
            found[variant]["time"] = seconds
        results[way] = found
    return results


def limited(data: Data, limit: int | None) -> Data:
    return Data(*(t[:limit] for t in (data.train_x, data.train_y, data.test_x, data.test_y)))


def train(
    made: Made, data: Data, task: Task, epochs: int, seed: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Test accuracy after each epoch, and the curve of the training loss."""
    shuffle = torch.Generator().manual_seed(seed)
    steps = len(data.train_y) // task.batch
    if not steps:
        raise SystemExit(f"{len(data.train_y)} examples are not one batch of {task.batch}")
    optimizer = torch.optim.AdamW(made.module.parameters(), lr=task.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=epochs * steps)
    losses, accuracies = [], []
    for _ in range(epochs):
        made.module.train()
        order = torch.randperm(len(data.train_y), generator=shuffle)
        for batch in order[: steps * task.batch].split(task.batch):
            loss = F.cross_entropy(made.run(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        accuracies.append(accuracy(made.module, data))
        tick()
    return {"seed": seed, "accuracy": accuracies, "loss": curve(losses)}


def curve(losses: Sequence[float]) -> list[float]:
    """The losses of all steps as at most POINTS means."""
    points = min(POINTS, len(losses))
    edges = [round(i * len(losses) / points) for i in range(points + 1)]
    return [statistics.mean(losses[a:b]) for a, b in pairwise(edges)]


def accuracy(module: nn.Module, data: Data) -> float:
    module.eval()
    with torch.no_grad():
        scores = torch.cat([module(x) for x in data.test_x.split(256)])
    return (scores.argmax(1) == data.test_y).double().mean().item()


# Measuring ----------------------------------------------------------------------------------------


def memory(made: Made, data: Data, task: Task) -> dict[str, int]:
    x, y = data.train_x[: task.batch], data.train_y[: task.batch]
    made.module.train()
    return {
        "saved_bytes": measure.saved_bytes(made.run, x),
        "peak_memory": measure.peak_memory(lambda: F.cross_entropy(made.run(x), y)),
    }


def gradient_errors(made: Made, data: Data, task: Task) -> dict[str, float]:
    """How far the gradients of each part are from dense's, as a share of these.

    Over a few batches, with the weights that training ended with and the same dropout.
    """
    off, size = (dict.fromkeys(task.parts, 0.0) for _ in range(2))
    batches = zip(data.train_x.split(task.batch), data.train_y.split(task.batch), strict=True)
    for seed, (x, y) in zip(range(BATCHES), batches, strict=False):
        grads = []
        for run in (made.dense.train(), made.run):
            made.module.train().zero_grad(set_to_none=True)
            torch.manual_seed(seed)
            F.cross_entropy(run(x), y).backward()
            grads.append({n: p.grad for n, p in made.dense.named_parameters() if p.requires_grad})
        for part in task.parts:
            for name in (n for n in grads[0] if part in n):
                exact, found = grads[0][name], grads[1][name]
                assert exact is not None
                assert found is not None
                off[part] += (found - exact).square().sum().item()
                size[part] += exact.square().sum().item()
    return {part: (off[part] / size[part]) ** 0.5 for part in task.parts}


def time_steps(
    runs: Mapping[str, Made],
    data: Data,
    task: Task,
    rounds: int,
    description: str,
    progress: Progress,
) -> dict[str, float]:
    """Median seconds of forward and backward; the variants take turns, so that noise meets all."""
    x, y = data.train_x[: task.batch], data.train_y[: task.batch]
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}
    for _ in progress.track(range(rounds + 2), description=description):
        for variant, made in runs.items():
            made.module.train().zero_grad(set_to_none=True)
            start = time.perf_counter()
            F.cross_entropy(made.run(x), y).backward()
            seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(s[2:]) for variant, s in seconds.items()}  # 2 to warm up


def time_again(
    example: Example, results: dict[str, Any], options: argparse.Namespace, progress: Progress
) -> None:
    """Replaces the times in `results`: steps of new models of seed 0, which cost the same."""
    for name, ways in results["models"].items():
        task = example.tasks[name]
        for way, found in ways.items():
            made = {variant: make(task, variant, way == "compiled", 0) for variant in found}
            times = time_steps(
                made, task.data(), task, options.rounds, f"{name}, {way}, time", progress
            )
            for variant, seconds in times.items():
                found[variant]["time"] = seconds
    results["settings"]["threads"] = torch.get_num_threads()


# Results ------------------------------------------------------------------------------------------


def compact(results: dict[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line, rounded to what can be read from it."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text)
    return re.sub(r"(\d+\.\d{6})\d+(?![\de])", r"\1", text)


def begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What earlier runs with these settings have written, to go on with.

    Raises:
        SystemExit: There are runs with other settings, which would be lost.
    """
    if not path.exists():
        return {"settings": settings, "runs": []}
    found: dict[str, Any] = json.loads(path.read_text())
    if found["settings"] != settings:
        sys.exit(f"{path} has runs with {found['settings']}, these have {settings}: another --out")
    return found


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole: what is stopped meanwhile leaves the one of before."""
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)


HEAD = ("model", "", "", "accuracy", "loss", "saved, MiB", "peak, MiB", "time")


def rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One line of cells, as HEAD names them, for each model, way to run it, and variant."""
    for name, ways in results["models"].items():
        for way, found in ways.items():
            for variant, got in found.items():
                share = {key: got[key] / found[DENSE][key] for key in COSTS}
                shown = {k: "" if variant == DENSE else f" ({share[k]:.0%})" for k in COSTS}
                saved, peak = (f"{got[k] / MIB:.1f}{shown[k]}" for k in COSTS[:2])
                last = [run["loss"][-1] for run in got["runs"]]
                reached = spread([run["accuracy"][-1] for run in got["runs"]])
                loss, step = f"{statistics.mean(last):.3f}", f"{share['time']:.2f}"
                yield name, way, variant, reached, loss, saved, peak, step


def spread(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation, in per cent."""
    mean = f"{100 * statistics.mean(accuracies):.1f}"
    if len(accuracies) == 1:
        return f"{mean} %"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.1f} %"


def table(results: dict[str, Any]) -> Table:
    made = Table(header_style="bold", box=None, pad_edge=False)
    for column in HEAD:
        made.add_column(
            column, justify="left" if column in ("model", "") else "right", no_wrap=True
        )
    before = None
    for row in rows(results):
        if before not in (None, row[:2]):
            made.add_section()
        before = row[:2]
        made.add_row(*row)
    return made


def note(results: dict[str, Any]) -> str:
    """What the table leaves unsaid."""
    made = results["settings"]
    batches = " and ".join(str(b) for b in dict.fromkeys(made["batch"].values()))
    ways = {way for ways in results["models"].values() for way in ways}
    seeds = "1 seed" if made["seeds"] == 1 else f"{made['seeds']} seeds"
    threads = "1 thread" if made["threads"] == 1 else f"{made['threads']} threads"
    compiled = " (compiled: one)" if "compiled" in ways else ""
    return (
        f"Batch {batches}, {threads}. Test accuracy: mean ± standard deviation over"
        f" {seeds}{compiled}. Loss: of the last training steps. Peak of memory: of forward and"
        f" backward. Shares and step times: of dense, run the same way.{verdict(results)}"
        f"{errors(results)}"
    )


def verdict(results: dict[str, Any]) -> str:
    """Which presets are less accurate than dense by more than its own standard deviation."""
    worse = []
    for name, ways in results["models"].items():
        reached = {v: [run["accuracy"][-1] for run in g["runs"]] for v, g in ways["eager"].items()}
        if len(reached[DENSE]) < 2:
            return ""
        least = statistics.mean(reached[DENSE]) - statistics.stdev(reached[DENSE])
        worse += [f"{name} {v}" for v in reached if statistics.mean(reached[v]) < least]
    found = ", ".join(worse) or "none"
    return (
        f" Mean accuracy below that of dense by more than a standard deviation of dense: {found}."
    )


def errors(results: dict[str, Any]) -> str:
    """How far from dense's the gradients of parts are, where a task names some."""
    said = [
        f" Gradients of {part}, {variant}: {error:.1%} from dense's."
        for ways in results["models"].values()
        for found in ways.values()
        for variant, got in found.items()
        for part, error in got.get("gradient_error", {}).items()
    ]
    return "".join(said)
