"""Fine-tunes the encoder of `bert.py` with most of its layers frozen, others in each step.

    python examples/freeze.py --rates 0.5 0.6 0.8 0.95 --seeds 5

`FreezeScheduler` freezes the layers whose weights moved least, by their count and by the bytes that
they save. Every seed trains the model as it is, all layers, and rewritten with a preset (`slimfit`,
unless --preset names another) at each rate, from the same weights on the same batches. What comes
out: test accuracy, the least share of layers that a step froze, and the greatest saved bytes, peak
and total of some steps. Total: the peak, which has the gradients, parameters, and the optimiser's
state. Memory is that of the first seed, for a batch of --memory-batch.

The JSON in --out is written after each run: what was stopped goes on where it was. Runs with other
settings go into another folder.

Needs the extra `test`.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import bert
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from training import DENSE, MIB, Data, accuracy, begun, compact, limited, positive, spread, write

import dropit_fx
from dropit_fx import measure
from dropit_fx.config import presets
from dropit_fx.schedule import FreezeScheduler

BATCH, LR, WEIGHED = 8, 2e-4, 4  # WEIGHED: examples by which layers are weighed
HEAD = ("rate", "", "seeds", "accuracy", "frozen", "saved, MiB", "peak, MiB", "total, MiB")
MEMORY = ("saved", "peak", "total")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    path = options.out / "freeze.json"
    options.out.mkdir(parents=True, exist_ok=True)
    given = {k: getattr(options, k) for k in ("epochs", "limit", "memory_batch")}
    results = begun(path, {"batch": BATCH} | given)
    data, ways = limited(bert.load(), options.limit), [(0.0, DENSE)]
    ways += [(rate, options.preset) for rate in options.rates]
    done = {(r["seed"], r["rate"], r["variant"]) for r in results["runs"]}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    steps = options.epochs * (len(data.train_y) // BATCH)
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        runs = [(seed, *way) for seed in range(options.seeds) for way in ways]
        whole = progress.add_task("runs", total=len(runs))
        for seed, rate, variant in runs:
            if (seed, rate, variant) not in done:
                line = progress.add_task(f"seed {seed}, rate {rate}, {variant}", total=steps)
                tick = partial(progress.advance, line)
                results["runs"].append(train(seed, rate, variant, data, options, tick))
                write(path, compact(results) + "\n")
                progress.remove_task(line)
            progress.advance(whole)
    table = Table(*HEAD, header_style="bold", box=None, pad_edge=False)
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 0.6, 0.8, 0.95])
    parser.add_argument("--preset", choices=presets(), default="slimfit", help="at each rate")
    parser.add_argument("--seeds", type=positive, default=1, help="so many, from 0 (default: 1)")
    parser.add_argument("--epochs", type=positive, default=4, help="(default: 4)")
    parser.add_argument("--limit", type=positive, help="so many examples (default: all)")
    parser.add_argument("--measures", type=positive, default=2, help="steps that are measured")
    parser.add_argument(
        "--memory-batch", type=positive, default=128, help="of these steps (default: 128)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/freeze"), metavar="DIR")
    return parser


def train(
    seed: int,
    rate: float,
    variant: str,
    data: Data,
    options: argparse.Namespace,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """One run: its accuracy and least share of frozen layers; of the first seed, its memory."""
    torch.manual_seed(seed)
    model = bert.build().train()
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    if variant != DENSE:
        model = dropit_fx.transform(model, preset=variant, example_args=(x,))
    steps = options.epochs * (len(data.train_y) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    # no warm-up: those that train first would have the largest updates until it ends, and be kept
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    inputs = (x[:WEIGHED],) if rate else None  # where nothing is frozen, nothing is weighed
    scheduler = FreezeScheduler(model, rate, optimizer=optimizer, example_args=inputs, seed=seed)
    torch.manual_seed(seed)
    batches: list[Any] = []
    for _ in range(options.epochs):
        order = torch.randperm(len(data.train_y))
        batches += order[: len(order) // BATCH * BATCH].split(BATCH)
    at = torch.arange(options.memory_batch) % len(data.train_y)
    x, y = data.train_x[at], data.train_y[at]
    sizes, frozen = [], []
    for step, batch in enumerate(batches):
        if seed == 0 and step % max(1, steps // options.measures) == 0:
            sizes.append(memory(model, x, y))
        frozen.append(len(scheduler.frozen) / len(scheduler.nbytes))
        F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tick()
    found = {"seed": seed, "rate": rate, "variant": variant, "accuracy": accuracy(model, data)}
    found["frozen"] = min(frozen)
    if sizes:
        saved, peak = (max(values) for values in zip(*sizes, strict=True))
        state = (t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        fixed = nbytes(model.parameters()) + nbytes(model.buffers()) + nbytes(state)
        found |= {"saved": saved, "peak": peak, "total": peak + fixed}
    return found


def memory(model: nn.Module, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Saved bytes and peak of a step."""
    saved = measure.saved_bytes(model, x)
    return saved, measure.peak_memory(lambda: F.cross_entropy(model(x), y))


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One line of cells, as HEAD names them, for each rate; shares are of the first."""
    ways: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        ways.setdefault((run["rate"], run["variant"]), []).append(run)
    dense = results["runs"][0]
    lines = []
    for (rate, variant), runs in sorted(ways.items()):
        cost = [f"{runs[0][k] / MIB:.1f} ({runs[0][k] / dense[k]:.0%})" for k in MEMORY]
        reached = spread([run["accuracy"] for run in runs])
        frozen = f"{min(run['frozen'] for run in runs):.1%}"
        lines.append([f"{rate:g}", variant, str(len(runs)), reached, frozen, *cost])
    return lines


def as_good(results: dict[str, Any]) -> tuple[float, float]:
    """The rate of the smallest total whose accuracy is dense's within its standard deviation.

    And how many times smaller than dense that is; of one seed, the deviation is 0.
    """
    reached: dict[tuple[float, str], list[float]] = {}
    for run in results["runs"]:
        reached.setdefault((run["rate"], run["variant"]), []).append(run["accuracy"])
    first, *others = (run for run in results["runs"] if "total" in run)
    dense = reached[first["rate"], first["variant"]]
    least = mean(dense) - (stdev(dense) if len(dense) > 1 else 0)
    able = [r for r in others if mean(reached[r["rate"], r["variant"]]) >= least]
    best = min([first, *able], key=lambda run: int(run["total"]))
    return best["rate"], first["total"] / best["total"]


if __name__ == "__main__":
    sys.exit(main())
