"""``bitmask``: masks, indices and other small integers, in the fewest bits that lose nothing.

The row of the op says how many: 1 for the slope of a piecewise-linear function or a dropout mask,
4 for the maximum's place in a 3 x 3 pooling window, 16 for a word in a vocabulary of 50257. Up to 8
bits are packed densely; above, each integer takes 2 or 4 bytes.
"""

from typing import Any

import torch
from torch import Tensor

import dropit_fx.kernels.masks  # noqa: F401  registers its ops
from dropit_fx.codecs.codec import Codec, Options
from dropit_fx.kernels import fused
from dropit_fx.kernels.format import uint_nbytes
from dropit_fx.ops.rule import Use

_MIDDLE = 1 << 15


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    if "low" in options and flat.dtype != torch.bool:  # between two bounds, from the values
        return (torch.ops.dropit.pack_between(flat, options["low"], options["high"]),)
    bits = options["bits"]
    if bits == 16:
        return ((flat - _MIDDLE).to(torch.int16),)
    if bits == 32:
        return (flat.to(torch.int32),)
    codes = flat if flat.dtype in (torch.bool, torch.uint8) else flat.to(torch.uint8)
    return (torch.ops.dropit.pack_uint(codes, bits),)


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: Any, dtype: torch.dtype) -> Tensor:
    bits, integers = options["bits"], dtype in (torch.int64, torch.int32)
    if bits > 8:
        wide = parts[0].to(dtype)
        return wide + _MIDDLE if bits == 16 else wide
    codes: Tensor = torch.ops.dropit.unpack_uint(parts[0], bits, numel)
    if integers:
        return codes.to(dtype)
    return codes.to(torch.bool) if bits == 1 else codes


def _nbytes(numel: int, dtype: torch.dtype, options: Options) -> int:
    bits = options["bits"]
    return numel * bits // 8 if bits > 8 else uint_nbytes(numel, bits)


BITMASK = Codec(
    name="bitmask",
    serves=frozenset({Use.SLOPE}),
    pack=_pack,
    unpack=_unpack,
    nbytes=_nbytes,
    lossless=lambda options: True,
    codes=True,
    fused={
        "pack_uint": fused.pack_uint,
        "unpack_uint": fused.unpack_uint,
        "pack_between": fused.pack_between,
        "apply_mask": fused.apply_mask,
    },
)
