"""The choice: of each group one level, at the least cost of all, under a peak at every time.

A multiple-choice knapsack with a row for each time at which the peak may stand, and one for what is
limited beside the cost: seconds where that is an error, an error where it is seconds. Few of the
thousands of times bind: the problem is solved, relaxed, with those where the peak was last found,
until none is above. Where it has split a group, that is rounded down, and what room is left is
given away greedily; only if that is not near enough to the bound, the solver takes whole items.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dropit_fx.planner.errors import PlanError

ROUNDS = 30  # of rows that are added
GAP = 1e-3  # of the optimum, at which the solver may stop
SECONDS = 1.5  # of one solution
ALL_SECONDS = 3.5  # when no other is begun


class Span(NamedTuple):
    """Bytes that are in use from one time to before another; negative: that are not."""

    start: int
    end: int
    nbytes: int


@dataclass(frozen=True)
class Item:
    """One level of one group: what it costs, and what it changes in the memory of the base.

    Attributes:
        cost: What is to be least in all.
        spans: What it changes.
        beside: What may be limited in all, 0 or more.
    """

    cost: float
    spans: tuple[Span, ...]
    beside: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        levels: The index of the item of each group.
        cost: The sum of their costs.
        gap: By how much of it the least possible cost may be smaller, 0 to 1.
        peak: The highest use, in bytes, as far as the spans tell.
    """

    levels: tuple[int, ...]
    cost: float
    gap: float
    peak: int


def choose(
    groups: Sequence[Sequence[Item]], used: Sequence[int], peak: int, most: float = math.inf
) -> Choice | None:
    """The items, one of each group, at the least cost whose use is nowhere above a peak.

    Args:
        groups: Their items.
        used: Bytes in use at each time, without the spans of any item.
        peak: In bytes.
        most: Of what is ``beside`` their costs, in all.

    Returns:
        None where even the smallest of all are above the peak, or none was found within the limit.

    Raises:
        ModuleNotFoundError: scipy is missing (``pip install 'dropit-fx[plan]'``).
    """
    base = np.asarray(used, dtype=np.int64)
    if not groups:
        return Choice((), 0.0, 0.0, int(base.max())) if base.max() <= peak else None
    least = tuple(smallest([*map(_size, group)]) for group in groups)
    if _use(groups, least, base).max() > peak:
        return None
    best = None
    if _beside(groups, least) <= most:
        best = _greedy(groups, base, peak, most, least)
    problem = _Problem(groups, base, peak, most, math.inf if best is None else _cost(groups, best))
    freest = tuple(smallest([item.cost for item in group]) for group in groups)
    heights = [_heights(_use(groups, levels, base)) for levels in (freest, best or least)]
    rows = sorted({*heights[0], *heights[1]})
    began, bound, whole = time.perf_counter(), 0.0, False
    for _ in range(ROUNDS):
        solved = problem.solve(rows, whole)
        if solved is None:
            break
        shares, below = solved
        bound = max(bound, below)
        above = problem.above(shares)
        rows += [at for at in above if at not in rows]
        if not above:
            levels = problem.levels(shares, least)
            if _use(groups, levels, base).max() <= peak and _beside(groups, levels) <= most:
                levels = _greedy(groups, base, peak, most, levels)
                if best is None or _cost(groups, levels) <= _cost(groups, best):
                    best = levels
            if whole or (best is not None and _gap(bound, _cost(groups, best)) <= GAP):
                break
            whole = True  # the relaxed problem has told most of the rows
        if time.perf_counter() - began > ALL_SECONDS:
            break
    if best is None:
        return None
    cost = _cost(groups, best)
    return Choice(best, cost, _gap(bound, cost), int(_use(groups, best, base).max()))


def smallest(numbers: Sequence[float]) -> int:
    """The index of the smallest, the first of several."""
    return min(range(len(numbers)), key=numbers.__getitem__)


def _gap(bound: float, cost: float) -> float:
    return max(0.0, 1 - bound / cost) if cost > 0 else 0.0


def _size(item: Item) -> int:
    """Bytes times time: what tells small items from large ones."""
    return sum(s.nbytes * (s.end - s.start) for s in item.spans)


def _cost(groups: Sequence[Sequence[Item]], levels: Sequence[int]) -> float:
    return float(sum(g[i].cost for g, i in zip(groups, levels, strict=True)))


def _beside(groups: Sequence[Sequence[Item]], levels: Sequence[int]) -> float:
    return float(sum(g[i].beside for g, i in zip(groups, levels, strict=True)))


def _use(groups: Sequence[Sequence[Item]], levels: Sequence[int], base: Any) -> Any:
    """Bytes in use at each time."""
    steps = np.zeros(len(base) + 1, dtype=np.int64)
    for group, level in zip(groups, levels, strict=True):
        for span in group[level].spans:
            steps[span.start] += span.nbytes
            steps[span.end] -= span.nbytes
    return base + np.cumsum(steps[:-1])


