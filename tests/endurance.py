"""Long trainings of a small model: ``make endurance``. Memory stays flat, seeds decide every bit.

2,000 steps in eager mode and as many compiled: resident memory does not grow, the losses are those
of a second run from the same seed, to the bit, and of one that was saved in the middle and went on
in another process. Batches of many lengths compile no more graphs than PyTorch does without us.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dropit_fx

WAYS = ("eager", "dropit_eager", "aot_eager", "inductor")  # the last two are inner compilers
BATCH, LENGTH, WORDS, WIDTH = 16, 12, 64, 32
LENGTHS = (*range(5, 29), 12, 7)  # 24 different ones, and two of them again
GROWTH = 0.01  # of the resident memory, from the first quarter to the end, at most


class Tagger(nn.Module):
    """A block of a transformer with what draws random numbers and what counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.count = nn.BatchNorm1d(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.attend(h, h, h, need_weights=False)[0]
        h = h + self.down(self.drop(F.gelu(self.up(self.norm(h)))))
        return self.head(self.count(h.flatten(0, 1)).view_as(h))


def runner(way: str, model: nn.Module, preset: str = "balanced") -> Callable[[Tensor], Tensor]:
    """The model, packed."""
    if way == "eager":
        return dropit_fx.transform(model, example_args=(tokens(0),), preset=preset)
    if way == "dropit_eager":
        return torch.compile(model, backend=way, options={"preset": preset})
    return torch.compile(model, backend="dropit", options={"preset": preset, "inner": way})


def tokens(number: int, length: int = LENGTH) -> Tensor:
    """The batch of a step."""
    return torch.randint(WORDS, (BATCH, length), generator=torch.Generator().manual_seed(number))


@dataclass
class Run:
    """What a training leaves: its losses, and the memory and objects of Python beside them."""

    losses: list[float]
    resident: list[int]
    objects: list[int]


def train(way: str, steps: range, file: Path | None = None, every: int = 50) -> Run:
    """Steps of a training from a fixed seed.

    Args:
        way: One of ``WAYS``.
        steps: Their numbers. Where they do not begin with 0, ``file`` is gone on from; where they
            do, and there is one, it is written.
        file: A checkpoint.
        every: Steps between two looks at memory.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = runner(way, model)
    if steps.start and file is not None:
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["chance"])
    found = Run([], [], [])
    for number in steps:
        x = tokens(number)
        loss = F.cross_entropy(run(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.losses.append(loss.item())
        if (number - steps.start) % every == every - 1:
            gc.collect()
            found.resident.append(_resident())
            found.objects.append(len(gc.get_objects()))
    if not steps.start and file is not None:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states | {"chance": torch.get_rng_state()}, file)
    return found


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def graphs_for_all_lengths(packed: bool) -> int:
    """How many graphs Dynamo makes of batches of all lengths, packed or by PyTorch alone."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Tagger()
    run = runner("aot_eager", model) if packed else torch.compile(model, backend="aot_eager")
    for number, length in enumerate(LENGTHS):
        run(tokens(number, length)).square().sum().backward()
    return counters["stats"]["unique_graphs"]


def _in_a_process(*args: Any) -> Run:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(train, args)


def complaints(way: str, steps: int, folder: Path) -> tuple[str, list[str]]:
    """What was measured of a way, and a sentence for each thing that is not as it should be."""
    file = folder / f"{way}.pt"
    whole, again = (_in_a_process(way, range(steps)) for _ in range(2))
    first = _in_a_process(way, range(steps // 2), file)
    rest = _in_a_process(way, range(steps // 2, steps), file)
    found = []
    if again.losses != whole.losses:
        found.append(f"{way}: a second run from the same seed has other losses")
    if first.losses + rest.losses != whole.losses:
        found.append(f"{way}: a run that was resumed has other losses")
    at, end = whole.resident[len(whole.resident) // 4], whole.resident[-1]
    if end > (1 + GROWTH) * at:
        found.append(f"{way}: {at:,} bytes were resident, and {end:,} at the end")
    objects = whole.objects[len(whole.objects) // 4], whole.objects[-1]
    told = (
        f"{way}: {steps} steps, last loss {whole.losses[-1]:.6f}, {at / 2**20:.1f} MiB resident"
        f" after a quarter and {end / 2**20:.1f} at the end,"
        f" {objects[0]:,} and {objects[1]:,} objects"
    )
    return told, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of each training (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in given.ways:
            told, found = complaints(way, given.steps, Path(folder))
            print(told, flush=True)
            wrong += found
    ours, stock = graphs_for_all_lengths(True), graphs_for_all_lengths(False)
    print(f"{len(set(LENGTHS))} lengths: {ours} graphs, {stock} without us")
    if ours > stock:
        wrong.append("more graphs are compiled than without us")
    print("\n".join(wrong) or "nothing grows, and every bit is the same")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
