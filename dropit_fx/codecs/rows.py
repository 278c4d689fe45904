"""``rows``: whole rows of the operand of a product, the rest dropped. Lost: what these add to dW.

The weight gradient of a layer is a sum over tokens, samples or frames, ``dW = sum_i dY_i^T x_i``
with one row of x each. Of n rows ``ceil((1 - gamma) * n)`` are kept, ``bits`` codes them, and the
backward multiplies the kept rows alone: (1 - gamma) of the dense product. ``select`` says which:

* ``uniform``: at random, scaled by n / k. Right in the mean.
* ``wta_crs``: the largest norms surely, others with a chance that grows with their norm, scaled by
  its inverse (WTA-CRS, arXiv 2305.15265). Right in the mean.
* ``norm``: the largest norms as they are. Not right in the mean.

With ``gradients``, ``wta_crs`` weighs a row by |x_i| |dY_i|, as the paper does. The paper takes the
norm of dY_i of the last epoch, for that training sample; a graph sees no numbers of samples, and
takes what earlier steps have seen at place i of the batch (``kernels.row_norms``); in the first
step, |x_i| alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dropit_fx.codecs.codec import Codec, Option, Options
from dropit_fx.codecs.mink import BITS, BLOCK, GAMMA, ROUNDING, format_of, keep_ratio
from dropit_fx.kernels import FULL
from dropit_fx.kernels.row_norms import MEMORY
from dropit_fx.kernels.rows import NORM, SELECTIONS, WTA_CRS
from dropit_fx.ops.rule import Use

SELECT = Option(
    name="select",
    default="uniform",
    schema={"enum": [*SELECTIONS]},
    meaning="'uniform' and 'wta_crs' (more likely where the norm is larger) draw rows and are"
    " unbiased, 'norm' keeps the largest",
)

GRADIENTS = Option(
    name="gradients",
    default=True,
    schema={"type": "boolean"},
    meaning="true or false: 'wta_crs' also weighs a row of the batch by the gradients that earlier"
    " steps had there",
)


def _remembers(options: Options) -> bool:
    return bool(options["select"] == WTA_CRS and options["gradients"])


def _count(numel: Any, options: Options) -> tuple[int, int]:
    """How many rows there are, and how many of them are kept."""
    rows = numel // torch.sym_max(options["width"], 1)
    return rows, (rows * keep_ratio(options["gamma"]) + FULL - 1) // FULL


def _coded(options: Options) -> Options:
    """Options with which the kept rows, all of them, are packed as by ``quant``."""
    return {name: options[name] for name in ("bits", "block", "rounding")}


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    rows, count = _count(flat.numel(), options)
    x = flat.view(rows, options["width"])
    if memory := options.get(MEMORY):
        index, weight = torch.ops.dropit.select_known_rows(x, count, memory)
    else:
        index, weight = torch.ops.dropit.select_rows(x, count, options["select"])
    kept = x.index_select(0, index)
    if not options["bits"]:
        return kept, flat.new_empty(0), index, weight
    form = format_of(_coded(options))
    codes, scale, _ = torch.ops.dropit.sparsify(kept.view(-1), *form.numbers, form.stochastic)
    return codes, scale, index, weight


def _kept(parts: tuple[Tensor, ...], options: Options, dtype: torch.dtype) -> Tensor:
    """(kept rows, width), without their weights."""
    codes, scale, index, _ = parts
    shape = index.shape[0], options["width"]
    if not options["bits"]:
        return codes.to(dtype)
    given = codes, scale, codes.new_empty(0), shape[0] * shape[1], dtype
    out: Tensor = torch.ops.dropit.unsparsify(*given, *format_of(_coded(options)).numbers)
    return out.view(shape)


def _weighted(rows: Tensor, parts: tuple[Tensor, ...], options: Options) -> Tensor:
    weight = parts[-1]
    return rows if options["select"] == NORM else (rows * weight[:, None]).to(rows.dtype)


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: Any, dtype: torch.dtype) -> Tensor:
    kept, index = _weighted(_kept(parts, options, dtype), parts, options), parts[2]
    dense = kept.new_zeros(_count(numel, options)[0], options["width"])
    return dense.index_copy(0, index.long(), kept).view(-1)


def _contract(
    parts: tuple[Tensor, ...], options: Options, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if memory := options.get(MEMORY):
        some = torch.ops.dropit.note_rows(grad, parts[2], memory)
    else:
        some = grad.index_select(0, parts[2])
    return _weighted(some, parts, options), _kept(parts, options, dtype)


def _nbytes(numel: int, dtype: torch.dtype, options: Options) -> int:
    count = _count(numel, options)[1]
    kept: int = format_of(_coded(options)).nbytes(count * options["width"], dtype.itemsize)
    return kept + (4 if options["select"] == NORM else 8) * count


ROWS = Codec(
    name="rows",
    serves=frozenset({Use.CONTRACT}),
    options=(replace(GAMMA, default=0.7), SELECT, GRADIENTS, BITS, BLOCK, ROUNDING),
    pack=_pack,
    unpack=_unpack,
    nbytes=_nbytes,
    buffers=4,
    lossless=lambda options: keep_ratio(options["gamma"]) == FULL and not options["bits"],
    contract=_contract,
    remembers=_remembers,
)
