"""Step tables: the slope of a pointwise function in 1 to 4 bits an element.

The backward of ``y = f(x)`` multiplies by f'(x). In the place of x one may keep the index of the
interval that x lies in, and multiply by a constant (Few-Bit Backward, arXiv 2202.00441, section 3).
For K = 2**bits intervals, the borders b_1 < ... < b_{K-1} and levels y_1 ... y_K minimise

    error^2 = integral of w(x) (f'(x) - y_i)^2 dx,    where b_{i-1} <= x < b_i

w is the density of the input: 0.7 of a standard normal and 0.3 of a uniform over [-8, 8]. Beyond 8
the two outer levels go on, and the uniform part brings them near f' there: gelu' ends in -0.01 and
1.05 at 3 bits, where the normal alone would leave -0.09 and 1.09. Trained networks have many inputs
below -2: on those of a BERT-like model, with 3 bits, a share of 0.3 makes a smaller error of dX and
of the weight's gradient than 0.1 does, and than a uniform alone.

On a grid of equal cells the optimum is found exactly by dynamic programming: the best level of an
interval is the mean of f' over it, and

    best_k(j) = min over i < j of best_{k-1}(i) + cost(i, j)

with cost(i, j), from prefix sums, the squared error of one level over the cells i ... j - 1.
Borders are float32 as they stand, levels are rounded to it: comparing and multiplying in float32 is
what was solved.

The tables of :data:`FUNCTIONS` are stored beside this module. ``python -m dropit_fx.ops.step_tables
--write`` makes that file, ``--check`` compares it with tables solved afresh.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dropit_fx.words import did_you_mean

Pointwise = Callable[[Tensor], Tensor]

BITS = (1, 2, 3, 4)
SPAN = 8.0  # tables are solved on [-SPAN, SPAN]
CELLS = 2048  # a power of two, so that kinks at small integers are borders of cells
POINTS = 4  # of a cell, where f' is looked at
UNIFORM = 0.3  # share of the uniform part of the density
TILT = 1e-6  # of the density towards negative x: decides between two mirror images of a table

FUNCTIONS: dict[str, Pointwise] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
}
_REGISTERED: dict[str, dict[int, StepTable]] = {}


class TableError(ValueError):
    """A table that cannot be had: an unknown name, or a function without a usable derivative."""


@dataclass(frozen=True)
class StepTable:
    """A piecewise constant f'. All borders and levels are float32 values.

    Attributes:
        borders: K - 1 increasing inputs. Interval i holds ``borders[i - 1] <= x < borders[i]``,
            as ``torch.bucketize(right=True)`` counts it.
        levels: K values of f'.
        error: Root mean square of ``f'(x) - level`` under the density.
    """

    borders: tuple[float, ...]
    levels: tuple[float, ...]
    error: float


def table(name: str, bits: int) -> StepTable:
    """The table of a function of :data:`FUNCTIONS`, or of one that was registered.

    Raises:
        TableError: An unknown name, or bits other than 1 to 4.
    """
    if bits not in BITS:
        raise TableError(f"a step table has 1 to 4 bits, not {bits!r}.")
    if name in FUNCTIONS:
        return _stored()[name][bits]
    if name in _REGISTERED:
        return _REGISTERED[name][bits]
    known = (*FUNCTIONS, *_REGISTERED)
    raise TableError(
        f"no step table for {name!r}.{did_you_mean(name, known)} Or register the function."
    )


def register(name: str, f: Pointwise) -> None:
    """Makes ``table(name, bits)`` work for a function of one's own.

    All four tables are solved at once, in about a second, and last until the process ends: each
    process registers for itself. Registering the same derivative again does nothing.

    Args:
        name: Not one of :data:`FUNCTIONS`.
        f: Takes and returns a tensor of any shape, element by element, and works in float64. What
            it closes over stays as it is: a learned parameter would change under the table.

    Raises:
        TableError: The name is taken, or ``f`` is not pointwise or has no finite derivative.
    """
    if name in FUNCTIONS:
        raise TableError(f"{name!r} has a table already: register the function by another name.")
    tables = _solve(f, _normal, BITS, name)
    if _REGISTERED.setdefault(name, tables) != tables:
        raise TableError(f"{name!r} is registered with another function: choose another name.")


def measure(
    borders: Sequence[float],
    levels: Sequence[float],
    f: Pointwise,
    density: Pointwise | None = None,
) -> StepTable:
    """These borders and levels as a table of ``f'``.

    ``density`` is that of the input in the place of the standard normal, at any scale.
    """
    return _measure(borders, levels, _slope(f), _weight(density or _normal))


def _measure(
    borders: Sequence[float], levels: Sequence[float], slope: Tensor, weight: Tensor
) -> StepTable:
    index = torch.bucketize(_points(), torch.tensor(borders, dtype=torch.float64), right=True)
    misses = torch.tensor(levels, dtype=torch.float64)[index] - slope
    mean_square = (weight * misses**2).sum().item()
    return StepTable(tuple(borders), tuple(levels), math.sqrt(mean_square))


def _solve(
    f: Pointwise, density: Pointwise, widths: Sequence[int], name: str = "f"
) -> dict[int, StepTable]:
    """The best table for each number of bits."""
    slope, weight = _slope(f, name), _weight(density)
    moments = [weight * slope**power for power in range(3)]
    cells = [m.view(CELLS, POINTS).sum(1) for m in moments]
    tables = {}
    for bits, starts in zip(widths, _best_starts(cells, [2**b for b in widths]), strict=True):
        mass, first = (m.tensor_split(starts * POINTS) for m in moments[:2])
        levels = torch.stack([s.sum() / m.sum() for m, s in zip(mass, first, strict=True)])
        borders = starts * (2 * SPAN / CELLS) - SPAN
        tables[bits] = _measure(borders.tolist(), levels.float().tolist(), slope, weight)
    return tables


def _best_starts(moments: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """For each number of intervals, the cells where the second and later ones start.

    Args:
        moments: Integrals of w, w f' and w f'^2 over each cell: ``(cells,)``.
        counts: Numbers of intervals.
    """
    w, s, q = (F.pad(t.cumsum(0), (1, 0)) for t in moments)
    # cost[j, i]: one level for the cells i ... j - 1
    cost = (q[:, None] - q).sub_((s[:, None] - s).square_().div_(w[:, None] - w))
    cost[torch.ones_like(cost, dtype=torch.bool).triu_()] = math.inf
    best, before = cost[:, 0], []
    for _ in range(max(counts) - 1):
        best, start = (cost + best).min(1)
        before.append(start)
    found = []
    for count in counts:
        starts = [len(best) - 1]
        for start in reversed(before[: count - 1]):
            starts.append(int(start[starts[-1]]))
        found.append(torch.tensor(starts[:0:-1]))
    return found


def _points() -> Tensor:
    """Where f' is looked at: ``(CELLS * POINTS,)``, float64, none on the border of a cell."""
    count = CELLS * POINTS
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (2 * SPAN / count) - SPAN


