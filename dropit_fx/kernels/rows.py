"""Which rows of a matrix are kept: the op behind the codec `rows`.

A sum over rows, `sum_i g_i x_i^T`, is estimated from `count` of them, each with weight 1 / pi_i
where pi_i is the chance that it is kept (Horvitz and Thompson 1952): right in the mean whatever the
chances are, as long as none is 0 where x_i is not.

* `norm`: the largest norms, without weights: not right in the mean.
* `uniform`: pi_i = count / rows.
* `wta_crs`: pi_i proportional to the norm, and 1 where that gives more: the rule of the winners of
  WTA-CRS (arXiv 2305.15265). With s_i the norms from the largest down,

      r = min over c < count of (s_{c+1} + s_{c+2} + ...) / (count - c),    pi_i = min(1, s_i / r).

The paper draws from the rest with replacement. Here the rows lie in random order on a line, each as
long as its pi_i, and those are kept that the points u, u + 1, u + 2, ... fall on (systematic
sampling; one uniform u): `count` rows whatever the values, none of them twice, and less variance.

Rows with NaN or infinity are kept before all others, so that a sum that is not finite stays so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropit_fx.kernels.dispatch import define
from dropit_fx.kernels.dtypes import check_float
from dropit_fx.kernels.reference import random_keys
from dropit_fx.kernels.seeds import draw_seed

NORM, UNIFORM, WTA_CRS = SELECTIONS = ("norm", "uniform", "wta_crs")
_FLOOR = 1e-6  # of the mean norm: the least that a row counts for


def select_rows(
    x: Tensor, count: int, select: str, seed: Tensor | None = None, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chooses rows.

    Args:
        x: (rows, width).
        count: how many to keep, 0..rows.
        select: one of `SELECTIONS`.
        seed: (1,) int64, of the choice; None: draws one.
        known: (rows,), finite and positive: what `wta_crs` multiplies the norms by.

    Returns:
        Their numbers, int32 and ascending; their weights, float32, none for `norm`.
    """
    _check(x, select)
    if count == 0:
        return _fake(x, 0, select)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    sizes = torch.linalg.vector_norm(x, dim=1, dtype=work).double()
    finite = sizes.isfinite()
    if select == NORM:
        order = sizes.masked_fill(~finite, torch.inf).argsort(descending=True, stable=True)
        return order[:count].sort().values.to(torch.int32), x.new_empty(0, dtype=torch.float32)
    if select == UNIFORM:
        sizes = torch.ones_like(sizes)
    elif known is not None:
        sizes = sizes * known
    chances = _chances(sizes, finite, count)
    keys = random_keys(draw_seed(x.device) if seed is None else seed, len(x) + 1)
    order = keys[:-1].argsort(stable=True)
    ends = chances[order].cumsum(0)
    ends = ends * (count / ends[-1])
    points = torch.arange(count, device=x.device) + keys[-1] / 2**32
    at = torch.searchsorted(ends, points, right=True).clamp(max=len(x) - 1)
    index = order[at].sort().values
    return index.to(torch.int32), chances[index].reciprocal().float()


def _chances(sizes: Tensor, finite: Tensor, count: int) -> Tensor:
    """(rows,): how likely each row is to be kept; `count` together."""
    known = sizes.masked_fill(~finite, 0.0)
    total = known.sum()
    total = total + (total == 0)
    known = known.clamp(min=total * (_FLOOR / len(sizes)))
    sizes = torch.where(finite, known, total)  # as much as all others: sure of a place
    rest = sizes.sort().values.cumsum(0).flip(0)[:count]  # behind so many of the largest
    places = torch.arange(count, 0, -1, device=sizes.device)
    return (sizes / (rest / places).amin()).clamp(max=1.0)


def _check(x: Tensor, select: str) -> None:
    check_float(x.dtype)
    if select not in SELECTIONS:
        raise ValueError(f"select={select!r}: must be one of {', '.join(SELECTIONS)}")


def _fake(x: Tensor, count: int, select: str) -> tuple[Tensor, Tensor]:
    _check(x, select)
    weights = 0 if select == NORM else count
    return x.new_empty(count, dtype=torch.int32), x.new_empty(weights, dtype=torch.float32)


define(
    "select_rows(Tensor x, SymInt count, str select) -> (Tensor index, Tensor weight)",
    select_rows,
    _fake,
    triton=False,
    tags=(torch.Tag.nondeterministic_seeded,),
)
