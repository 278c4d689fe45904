"""``cast``: every value in a shorter floating-point dtype. Lost: what its mantissa does not hold.

``bfloat16`` keeps 8 significant bits, ``float8_e4m3fn`` 4 and ``float8_e5m2`` 3 (arXiv 2209.05433).
The two of 8 bits have a scale for each block, or for the whole tensor: a power of two, so that
nothing is rounded by it, in one byte (its exponent), as in the MX formats (arXiv 2310.10537): the
least that brings all finite values of the block into range. The greatest number of the dtype stands
for infinity, which ``float8_e4m3fn`` has not and which saturating conversions lose; finite values
end one step below. So NaN and infinity come back as they were, and no other value as one of them.

All of it is plain ops of PyTorch: a compiler fuses them with what is around.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.codecs.codec import BLOCKS, Codec, Option, Options
from dropit_fx.kernels.dtypes import saturated
from dropit_fx.kernels.fused_bits import divides, is_empty
from dropit_fx.ops.rule import Use

BFLOAT16 = "bfloat16"
_MANTISSA = (1 << 23) - 1  # of a float32


class _Float8(NamedTuple):
    """What finite values are scaled to, and what stands for infinity.

    Attributes:
        dtype: Of PyTorch.
        exponent: Of the greatest finite value in use, ``2**exponent * (1 + mantissa / 2**23)``.
        mantissa: Of the same.
        infinity: The next number of the dtype, its greatest.
    """

    dtype: torch.dtype
    exponent: int
    mantissa: int
    infinity: float


FLOAT8 = {
    "float8_e4m3fn": _Float8(torch.float8_e4m3fn, 8, 5 << 20, 448.0),  # up to 416
    "float8_e5m2": _Float8(torch.float8_e5m2, 15, 1 << 22, 57344.0),  # up to 49152
}
DTYPE = Option(
    name="dtype",
    default="float8_e4m3fn",
    schema={"enum": [*FLOAT8, BFLOAT16]},
    meaning="'float8_e4m3fn', 'float8_e5m2' or 'bfloat16'",
    shown=True,
)
BLOCK = Option(
    name="block",
    default=128,
    schema={"anyOf": [{"type": "null"}, BLOCKS]},
    meaning="elements that share a scale, a multiple of 8, or null for the whole tensor;"
    " 'bfloat16' has none",
)


def _in_blocks(x: Tensor, block: int | None) -> Tensor:
    """(blocks, length); the last one is filled up with zeros."""
    if block is None:
        return x.view(1, -1)
    return (x if divides(block, x.numel()) else F.pad(x, (0, -x.numel() % block))).view(-1, block)


def _flat(blocks: Tensor, numel: Any) -> Tensor:
    """Inverse of `_in_blocks`."""
    flat = blocks.view(-1)
    return flat if divides(blocks.shape[1], numel) else flat[:numel].clone()


def _power(exponents: Tensor) -> Tensor:
    """2**e, for each e in -126..127, as a column."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)[:, None]


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    none = flat.new_empty(0, dtype=torch.int8)
    if options["dtype"] == BFLOAT16:
        return saturated(flat, torch.bfloat16), none
    form = FLOAT8[options["dtype"]]
    if is_empty(flat.numel()):
        return flat.new_empty(0, dtype=form.dtype), none
    single = flat if flat.dtype == torch.float32 else saturated(flat, torch.float32)
    x = _in_blocks(single, options["block"])
    size = x.abs()
    most = torch.where(size < torch.inf, size, 0.0).amax(1)
    lifted = most.view(torch.int32) + (_MANTISSA - form.mantissa)  # more than fits: the next power
    exponents = ((lifted >> 23) - (127 + form.exponent)).clamp(-126, 126)
    scaled = (x * _power(-exponents)).clamp_(-form.infinity, form.infinity)
    return _flat(scaled.to(form.dtype), flat.numel()), exponents.to(torch.int8)


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: Any, dtype: torch.dtype) -> Tensor:
    codes, exponents = parts
    if options["dtype"] == BFLOAT16:
        return saturated(codes, dtype)
    if is_empty(numel):
        return codes.to(dtype)
    infinity = FLOAT8[options["dtype"]].infinity
    scaled = _in_blocks(codes.to(torch.float32), options["block"])
    top = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    x = (scaled * _power(exponents)).clamp_(-top, top)
    x = torch.where(scaled.abs() == infinity, scaled * torch.inf, x)
    return _flat(x, numel).to(dtype)


def _nbytes(numel: int, dtype: torch.dtype, options: Options) -> int:
    if options["dtype"] == BFLOAT16:
        return 2 * numel
    block = options["block"]
    blocks = torch.sym_min(numel, 1) if block is None else (numel + block - 1) // block
    return numel + blocks  # type: ignore[return-value]  # int for an int


CAST = Codec(
    name="cast",
    serves=frozenset({Use.CONTRACT, Use.SLOPE, Use.REDUCE}),
    options=(DTYPE, BLOCK),
    pack=_pack,
    unpack=_unpack,
    nbytes=_nbytes,
    buffers=2,
    faithful=lambda options: True,
)
