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

The backward multiplies ``rank`` rows in the place of all. ``bits`` codes what is kept as ``quant``
codes a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dropit_fx.kernels.projection  # noqa: F401  registers its ops
from dropit_fx.codecs.codec import Codec, Option, Options
from dropit_fx.codecs.mink import BITS, BLOCK, ROUNDING, format_of
from dropit_fx.kernels import FULL, Format
from dropit_fx.kernels.dtypes import saturated
from dropit_fx.kernels.fused_bits import is_empty
from dropit_fx.ops.autocasting import without_autocast
from dropit_fx.ops.rule import Use
from dropit_fx.words import is_whole

RANGE, RANDOM = PROJECTIONS = ("range", "random")


RANK = Option(
    name="rank",
    default=0.25,
    schema={
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
            {"type": "number", "minimum": 1 / FULL, "exclusiveMaximum": 1},
        ]
    },
    shown=True,
    meaning="a whole number, or a share in [0.0001, 1): of the rows for 'random', of rows or width,"
    " whichever is less, for 'range'",
)
PROJECTION = Option(
    name="projection",
    default=RANGE,
    schema={"enum": [*PROJECTIONS]},
    shown=True,
    meaning="'range' (directions in which the rows vary most; biased) or 'random' (sums of rows"
    " with random signs; unbiased)",
)


def _sizes(numel: Any, options: Options) -> tuple[Any, Any]:
    """How many rows there are, and the rank."""
    rows, rank = numel // torch.sym_max(options["width"], 1), options["rank"]
    most = torch.sym_min(rows, options["width"]) if options["projection"] == RANGE else rows
    if is_whole(rank):
        return rows, torch.sym_min(most, rank)
    return rows, (most * round(rank * FULL) + FULL - 1) // FULL


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Sums of rows overflow in float16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    rows, rank = _sizes(flat.numel(), options)
    x, stored = flat.view(rows, options["width"]), _stored(flat.dtype)
    if options["projection"] == RANDOM:
        seed = torch.ops.dropit.fresh_seed(flat)
        mixed = torch.ops.dropit.mix_rows(x.to(stored), seed, rank)
        return *_coded(mixed, options), seed, flat.new_empty(0)
    if is_empty(flat.numel()):
        factors = x.new_empty(rows, rank, dtype=stored), x.new_empty(x.shape[1], rank, dtype=stored)
    else:
        with without_autocast(flat.device.type):
            factors = _factors(x.to(torch.promote_types(x.dtype, torch.float32)), rank, stored)
    first, second = (_coded(factor, options) for factor in factors)
    return *first, *second


def _factors(x: Tensor, rank: Any, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, rank) and (width, rank)."""
    start = torch.ops.dropit.mix_rows(x, x.new_zeros(1, dtype=torch.int64), rank)
    basis = torch.linalg.qr(start.t()).Q
    basis = torch.linalg.qr(x.t() @ (x @ basis)).Q.contiguous()
    return saturated(x @ basis, stored), basis.to(stored)


def _coded(x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """A factor as it is, or its codes and their scales."""
    if not options["bits"]:
        return x, x.new_empty(0)
    form = _form(options)
    codes, scale, _ = torch.ops.dropit.sparsify(x.view(-1), *form.numbers, form.stochastic)
    return codes, scale


def _decoded(
    parts: tuple[Tensor, ...], shape: tuple[Any, Any], options: Options, dtype: torch.dtype
) -> Tensor:
    """The factor of this shape, in ``dtype``."""
    codes, scale = parts
    if not options["bits"]:
        return codes if codes.dtype == dtype else saturated(codes, dtype)
    given = codes, scale, codes.new_empty(0), shape[0] * shape[1], dtype
    out: Tensor = torch.ops.dropit.unsparsify(*given, *_form(options).numbers)
    return out.view(shape)


def _form(options: Options) -> Format:
    return format_of({name: options[name] for name in ("bits", "block", "rounding")})


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: Any, dtype: torch.dtype) -> Tensor:
    rows, rank = _sizes(numel, options)
    width, stored = options["width"], _stored(dtype)
    if options["projection"] == RANDOM:
        mixed = _decoded(parts[:2], (rank, width), options, stored)
        dense = torch.ops.dropit.unmix_rows(mixed, parts[2], rows)
    else:
        first = _decoded(parts[:2], (rows, rank), options, stored)
        second = _decoded(parts[2:], (width, rank), options, stored)
        with without_autocast(first.device.type):
            dense = first @ second.t()
    flat = dense.view(-1)
    return flat if flat.dtype == dtype else saturated(flat, dtype)


def _contract(
    parts: tuple[Tensor, ...], options: Options, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows, width = grad.shape[0], options["width"]
    _, rank = _sizes(rows * width, options)
    if options["projection"] == RANDOM:
        some = torch.ops.dropit.mix_rows(grad, parts[2], rank)
        return some, _decoded(parts[:2], (rank, width), options, dtype)
    first = _decoded(parts[:2], (rows, rank), options, grad.dtype)
    return first.t() @ grad, _decoded(parts[2:], (width, rank), options, dtype).t()


def _nbytes(numel: int, dtype: torch.dtype, options: Options) -> int:
    (rows, rank), form = _sizes(numel, options), _form(options)
    second: int = form.nbytes(rank * options["width"], dtype.itemsize)
    if options["projection"] == RANDOM:
        return second + 8
    return form.nbytes(rows * rank, dtype.itemsize) + second


LOW_RANK = Codec(
    name="low_rank",
    serves=frozenset({Use.CONTRACT}),
    options=(RANK, PROJECTION, BITS, BLOCK, ROUNDING),
    pack=_pack,
    unpack=_unpack,
    nbytes=_nbytes,
    buffers=4,
    contract=_contract,
)
