"""Sizes of the packed format: pure integer arithmetic, safe for symbolic sizes.

A flat tensor of `numel` elements is cut into blocks of `block` consecutive elements; the last one
(the tail) may be shorter. `block = 0` makes the whole tensor one block, which is the selection
DropIT was published with. Of a block of n elements exactly k are kept, so every size below follows
from shapes alone:

    k = (n * keep + 5000) // 10000     rounded; `keep` is a ratio in units of 1/10000
    k = n * keep // 10000              floored, where the whole tensor is one block (block = 0)

A packed tensor is three buffers:

* `mask`: one bit an element, least significant bit first, over the flat tensor; empty when `keep`
  is 10000.
* `values`: the kept values in index order. With `bits = 0` in the dtype of the input; otherwise
  codes of `bits` bits, each block a little-endian bit stream of its own (see `pack_uint`) that
  starts at a byte.
* `scale`: `scale_columns` bfloat16 numbers per block; empty when `bits` is 0.

Nothing here branches on a size, so that a `torch.SymInt` stays symbolic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

LAYOUTS = ("symmetric", "affine", "uniform")  # of the levels, see `coder`
SYMMETRIC, AFFINE, UNIFORM = range(len(LAYOUTS))
FULL = 10_000  # `keep` of a format that drops nothing
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_format(keep: int, block: int, bits: int = 0, layout: int = SYMMETRIC) -> None:
    """Raises ValueError for a format that no kernel can make.

    Args:
        keep: kept elements per 10000, in 0..10000.
        block: elements per block: 0 (the whole tensor) or a multiple of 8, so that each block's
            mask is whole bytes.
        bits: 0 (values as they are) or 1..8.
        layout: one of `LAYOUTS`, by index.
    """
    if not 0 <= keep <= FULL:
        raise ValueError(f"keep={keep}: must be in 0..{FULL} (kept elements per {FULL})")
    if block < 0 or block % 8:
        raise ValueError(f"block={block}: must be 0 (whole tensor) or a positive multiple of 8")
    if not 0 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be 0 (values as they are) or 1..8")
    if layout not in range(len(LAYOUTS)):
        raise ValueError(f"layout={layout}: must be in 0..{len(LAYOUTS) - 1}")


def check_uint(x: torch.Tensor, bits: int) -> None:
    """Raises for what `pack_uint` and `unpack_uint` cannot take."""
    if x.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"dtype {x.dtype}: codes are uint8 or bool")
    _check_bits(bits)


def check_borders(dtype: torch.dtype, borders: Sequence[float], bits: int) -> None:
    """Raises for what `encode_steps` cannot take: see `reference`."""
    _check_float(dtype)
    _check_bits(bits)
    if len(borders) > 2**bits - 1:
        raise ValueError(f"{len(borders)} borders: codes of {bits} bits tell {2**bits - 1} apart")
    if not all(map(operator.le, borders, [*borders[1:], math.inf])):
        raise ValueError(f"borders {list(borders)}: must ascend, without NaN")


def check_levels(
    packed: torch.Tensor, levels: Sequence[float], bits: int, dtype: torch.dtype
) -> None:
    """Raises for what `decode_steps` cannot take: see `reference`."""
    _check_float(dtype)
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"dtype {packed.dtype}: packed codes are uint8")
    if not 1 <= len(levels) <= 2**bits:
        raise ValueError(f"{len(levels)} levels: codes of {bits} bits need 1..{2**bits}")


def check_stream(packed: torch.Tensor, bits: int, numel: int) -> None:
    """Raises ValueError unless `packed` has the bytes of `numel` codes."""
    if packed.numel() != uint_nbytes(numel, bits):
        raise ValueError(f"{packed.numel()} bytes cannot hold {numel} codes of {bits} bits")


def _check_float(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype {dtype}: must be one of {', '.join(map(str, FLOATS))}")


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be 1..8")


def kept_in_block(length: int, keep: int, block: int) -> int:
    """Kept elements of one block of `length` elements, for a tensor cut into blocks of `block`."""
    return length * keep // FULL if block == 0 else (length * keep + FULL // 2) // FULL


def split_blocks(numel: int, block: int) -> tuple[int, int, int]:
    """(full blocks, their length, length of the tail); with `block = 0` everything is tail."""
    if block == 0:
        return 0, 0, numel
    return numel // block, block, numel % block


def block_count(numel: int, block: int) -> int:
    """Number of blocks, the tail included; none for an empty tensor."""
    if block == 0:
        return torch.sym_min(numel, 1)  # type: ignore[return-value]  # int for an int
    return (numel + block - 1) // block


def is_codebook(bits: int, layout: int) -> bool:
    """True where the magnitudes themselves are stored per block, not the ends of a grid."""
    return layout == SYMMETRIC and bits <= 3


def scale_columns(bits: int, layout: int) -> int:
    """bfloat16 numbers per block in `scale`: 1, 2, 4 for a codebook of 1..3 bits, else 2."""
    if bits == 0:
        return 0
    return 2 ** (bits - 1) if is_codebook(bits, layout) else 2


def kept(numel: int, keep: int, block: int) -> int:
    """Number of elements kept of a tensor of `numel`; exact, and symbolic where `numel` is."""
    full, length, tail = split_blocks(numel, block)
    return full * kept_in_block(length, keep, block) + kept_in_block(tail, keep, block)


def mask_nbytes(numel: int, keep: int) -> int:
    """Bytes of the mask."""
    return 0 if keep == FULL else (numel + 7) // 8


def uint_nbytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits in one bit stream."""
    return (count * bits + 7) // 8


def codes_nbytes(numel: int, keep: int, block: int, bits: int) -> int:
    """Bytes of `values` for `bits` in 1..8: each block's stream starts at a byte."""
    full, length, tail = split_blocks(numel, block)
    of_full = uint_nbytes(kept_in_block(length, keep, block), bits)
    return full * of_full + uint_nbytes(kept_in_block(tail, keep, block), bits)


def index_bits(rows: int) -> int:
    """The fewest bits for an index into so many rows: 1 to 8, 16, or 32."""
    bits = max(1, (rows - 1).bit_length())
    return bits if bits <= 8 else 16 if bits <= 16 else 32
