"""What a choice is for: the least error within so many seconds, or the least time within an error.

Errors are squared and relative to the gradient here, so that they add up, as seconds do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dropit_fx.planner.choice import Item
from dropit_fx.planner.costs import Seconds
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.moves import Group
from dropit_fx.planner.sensitivity import Sensitivity

ALL = 1e6  # times all errors that were measured: what cannot be measured costs more


@dataclass(frozen=True)
class Goal:
    """Figures of the levels of each group: their sum is to be least, and another is limited.

    Attributes:
        costs: What is to be least.
        beside: What is limited.
        most: The limit.
    """

    costs: Seconds
    beside: Seconds
    most: float = math.inf

    def cost(self, levels: Sequence[int]) -> float:
        """Of a choice."""
        return total(self.costs, levels)

    def keeps(self, levels: Sequence[int]) -> bool:
        """Whether a choice is within the limit."""
        return total(self.beside, levels) <= self.most

    def items(self, groups: Sequence[Group]) -> list[list[Item]]:
        """The levels as the knapsack has them."""
        return [
            [Item(c, g.spans(lv), b) for c, b, lv in zip(of, by, g.levels, strict=True)]
            for g, of, by in zip(groups, self.costs, self.beside, strict=True)
        ]


def total(figures: Seconds, levels: Sequence[int]) -> float:
    """The sum of the figures of a choice."""
    return float(sum(of[i] for of, i in zip(figures, levels, strict=True)))


def squares(errors: Sensitivity) -> Seconds:
    """Squared errors relative to the gradient; finite ones."""
    measured = [e for of in errors.errors for e in of if math.isfinite(e)]
    most = ALL * max(errors.gradient, *measured, 0.0)
    return tuple(tuple(min(e, most) / errors.gradient for e in of) for of in errors.errors)


def time_bound(limit: str | float, dense: Callable[[], float]) -> float:
    """The seconds that a time limit means.

    Args:
        limit: Seconds, or a share of the dense step with ``%``.
        dense: Tells the seconds of that.

    Raises:
        PlanError: It cannot be understood, or is below 0.
    """
    share = isinstance(limit, str) and limit.strip().endswith("%")
    try:
        number = float(limit.strip().removesuffix("%") if isinstance(limit, str) else limit)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(limit, bool) or not 0 <= number < math.inf:
        raise PlanError(
            f"time_limit = {limit!r}: write seconds that a step may take more, or a share of the"
            ' dense step, "10%"'
        )
    return number * dense() / 100 if share else number
