"""``mink``, ``random`` and ``quant``: three corners of one packed format.

Of each block of ``block`` consecutive elements, k = (1 - gamma) * block are kept as a bitmask and
their values; ``bits`` codes the values in that many bits with a scale for each block.

* ``mink`` keeps the k largest magnitudes: DropIT (arXiv 2202.13808, section 3.2). With
  ``scope: tensor`` the whole tensor is one block, which is the paper's own selection.
* ``random`` keeps k at random and scales them by block / k: unbiased, with more variance.
* ``quant`` keeps all of them (no mask), in few bits. With ``hadamard``, each 16 are rotated before
  they are rounded, and back when they are read: by an op in front of those that pack and one
  behind those that unpack (`kernels.hadamard`), in float32 at least.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dropit_fx.kernels.hadamard  # noqa: F401  registers its op
from dropit_fx.codecs.codec import BLOCKS, Codec, Option, Options
from dropit_fx.kernels import FULL, SPACINGS, Format, fused
from dropit_fx.kernels.dtypes import saturated
from dropit_fx.ops.autocasting import without_autocast
from dropit_fx.ops.rule import Use


def keep_ratio(gamma: float) -> int:
    """Kept elements in 10 000: an integer, so that sizes stay exact and symbolic."""
    return round((1 - gamma) * FULL)


GAMMA = Option(
    name="gamma",
    default=0.9,
    schema={"type": "number", "minimum": 0, "maximum": 1 - 1 / FULL},
    meaning="the dropping rate, a number in [0, 0.9999]; 0 keeps every element",
    shown=True,
)
BITS = Option(
    name="bits",
    default=None,
    schema={"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 8}]},
    meaning="bits of a kept value, 1 to 8, or null for the tensor's own dtype",
    shown=True,
)
QUANT_BITS = replace(BITS, default=4)
BLOCK = Option(
    name="block",
    default=1024,
    schema=BLOCKS,
    meaning="elements of a block, a multiple of 8, below 2**63",
)
SCOPE = Option(
    name="scope",
    default="block",
    schema={"enum": ["block", "tensor"]},
    meaning="'block' selects inside each block, 'tensor' in the whole tensor at once (the paper)",
)
ROUNDING = Option(
    name="rounding",
    default="nearest",
    schema={"enum": ["nearest", "stochastic"]},
    meaning="'nearest', or 'stochastic' (unbiased over the kept values, more variance)",
)
RANGE = Option(
    name="range",
    default="symmetric",
    schema={"enum": [*SPACINGS]},
    meaning="'symmetric' levels around zero, 'affine' for one-sided tensors: finer near the least "
    "value, or 'uniform': equal steps between the least and the greatest value",
)
HADAMARD = Option(
    name="hadamard",
    default=False,
    schema={"type": "boolean"},
    meaning="true: each 16 values are rotated by the Hadamard matrix before they are rounded",
    shown=True,
)


def format_of(options: Options) -> Format:
    """What the options of any of the three mean; those that it has not are as they are for it."""
    make = _made if torch.compiler.is_compiling() else _known  # Dynamo traces no caches
    return make(
        options.get("gamma", 0.0),
        0 if options.get("scope") == "tensor" else options["block"],
        options.get("bits") or 0,
        options.get("range", "symmetric"),
        options.get("rounding") == "stochastic",
    )


def _made(gamma: float, block: int, bits: int, spacing: str, stochastic: bool) -> Format:
    return Format(keep_ratio(gamma), block, bits, SPACINGS.index(spacing), stochastic)


_known = functools.lru_cache(maxsize=1024)(_made)


def _rotates(options: Options) -> bool:
    """Whether values are rotated; those that keep all their bits are not."""
    return bool(options.get("hadamard") and options["bits"])


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    form = format_of(options)
    if _rotates(options):
        flat = _rotated(flat.to(_work(flat.dtype)))
    parts: tuple[Tensor, ...] = torch.ops.dropit.sparsify(flat, *form.numbers, form.stochastic)
    return parts


def _rotated(flat: Tensor) -> Tensor:
    with without_autocast(flat.device.type):
        out: Tensor = torch.ops.dropit.rotate(flat)
    return out


def _work(dtype: torch.dtype) -> torch.dtype:
    """In which values are rotated: sums of 16 overflow in float16."""
    return torch.promote_types(dtype, torch.float32)


def _sample(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    form = format_of(options)
    values, mask = torch.ops.dropit.sample(flat, form.keep, form.block)
    return values, values.new_empty(0), mask


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: Any, dtype: torch.dtype) -> Tensor:
    numbers = format_of(options).numbers
    work = _work(dtype) if _rotates(options) else dtype
    out: Tensor = torch.ops.dropit.unsparsify(*parts, numel, work, *numbers)
    if not _rotates(options):
        return out
    back = _rotated(out)
    return back if work == dtype else saturated(back, dtype)


def _pack_channels(
    flat: Tensor, mean: Tensor, inverse: Tensor, inner: Any, options: Options
) -> tuple[Tensor, ...]:
    if _rotates(options):
        runs = flat.view(-1, mean.numel(), inner).to(torch.float32)
        standard = (runs - mean[:, None]) * inverse[:, None]
        return _pack(standard.to(flat.dtype).view(-1), options)
    form = format_of(options)
    given = flat, mean, inverse, inner, *form.numbers, form.stochastic
    parts: tuple[Tensor, ...] = torch.ops.dropit.sparsify_channels(*given)
    return parts


def _unpack_channels(
    parts: tuple[Tensor, ...],
    mean: Tensor,
    deviation: Tensor,
    inner: Any,
    options: Options,
    numel: Any,
    dtype: torch.dtype,
) -> Tensor:
    if _rotates(options):
        runs = _unpack(parts, options, numel, dtype).view(-1, mean.numel(), inner)
        return runs.mul_(deviation[:, None]).add_(mean[:, None]).view(-1)
    given = *parts, mean, deviation, inner, numel, dtype, *format_of(options).numbers
    out: Tensor = torch.ops.dropit.unsparsify_channels(*given)
    return out


def _keeps_all(options: Options) -> bool:
    form = format_of(options)
    return form.full and form.bits == 0


def _faithful(options: Options) -> bool:
    """Every element is kept, in at least four bits."""
    form = format_of(options)
    return form.full and (form.bits == 0 or form.bits >= 4)


MINK = Codec(
    name="mink",
    serves=frozenset({Use.CONTRACT}),
    options=(GAMMA, BITS, BLOCK, SCOPE, ROUNDING),
    pack=_pack,
    unpack=_unpack,
    nbytes=lambda numel, dtype, options: format_of(options).nbytes(numel, dtype.itemsize),
    buffers=3,
    lossless=_keeps_all,
    faithful=_faithful,
    fused={"sparsify": fused.sparsify, "unsparsify": fused.unsparsify},
)

RANDOM = replace(MINK, name="random", options=(GAMMA, BLOCK, SCOPE), pack=_sample)

QUANT = replace(
    MINK,
    name="quant",
    serves=frozenset({Use.CONTRACT, Use.SLOPE, Use.REDUCE}),
    options=(QUANT_BITS, BLOCK, RANGE, ROUNDING, HADAMARD),
    pack_channels=_pack_channels,
    unpack_channels=_unpack_channels,
    fused={
        **MINK.fused,
        "sparsify_channels": fused.sparsify_channels,
        "unsparsify_channels": fused.unsparsify_channels,
    },
)
