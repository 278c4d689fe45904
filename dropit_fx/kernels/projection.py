"""Few mixtures of the rows of a matrix: the ops behind the codec `low_rank`.

`mix_rows` is a product with a random matrix P: (count, rows) that is never in memory. Each row
stands in one of the `count` sums, with a random sign; which of them, a random permutation says that
is dealt out evenly. So E[P^T P] = 1, and `(P g)^T (P x)` is `g^T x` in the mean: a count sketch
(Charikar, Chen, Farach-Colton 2002) with sums of equal length. A seed says all of P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropit_fx.kernels.dispatch import define
from dropit_fx.kernels.dtypes import check_float, saturated
from dropit_fx.kernels.reference import random_keys
from dropit_fx.kernels.seeds import draw_seed


def fresh_seed(x: Tensor) -> Tensor:
    """(1,) int64 on the device of `x`: see `seeds`."""
    return draw_seed(x.device)


def mix_rows(x: Tensor, seed: Tensor, count: int) -> Tensor:
    """`P x`, summed in float32 at least; what is finite stays so in `dtype` of `x`.

    Args:
        x: (rows, width).
        seed: (1,) int64, of P.
        count: Rows of P, 0..rows.

    Returns:
        (count, width).
    """
    check_float(x.dtype)
    rows, width = x.shape
    if count == 0 or rows == 0:
        return x.new_zeros(count, width)
    order, signs = _matrix(seed, rows)
    length = (rows + count - 1) // count
    first = (torch.arange(count + 1, device=x.device) * rows + count - 1) // count
    at = first[:-1, None] + torch.arange(length, device=x.device)
    row = order[at.clamp(max=rows - 1)]
    factors = torch.where(at < first[1:, None], signs[row], 0)
    work = torch.promote_types(x.dtype, torch.float32)
    some = x.index_select(0, row.flatten()).to(work).view(count, length, width)
    factors = factors.to(work)[:, :, None]
    return saturated(torch.where(factors == 0, 0, some * factors).sum(1), x.dtype)


def unmix_rows(mixed: Tensor, seed: Tensor, rows: int) -> Tensor:
    """`P^T` times what `mix_rows` gave: (count, width) -> (rows, width)."""
    count = mixed.shape[0]
    if count == 0 or rows == 0:
        return mixed.new_zeros(rows, mixed.shape[1])
    order, signs = _matrix(seed, rows)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    return mixed.index_select(0, place * count // rows) * signs.to(mixed.dtype)[:, None]


def _matrix(seed: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows in the order in which they are dealt out, and the sign of each."""
    keys = random_keys(seed, rows)
    return (keys >> 1).argsort(stable=True), 1 - 2 * (keys & 1)


define(
    "fresh_seed(Tensor x) -> Tensor",
    fresh_seed,
    lambda x: x.new_empty(1, dtype=torch.int64),
    triton=False,
    tags=(torch.Tag.nondeterministic_seeded,),
)
define(
    "mix_rows(Tensor x, Tensor seed, SymInt count) -> Tensor",
    mix_rows,
    lambda x, seed, count: x.new_empty(count, x.shape[1]),
    triton=False,
)
define(
    "unmix_rows(Tensor mixed, Tensor seed, SymInt rows) -> Tensor",
    unmix_rows,
    lambda mixed, seed, rows: mixed.new_empty(rows, mixed.shape[1]),
    triton=False,
)