def _heights(use: Any, pieces: int = 8) -> list[int]:
    """The highest time of each of some pieces of a step."""
    edges = np.linspace(0, len(use), min(pieces, len(use)) + 1, dtype=int)
    return [int(a + use[a:b].argmax()) for a, b in itertools.pairwise(edges)]


def _greedy(
    groups: Sequence[Sequence[Item]], base: Any, peak: int, most: float, levels: tuple[int, ...]
) -> tuple[int, ...]:
    """From the smallest up: first what frees most of the cost for a byte, as long as it fits."""
    chosen = list(levels)
    use, beside = _use(groups, chosen, base), _beside(groups, chosen)
    moves = []
    for g, group in enumerate(groups):
        for i, item in enumerate(group):
            gain = group[chosen[g]].cost - item.cost
            more = _size(item) - _size(group[chosen[g]])
            if gain > 0:
                moves.append((-gain / max(more, 1), g, i))
    for _, g, i in sorted(moves):
        extra = groups[g][i].beside - groups[g][chosen[g]].beside
        if groups[g][i].cost >= groups[g][chosen[g]].cost or beside + extra > most:
            continue
        changed = use.copy()
        for span in groups[g][chosen[g]].spans:
            changed[span.start : span.end] -= span.nbytes
        for span in groups[g][i].spans:
            changed[span.start : span.end] += span.nbytes
        if changed.max() <= peak:
            use, chosen[g], beside = changed, i, beside + extra
    return tuple(chosen)


class _Problem:
    """The knapsack as the solver takes it: a variable for each item, a row for each time.

    No item of a higher cost than a ``known`` choice has in all is in a better one.
    """

    def __init__(
        self, groups: Sequence[Sequence[Item]], base: Any, peak: int, most: float, known: float
    ) -> None:
        self.base, self.peak, self.most = base, peak, most
        self.items = [item for group in groups for item in group]
        self.offsets = np.cumsum([0, *map(len, groups)])
        self.group_of = np.repeat(np.arange(len(groups)), [*map(len, groups)])
        costs = np.array([item.cost for item in self.items])
        self.beside = np.array([item.beside for item in self.items])
        if not np.isfinite([costs, self.beside]).all():
            raise PlanError("an error that was measured is not finite")
        known = min(known, float(costs.sum()))
        self.unit = known / 1e3 or 1.0  # the solver's tolerances are absolute
        self.may = costs <= known
        self.costs = np.where(self.may, costs, 0) / self.unit

    def solve(self, rows: Sequence[int], whole: bool) -> tuple[Any, float] | None:
        """The share of each item with the peak kept at some times, and a bound below the cost."""
        try:
            from scipy import optimize, sparse
        except ModuleNotFoundError as error:
            hint = "planning needs scipy: pip install 'dropit-fx[plan]'"
            raise ModuleNotFoundError(hint, name=error.name) from error
        at, count = np.asarray(rows), len(self.items)
        weights = np.zeros((len(at), count))
        for column, item in enumerate(self.items):
            for span in item.spans:
                weights[(at >= span.start) & (at < span.end), column] += span.nbytes
        ones = sparse.csr_array((np.ones(count), (self.group_of, np.arange(count))))
        constraints = [
            optimize.LinearConstraint(ones, 1, 1),
            optimize.LinearConstraint(
                weights / self.peak, -np.inf, (self.peak - self.base[at]) / self.peak
            ),
        ]
        if math.isfinite(self.most):
            unit = self.most or float(self.beside.max()) or 1.0
            row = self.beside[None] / unit
            constraints.append(optimize.LinearConstraint(row, -np.inf, self.most / unit))
        solved = optimize.milp(
            self.costs,
            integrality=np.full(count, int(whole)),
            bounds=optimize.Bounds(0, self.may.astype(float)),
            constraints=constraints,
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )
        if solved.x is None:
            return None
        bound = solved.mip_dual_bound if whole else solved.fun
        return solved.x, float(bound or 0.0) * self.unit

    def above(self, shares: Any) -> list[int]:
        """Times at which these shares of the items are above the peak, the highest of some."""
        steps = np.zeros(len(self.base) + 1)
        for item, share in zip(self.items, shares, strict=True):
            for span in item.spans:
                steps[span.start] += share * span.nbytes
                steps[span.end] -= share * span.nbytes
        use = self.base + np.cumsum(steps[:-1])
        return [at for at in _heights(use) if use[at] > self.peak * (1 + 1e-6) + 1]

    def levels(self, shares: Any, least: Sequence[int]) -> tuple[int, ...]:
        """The item of each group that has all of the share, else the smallest of the group."""
        levels = []
        for group, (first, last) in enumerate(itertools.pairwise(self.offsets)):
            largest = int(shares[first:last].argmax())
            levels.append(largest if shares[first + largest] > 1 - 1e-6 else least[group])
        return tuple(levels)
