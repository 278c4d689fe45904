"""Trains a small ViT and a small ResNet on scikit-learn's digits, dense and packed.

    python examples/digits.py --seeds 3 --out build/digits

Every seed is trained twice: as the model is, and rewritten with the preset `dropit`; same weights
to begin with, same batches. Then both are compiled, and one seed is trained compiled. What comes
out: test accuracy, what is saved for the backward, the peak of memory, and the time of a step.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: threads that wait in a loop slow these small steps down many times over
# as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sklearn
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.plot import demo_picture

PRESET = "dropit"
BATCH = 64
MIB = 2**20


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    side: int  # of the images, which are 8 x 8 and enlarged
    lr: float
    epochs: int


MODELS = {
    "vit": Model(
        lambda: VisionTransformer(
            img_size=16,
            patch_size=4,
            in_chans=1,
            num_classes=10,
            embed_dim=96,
            depth=4,
            num_heads=3,
        ),
        side=16,
        lr=1e-3,
        epochs=16,
    ),
    "resnet": Model(
        lambda: ResNet(
            BasicBlock, (1, 1, 1, 1), channels=(16, 32, 64, 128), in_chans=1, num_classes=10
        ),
        side=32,
        lr=4e-3,
        epochs=8,
    ),
}


@dataclass(frozen=True)
class Data:
    train_x: Tensor  # (N, 1, side, side)
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(side: int) -> Data:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).sub(0.5)[:, None]
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0
    )
    return Data(images[train], labels[train], images[test], labels[test])


def make(model: Model, variant: str, compiled: bool, seed: int) -> tuple[nn.Module, Any]:
    """The module that holds the weights, and what is called to train it."""
    torch.manual_seed(seed)
    module = model.build().train()
    if compiled and variant == "packed":
        return module, torch.compile(module, backend="dropit", options={"preset": PRESET})
    if compiled:
        return module, torch.compile(module)
    if variant == "packed":
        module = dropit_fx.transform(
            module, preset=PRESET, example_args=(torch.zeros(BATCH, 1, model.side, model.side),)
        )
    return module, module


def train(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    data: Data,
    lr: float,
    epochs: int,
    seed: int,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Mean loss and test accuracy of every epoch."""
    shuffle = torch.Generator().manual_seed(seed)
    steps = len(data.train_y) // BATCH
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    losses, accuracies = [], []
    for _ in range(epochs):
        module.train()
        total = 0.0
        order = torch.randperm(len(data.train_y), generator=shuffle)
        for batch in order[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(run(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / steps)
        accuracies.append(accuracy(module, data))
        tick()
    return {"seed": seed, "accuracy": accuracies, "loss": losses}


def accuracy(module: nn.Module, data: Data) -> float:
    module.eval()
    with torch.no_grad():
        return (module(data.test_x).argmax(1) == data.test_y).double().mean().item()


def time_steps(runs: dict[str, tuple[nn.Module, Any]], data: Data, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward; the variants take turns, so that noise meets both."""
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}
    for _ in range(rounds + 2):
        for variant, (module, run) in runs.items():
            module.train().zero_grad(set_to_none=True)
            start = time.perf_counter()
            F.cross_entropy(run(x), y).backward()
            seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(s[2:]) for variant, s in seconds.items()}  # 2 to warm up


def examine(
    model: Model,
    compiled: bool,
    seeds: Sequence[int],
    options: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    """Trains dense and packed with each seed, then measures the last of each."""
    data, epochs = load(model.side), options.epochs or model.epochs
    way = "compiled" if compiled else "eager"
    results: dict[str, Any] = {}
    last: dict[str, tuple[nn.Module, Any]] = {}
    for variant in ("dense", "packed"):
        task = progress.add_task(f"{way}, {variant}", total=len(seeds) * epochs)
        runs = []
        for seed in seeds:
            last[variant] = make(model, variant, compiled, seed)
            runs.append(
                train(
                    *last[variant],
                    data,
                    model.lr,
                    epochs,
                    seed,
                    lambda task=task: progress.advance(task),
                )
            )
        results[variant] = {"runs": runs}
    task = progress.add_task(f"{way}, memory and time", total=3)
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    for variant, (module, run) in last.items():
        module.train()
        results[variant]["saved_bytes"] = measure.saved_bytes(run, x)
        results[variant]["peak_memory"] = measure.peak_memory(
            lambda run=run: F.cross_entropy(run(x), y)
        )
        progress.advance(task)
    for variant, seconds in time_steps(last, data, options.rounds).items():
        results[variant]["time"] = seconds
    progress.advance(task)
    results["ratio"] = {
        key: results["packed"][key] / results["dense"][key]
        for key in ("saved_bytes", "peak_memory", "time")
    }
    return results


def compact(results: dict[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text)


def table(results: dict[str, Any]) -> Table:
    made = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("model", "", "", "test accuracy", "saved bytes", "peak memory", "step time"):
        made.add_column(column, justify="left" if column in ("model", "") else "right")
    for name, model in results["models"].items():
        for way in (w for w in ("eager", "compiled") if w in model):
            for variant in ("dense", "packed"):
                got, ratio = model[way][variant], model[way]["ratio"]
                shares = {k: "" if variant == "dense" else f" ({v:.0%})" for k, v in ratio.items()}
                made.add_row(
                    name,
                    way,
                    variant,
                    spread([run["accuracy"][-1] for run in got["runs"]]),
                    f"{got['saved_bytes'] / MIB:.2f} MiB{shares['saved_bytes']}",
                    f"{got['peak_memory'] / MIB:.2f} MiB{shares['peak_memory']}",
                    "1" if variant == "dense" else f"{ratio['time']:.2f}",
                )
        made.add_section()
    return made


def spread(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation, in per cent."""
    mean = f"{100 * statistics.mean(accuracies):.1f} %"
    if len(accuracies) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.1f}"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=3, help="so many, from 0 (default: 3)")
    parser.add_argument(
        "--epochs", type=positive, help="of each training (default: vit 16, resnet 8)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=25, help="timed steps of each (default: 25)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--no-compile", action="store_true", help="eager only, much quicker")
    parser.add_argument("--out", type=Path, default=Path("build/digits"), metavar="DIR")
    options = parser.parse_args(argv)

    console = Console()
    start = time.perf_counter()
    results: dict[str, Any] = {"settings": settings(options), "models": {}}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    for name in options.models:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            progress.console.print(f"[bold]{name}")
            model = results["models"][name] = {}
            model["eager"] = examine(MODELS[name], False, range(options.seeds), options, progress)
            if not options.no_compile:
                model["compiled"] = examine(MODELS[name], True, [0], options, progress)
    results["settings"]["seconds"] = round(time.perf_counter() - start)

    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / "digits.json", options.out / "digits.png"
    written[0].write_text(compact(results) + "\n")
    demo_picture(results, written[1])
    console.print()
    console.print(table(results))
    console.print(
        f"\npacked: preset '{PRESET}'; batch {BATCH}; accuracy: mean ± standard deviation over"
        f" {options.seeds} seeds (compiled: seed 0); shares and ratios: of dense, run the same way."
        f"\n{results['settings']['seconds']} s. Written: {written[0]}, {written[1]}",
        highlight=False,
    )
    return 0


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "preset": PRESET,
        "batch": BATCH,
        "epochs": {n: options.epochs or MODELS[n].epochs for n in options.models},
        "seeds": options.seeds,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (dropit_fx, torch, timm, sklearn)},
    }


if __name__ == "__main__":
    sys.exit(main())
