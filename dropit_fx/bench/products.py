"""The second table of ``dropit-fx bench kernels``: a weight gradient, of all rows and of kept ones.

``dW = dY^T X`` as the backward of a linear layer makes it, behind packing, which the table before
it times. On a CPU it is processor time: on a machine that does other things too, it says what the
product costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dropit_fx.bench.device import timed
from dropit_fx.codecs import CODEC
from dropit_fx.kernels.row_norms import MEMORY, named, new_name
from dropit_fx.kernels.rows import SELECTIONS, WTA_CRS
from dropit_fx.report.rows import plain_table
from dropit_fx.runtime.copies import WIDTH

GAMMA = 0.7
ROWS = CODEC["rows"]


def time_products(x: Tensor, out: int, rounds: int) -> dict[str, dict[str, float]]:
    """Times the weight gradient of a linear layer, dense and with rows dropped, in turns.

    Args:
        x: Its input, (rows, width).
        out: Its output's width.
        rounds: Timed products of each, after one that is not.

    Returns:
        ``dense``, and how rows were chosen, -> ``seconds`` (median), ``of_dense`` (the median of
        each round's ratio).
    """
    dy = torch.randn(x.shape[0], out, device=x.device).to(x.dtype)
    memory = named(new_name("bench"))  # lives as long as the jobs
    jobs: dict[str, Callable[[], object]] = {"dense": lambda: dy.t().mm(x)}
    for select in SELECTIONS:
        options = ROWS.defaults() | {"gamma": GAMMA, "select": select, WIDTH: x.shape[1]}
        options |= {MEMORY: memory.name} if select == WTA_CRS else {}
        jobs[select] = partial(_product, ROWS.pack(x.view(-1), options), options, dy)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, run in jobs.items():
            elapsed = _seconds(run, x.device)
            if number:
                times[name].append(elapsed)
    dense = times["dense"]
    return {
        name: {
            "seconds": statistics.median(found),
            "of_dense": statistics.median(a / b for a, b in zip(found, dense, strict=True)),
        }
        for name, found in times.items()
    }


def _product(parts: tuple[Tensor, ...], options: dict[str, Any], dy: Tensor) -> Tensor:
    assert ROWS.contract is not None
    some, kept = ROWS.contract(parts, options, dy, dy.dtype)
    return some.t().mm(kept)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cpu":
        return timed(run, device)
    start = time.process_time()
    run()
    return time.process_time() - start


def products_table(title: str, found: dict[str, dict[str, float]]) -> Table:
    """The rows for people."""
    figures = ("dW ms", "of dense")
    table = plain_table("rows", *figures, figures=figures, title=title)
    for name, row in found.items():
        share = f"keep {100 * (1 - GAMMA):.0f} %, {name}" if name != "dense" else "all"
        table.add_row(share, f"{row['seconds'] * 1e3:.2f}", f"{row['of_dense']:.3f}")
    return table
