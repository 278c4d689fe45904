"""``bitmask``: masks and other small integers, in the fewest bits that lose nothing.

The row of the op says how many: 1 for the slope of a piecewise-linear function or a dropout mask,
4 for the maximum's place in a 3 x 3 pooling window.
"""

from typing import Any

import torch
from torch import Tensor

import dropit_fx.kernels.masks  # noqa: F401  registers its ops
from dropit_fx.core_types import Codec, Options, Use
from dropit_fx.kernels.layout import uint_nbytes


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: Any, dtype: torch.dtype) -> Tensor:
    codes: Tensor = torch.ops.dropit.unpack_uint(parts[0], options["bits"], numel)
    return codes.to(torch.bool) if options["bits"] == 1 else codes


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    if "low" in options:  # where the values lie between two bounds, straight from the values
        return (torch.ops.dropit.pack_between(flat, options["low"], options["high"]),)
    return (torch.ops.dropit.pack_uint(flat, options["bits"]),)


BITMASK = Codec(
    name="bitmask",
    serves=frozenset({Use.SLOPE}),
    pack=_pack,
    unpack=_unpack,
    nbytes=lambda numel, dtype, options: uint_nbytes(numel, options["bits"]),
    lossless=lambda options: True,
)
