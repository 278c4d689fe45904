"""``low_rank``: the operand of a product as two thin factors, or as few mixtures of its rows.

The weight gradient of a layer, ``dW = dY^T x`` with one row of x a token, is linear in x. In the
place of ``x: (rows, width)`` stands, by ``projection``:

* ``range``: ``(x Q) Q^T``, where the ``rank`` columns of Q are orthonormal and span most of what
  the rows of x span: a randomised range finder with one power iteration (Halko, Martinsson, Tropp,
  arXiv 0909.4061, algorithm 4.4), as in LoRAct (arXiv 2509.23472). Lost: what lies outside, so that
  it is not right in the mean. Nothing is drawn: the matrix that it begins with is always the same.
* ``random``: ``P x``, ``rank`` sums of rows with random signs, and the seed of P. Then
  ``dW' = (P dY)^T (P x)`` is right in the mean, whatever the values: the randomised linear layer of
  FewBit (arXiv 2201.13195), with a sparse P (`kernels.projection`).

The backward multiplies ``rank`` rows in the place of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dropit_fx.kernels.projection  # noqa: F401  registers its ops
from dropit_fx.codecs.codec import Codec, Option, Options
from dropit_fx.codecs.mink import whole
from dropit_fx.kernels import FULL
from dropit_fx.kernels.dtypes import saturated
from dropit_fx.kernels.fused_bits import is_empty
from dropit_fx.ops.autocasting import without_autocast
from dropit_fx.ops.rule import Use

RANGE, RANDOM = PROJECTIONS = ("range", "random")


def _legal_rank(value: Any) -> bool:
    if whole(value):
        return bool(value >= 1)
    return isinstance(value, float) and 1 / FULL <= value < 1


RANK = Option(
    name="rank",
    default=0.25,
    legal=_legal_rank,
    shown=True,
    meaning="a whole number, or a share in [0.0001, 1): of the rows for 'random', of rows or width,"
    " whichever is less, for 'range'",
)
PROJECTION = Option(
    name="projection",
    default=RANGE,
    legal=lambda value: value in PROJECTIONS,
    shown=True,
    meaning="'range' (directions in which the rows vary most; biased) or 'random' (sums of rows"
    " with random signs; unbiased)",
)


def _sizes(numel: Any, options: Options) -> tuple[Any, Any]:
    """How many rows there are, and the rank."""
    rows, rank = numel // torch.sym_max(options["width"], 1), options["rank"]
    most = torch.sym_min(rows, options["width"]) if options["projection"] == RANGE else rows
    if whole(rank):
        return rows, torch.sym_min(most, rank)
    return rows, (most * round(rank * FULL) + FULL - 1) // FULL


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Sums of rows overflow in float16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    rows, rank = _sizes(flat.numel(), options)
    stored = _stored(flat.dtype)
    x = flat.view(rows, options["width"])
    if options["projection"] == RANDOM:
        seed = torch.ops.dropit.fresh_seed(flat)
        return torch.ops.dropit.mix_rows(x.to(stored), seed, rank), seed
    if is_empty(flat.numel()):
        return x.new_empty(rows, rank, dtype=stored), x.new_empty(x.shape[1], rank, dtype=stored)
    with without_autocast(flat.device.type):
        return _factors(x.to(torch.promote_types(x.dtype, torch.float32)), rank, stored)


def _factors(x: Tensor, rank: Any, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    start = torch.ops.dropit.mix_rows(x, x.new_zeros(1, dtype=torch.int64), rank)
    basis = torch.linalg.qr(start.t()).Q
    basis = torch.linalg.qr(x.t() @ (x @ basis)).Q.contiguous()
    return saturated(x @ basis, stored), basis.to(stored)


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: Any, dtype: torch.dtype) -> Tensor:
    first, second = parts
    if options["projection"] == RANDOM:
        rows, _ = _sizes(numel, options)
        dense = torch.ops.dropit.unmix_rows(first, second, rows)
    else:
        with without_autocast(first.device.type):
            dense = first @ second.t()
    return _in(dtype, dense.view(-1))


def _contract(
    parts: tuple[Tensor, ...], options: Options, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, second = parts
    if options["projection"] == RANDOM:
        some = torch.ops.dropit.mix_rows(grad, second, first.shape[0])
        return some, _in(dtype, first)
    return _in(grad.dtype, first).t() @ grad, _in(dtype, second).t()


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else saturated(x, dtype)


def _nbytes(numel: int, dtype: torch.dtype, options: Options) -> int:
    rows, rank = _sizes(numel, options)
    size: int
    if options["projection"] == RANDOM:
        size = rank * options["width"] * dtype.itemsize + 8
    else:
        size = (rows + options["width"]) * rank * dtype.itemsize
    return size


LOW_RANK = Codec(
    name="low_rank",
    serves=frozenset({Use.CONTRACT}),
    options=(RANK, PROJECTION),
    pack=_pack,
    unpack=_unpack,
    nbytes=_nbytes,
    buffers=2,
    contract=_contract,
)
