"""Trains a small video transformer on moving digits; gradients flow through some frames alone.

    python examples/video.py --shares 0.5 0.25

A clip shows a digit of scikit-learn that moves on a straight line through noise; what is told is
which digit it is, and where it moves to. An encoder reads each frame by itself, and attention among
the frames joins what it found. Stochastic Backpropagation (arXiv 2203.16755): the encoder's
gradients flow through a share of the frames, drawn anew in each step; the rest is forwarded without
saving anything. Each share trains from the same weights on the same clips; saved bytes, peak and
processor time are of one step.

Needs scikit-learn.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from training import MIB, positive

import dropit_fx
from dropit_fx import measure

FRAMES, SIDE, PATCH, WIDTH, HEADS = 8, 16, 4, 64, 4
WAYS = torch.tensor([(0, 1), (1, 0), (0, -1), (-1, 0)])  # one pixel a frame
BATCH, LR = 32, 2e-3
HEAD = ("gradients of", "accuracy", "direction", "saved, MiB", "peak, MiB", "step, ms")


class Block(nn.Module):
    """Attention among the tokens of a row, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.first(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*heads.chunk(3, 1))
        x = x + self.join(mixed.transpose(1, 2).flatten(2))  # (rows, tokens, width)
        return x + self.mlp(self.second(x))


class Frames(nn.Module):
    """An encoder of frames: (clips * frames, 1, side, side) -> (clips * frames, width)."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.blocks(tokens).mean(1)


class Video(nn.Module):
    """(clips, frames, side, side) -> scores of digits and of directions."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.among = Frames(), Block()
        self.times = nn.Parameter(0.02 * torch.randn(FRAMES, WIDTH))
        self.digit, self.way = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, len(WAYS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.frames(x.flatten(0, 1)[:, None]).unflatten(0, (-1, FRAMES))
        clip = self.among(found + self.times).mean(1)
        return self.digit(clip), self.way(clip)


def clips(which: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clips of these digits, (clips, frames, side, side), which digits, and which way they move."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[which] / 16
    labels = torch.tensor(digits.target)[which]
    chance = torch.Generator().manual_seed(seed)
    way = torch.randint(len(WAYS), (len(which),), generator=chance)
    start = torch.randint(SIDE, (len(which), 2), generator=chance)
    out = 0.1 * torch.randn(len(which), FRAMES, SIDE, SIDE, generator=chance)
    for clip, (image, at, step) in enumerate(zip(images, start, WAYS[way], strict=True)):
        for frame in range(FRAMES):
            shown = F.pad(image, (0, SIDE - 8, 0, SIDE - 8))
            out[clip, frame] += shown.roll(tuple((at + frame * step).tolist()), (0, 1))
    return out, labels, way


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    count = len(load_digits().target)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    order = order[: options.limit]
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    data, found = (clips(train, 1), clips(test, 2)), []
    for share in (1.0, *options.shares):
        found.append(one_run(share, *data, options))
    table = Table(*HEAD, header_style="bold", box=None, pad_edge=False)
    for row in found:
        costs = (row[k] / found[0][k] for k in ("saved", "peak", "seconds"))
        saved, peak, spent = (f"({cost:.0%})" for cost in costs)
        table.add_row(
            f"{row['share']:.0%} of frames",
            f"{row['digit']:.1%}",
            f"{row['way']:.1%}",
            f"{row['saved'] / MIB:.1f} {saved}",
            f"{row['peak'] / MIB:.1f} {peak}",
            f"{row['seconds'] * 1e3:.0f} {spent}",
        )
    Console().print(table)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--epochs", type=positive, default=4, help="(default: 4)")
    parser.add_argument("--limit", type=positive, help="so many clips (default: all)")
    return parser


def loss_of(model: nn.Module, x: Tensor, digit: Tensor, way: Tensor) -> Tensor:
    digits, ways = model(x)
    return F.cross_entropy(digits, digit) + F.cross_entropy(ways, way)


def one_run(share: float, train: Any, test: Any, options: argparse.Namespace) -> dict[str, Any]:
    """A training: accuracies, and what a step saves, its peak, and its processor time."""
    torch.manual_seed(0)
    model: nn.Module = Video()
    batch = tuple(part[:BATCH] for part in train)
    if share < 1:
        rules = [{"module": "frames", "backprop": share, "dim": 0}]
        config = {"preset": None, "rules": rules}
        model = dropit_fx.transform(model, config, example_args=(batch[0],))
    saved = measure.saved_bytes(model, batch[0])
    peak = measure.peak_memory(lambda: loss_of(model, *batch))
    steps = max(1, len(train[0]) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=options.epochs * steps
    )
    seconds = []
    for _ in range(options.epochs):
        for rows in torch.randperm(len(train[0])).split(BATCH)[:steps]:
            start = time.process_time()
            optimizer.zero_grad()
            loss_of(model, *(part[rows] for part in train)).backward()
            optimizer.step()
            seconds.append(time.process_time() - start)
            schedule.step()
    with torch.no_grad():
        scores = model.eval()(test[0])
    digit, way = (
        (s.argmax(1) == t).float().mean().item() for s, t in zip(scores, test[1:], strict=True)
    )
    return {
        "share": share,
        "digit": digit,
        "way": way,
        "saved": saved,
        "peak": peak,
        "seconds": statistics.median(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