def _normal(x: Tensor) -> Tensor:
    return torch.exp(-(x**2) / 2)


def _weight(density: Pointwise) -> Tensor:
    """Mass of each point; they sum to one."""
    x = _points()
    mass = density(x)
    if mass.shape != x.shape or not mass.isfinite().all() or mass.min() < 0 or mass.sum() == 0:
        raise TableError(
            "the density gives a number for each element of its input: finite, not negative, and"
            " positive somewhere in [-8, 8]."
        )
    mixed = (1 - UNIFORM) * mass / mass.sum() + UNIFORM / x.numel()
    return mixed * (1 - TILT * x / SPAN)


def _slope(f: Pointwise, name: str = "f") -> Tensor:
    """The derivative at each point."""
    part = slice(1000, 1099)
    with torch.inference_mode(False), torch.enable_grad():
        x = _points().requires_grad_()
        try:
            y = torch.as_tensor(f(x))
            again = torch.as_tensor(f(x.flip(0)[part]))
        except Exception as error:
            raise TableError(f"{name!r} fails on a 1-D float64 tensor: {error}") from error
        if y.shape != x.shape or not _close(y.flip(0)[part], again):
            raise TableError(
                f"{name!r} is not pointwise: each element of its result is to depend on the same"
                " element of its input and on nothing else, random numbers included."
            )
        slope = None
        if y.requires_grad:
            (slope,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    if slope is None or (not slope.any() and y.min() != y.max()):
        raise TableError(f"{name!r} is not differentiable: autograd finds no slope.")
    if not slope.isfinite().all():
        where = x[~slope.isfinite()][0].item()
        raise TableError(f"the derivative of {name!r} is not finite at x = {where:.3f}.")
    return slope


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), equal_nan=True)


@cache
def _stored() -> dict[str, dict[int, StepTable]]:
    text = (resources.files("dropit_fx.ops") / "step_tables.json").read_text()
    return {
        name: {
            int(bits): StepTable(tuple(t["borders"]), tuple(t["levels"]), t["error"])
            for bits, t in tables.items()
        }
        for name, tables in json.loads(text).items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """``--write`` or ``--check`` the stored tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dropit_fx.ops.step_tables")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_true", help="solve every table and store it")
    group.add_argument("--check", action="store_true", help="solve every table and compare")
    options = parser.parse_args(argv)

    progress = track(FUNCTIONS, "solving", console=Console(stderr=True), transient=True)
    solved = {name: _solve(FUNCTIONS[name], _normal, BITS) for name in progress}
    if options.write:
        Path(__file__).with_suffix(".json").write_text(_as_json(solved))
        return 0
    right = {n: {b: _is_best(n, b, best) for b, best in t.items()} for n, t in solved.items()}
    wrong = [f"{name}, {b} bits" for name in right for b, good in right[name].items() if not good]
    print("\n".join(f"{which}: the stored table is not the best" for which in wrong) or "all right")
    return 1 if wrong else 0


def _is_best(name: str, bits: int, best: StepTable) -> bool:
    """Whether the stored table is as good as the best one, and its error is what it says."""
    stored = _stored().get(name, {}).get(bits)
    if stored is None:
        return False
    error = measure(stored.borders, stored.levels, FUNCTIONS[name]).error
    return math.isclose(error, stored.error, rel_tol=1e-6) and error <= best.error * (1 + 1e-6)


def _as_json(solved: dict[str, dict[int, StepTable]]) -> str:
    """One line for each table."""
    functions = []
    for name, tables in solved.items():
        lines = [f'  "{bits}": {json.dumps(asdict(found))}' for bits, found in tables.items()]
        functions.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(functions) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
