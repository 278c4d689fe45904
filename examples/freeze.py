"""Fine-tunes the encoder of `bert.py` with most of its layers frozen, others in each step.

    python examples/freeze.py --rates 0.5 0.8 0.95

`FreezeScheduler` freezes the layers whose weights moved least, by their count and by the bytes that
they save. Every rate trains the model as it is, and rewritten with a preset (`slimfit`, unless
--preset names another), from the same weights on the same batches; and so does a run in which all
layers train. Saved bytes and peak are the greatest of some steps; the shares are of dense.

Needs the extra `test`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import bert
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from training import DENSE, MIB, Data, accuracy, limited, positive

import dropit_fx
from dropit_fx import measure
from dropit_fx.config import presets
from dropit_fx.schedule import FreezeScheduler

BATCH, LR, WEIGHED = 32, 2e-4, 4  # WEIGHED: examples by which layers are weighed
HEAD = ("rate", "", "accuracy", "frozen", "saved, MiB", "peak, MiB")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    data, found = limited(bert.load(), options.limit), []
    for rate in (0.0, *options.rates):
        for variant in (DENSE, options.preset):
            found.append(train(rate, variant, data, options))
    table = Table(*HEAD, header_style="bold", box=None, pad_edge=False)
    for row in found:
        cost = (f"{row[k] / MIB:.1f} ({row[k] / found[0][k]:.0%})" for k in ("saved", "peak"))
        table.add_row(
            f"{row['rate']}",
            row["variant"],
            f"{row['accuracy']:.1%}",
            f"{row['frozen']:.1%}",
            *cost,
        )
    Console().print(table)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 0.8, 0.95])
    parser.add_argument("--preset", choices=presets(), default="slimfit", help="beside dense")
    parser.add_argument("--epochs", type=positive, default=2, help="(default: 2)")
    parser.add_argument("--limit", type=positive, help="so many examples (default: all)")
    parser.add_argument("--measures", type=positive, default=4, help="steps that are measured")
    return parser


def train(rate: float, variant: str, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """One run: its accuracy, least share of frozen layers, greatest saved bytes and peak."""
    torch.manual_seed(0)
    model = bert.build().train()
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    if variant != DENSE:
        model = dropit_fx.transform(model, preset=variant, example_args=(x,))
    steps = options.epochs * (len(data.train_y) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    inputs = (x[:WEIGHED],) if rate else None  # where nothing is frozen, nothing is weighed
    scheduler = FreezeScheduler(model, rate, optimizer=optimizer, example_args=inputs)
    torch.manual_seed(0)
    batches: list[Any] = []
    for _ in range(options.epochs):
        order = torch.randperm(len(data.train_y))
        batches += order[: len(order) // BATCH * BATCH].split(BATCH)
    saved, peaks, frozen = [], [], []
    for step, batch in enumerate(batches):
        if step % max(1, steps // options.measures) == 0:
            saved.append(measure.saved_bytes(model, x))
            peaks.append(measure.peak_memory(lambda: F.cross_entropy(model(x), y)))
        frozen.append(len(scheduler.frozen) / len(scheduler.nbytes))
        F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    reached = accuracy(model, data)
    return {
        "rate": rate,
        "variant": variant,
        "accuracy": reached,
        "frozen": min(frozen),
        "saved": max(saved),
        "peak": max(peaks),
    }


if __name__ == "__main__":
    sys.exit(main())
