"""The packed format and its kernels; importing this registers the ops of namespace `dropit`.

May be imported from here: what this file names, ``layout`` (sizes), ``seeds``, ``attention``.
Needs PyTorch only: no other room.
"""

from __future__ import annotations

from dropit_fx.kernels import ops as ops
from dropit_fx.kernels.format import (
    AFFINE,
    FULL,
    LAYOUTS,
    SYMMETRIC,
    UNIFORM,
    block_count,
    codes_nbytes,
    kept,
    mask_nbytes,
    scale_columns,
)

__all__ = ["AFFINE", "FULL", "LAYOUTS", "SYMMETRIC", "UNIFORM", "kept", "packed_nbytes"]


def packed_nbytes(numel: int, keep: int, block: int, bits: int, layout: int, itemsize: int) -> int:
    """Bytes of the three buffers of `dropit::sparsify`, all metadata included.

    Exact, and symbolic where `numel` is.

    Args:
        numel: elements of the input.
        keep: kept elements per 10000.
        block: elements per block; 0: the whole tensor is one.
        bits: 1..8, or 0 for values as they are.
        layout: of the levels: 0 symmetric, 1 affine, 2 uniform.
        itemsize: bytes per element of the input's dtype; read only where `bits` is 0.
    """
    if bits == 0:
        return kept(numel, keep, block) * itemsize + mask_nbytes(numel, keep)
    scale = block_count(numel, block) * scale_columns(bits, layout) * 2
    return codes_nbytes(numel, keep, block, bits) + scale + mask_nbytes(numel, keep)
