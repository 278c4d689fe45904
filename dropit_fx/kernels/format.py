"""The packed format, and the bytes that it takes: integer arithmetic, safe for symbolic sizes.

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
* `scale`: `columns` bfloat16 numbers per block; empty when `bits` is 0.

Nothing here branches on a size, so that a `torch.SymInt` stays symbolic.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropit_fx.kernels.dtypes import check_float

SPACINGS = ("symmetric", "affine", "uniform")  # of the levels, see `coder`
SYMMETRIC, AFFINE, UNIFORM = range(len(SPACINGS))
FULL = 10_000  # `keep` of a format that drops nothing


@dataclass(frozen=True)
class Format:
    """One packed format; making one that no kernel can make raises ValueError.

    Attributes:
        keep: Kept elements per 10000, in 0..10000.
        block: Elements per block: 0 (the whole tensor) or a multiple of 8, so that each block's
            mask is whole bytes.
        bits: Of a kept value: 0 (as it is) or 1..8.
        spacing: Of the levels: one of `SPACINGS`, by index. The schemas of the ops say `layout`.
        stochastic: Rounds at random, to what is right in the mean. Nothing to `bits = 0`.
    """

    keep: int
    block: int
    bits: int = 0
    spacing: int = SYMMETRIC
    stochastic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= FULL:
            raise ValueError(f"keep={self.keep}: must be in 0..{FULL} (kept elements per {FULL})")
        if self.block < 0 or self.block % 8:
            raise ValueError(
                f"block={self.block}: must be 0 (whole tensor) or a positive multiple of 8"
            )
        if not 0 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: must be 0 (values as they are) or 1..8")
        if self.spacing not in range(len(SPACINGS)):
            raise ValueError(f"layout={self.spacing}: must be in 0..{len(SPACINGS) - 1}")

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """As the schemas of the ops have it; those that pack take `stochastic` behind."""
        return self.keep, self.block, self.bits, self.spacing

    @property
    def full(self) -> bool:
        """Whether every element is kept, so that there is no mask."""
        return self.keep == FULL

    @property
    def draws(self) -> bool:
        """Whether rounding takes random numbers."""
        return self.stochastic and self.bits > 0

    @property
    def is_codebook(self) -> bool:
        """Whether the magnitudes themselves are stored per block, not the ends of a grid."""
        return self.spacing == SYMMETRIC and self.bits <= 3

    @property
    def columns(self) -> int:
        """bfloat16 numbers per block in `scale`: 1, 2, 4 for a codebook of 1..3 bits, else 2."""
        if self.bits == 0:
            return 0
        return 2 ** (self.bits - 1) if self.is_codebook else 2

    def split(self, numel: int) -> tuple[int, int, int]:
        """(full blocks, their length, length of the tail); a whole tensor is all tail."""
        if self.block == 0:
            return 0, 0, numel
        return numel // self.block, self.block, numel % self.block

    def blocks(self, numel: int) -> int:
        """Number of blocks, the tail included; none for an empty tensor."""
        if self.block == 0:
            return torch.sym_min(numel, 1)  # type: ignore[return-value]  # int for an int
        return (numel + self.block - 1) // self.block

    def kept_in_block(self, length: int) -> int:
        """Kept elements of one block of `length` elements."""
        return (length * self.keep + (FULL // 2 if self.block else 0)) // FULL

    def kept_counts(self, numel: int) -> tuple[int, int]:
        """Kept elements of a full block, and of the tail."""
        _, length, tail = self.split(numel)
        return self.kept_in_block(length), self.kept_in_block(tail)

    def kept(self, numel: int) -> int:
        """Number of elements kept of a tensor of `numel`; exact, and symbolic where `numel` is."""
        of_full, of_tail = self.kept_counts(numel)
        return self.split(numel)[0] * of_full + of_tail

    def stream(self, count: int) -> int:
        """What `count` kept elements of one block take of `values`: bytes, or elements as is."""
        return uint_nbytes(count, self.bits) if self.bits else count

    def sizes(self, numel: int) -> tuple[int, int, int]:
        """Elements of `values` (bytes, for codes), `scale` and `mask`."""
        return _known_sizes(self, numel) if type(numel) is int else _sizes_of(self, numel)

    def nbytes(self, numel: int, itemsize: int) -> int:
        """Bytes of the three buffers, all metadata included; exact, and symbolic where `numel` is.

        Args:
            numel: Elements of the input.
            itemsize: Bytes per element of the input's dtype; read only where `bits` is 0.
        """
        values, scale, mask = self.sizes(numel)
        return values * (1 if self.bits else itemsize) + scale * 2 + mask

    def buffers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Room for what the flat `x` is packed into: `values`, `scale` and `mask`."""
        values, scale, mask = self.sizes(x.numel())
        return (
            x.new_empty(values, dtype=torch.uint8 if self.bits else x.dtype),
            x.new_empty(scale, dtype=torch.bfloat16),
            x.new_empty(mask, dtype=torch.uint8),
        )


def _sizes_of(form: Format, numel: int) -> tuple[int, int, int]:
    of_full, of_tail = form.kept_counts(numel)
    values = form.split(numel)[0] * form.stream(of_full) + form.stream(of_tail)
    scale = form.blocks(numel) * form.columns if form.bits else 0
    return values, scale, 0 if form.full else uint_nbytes(numel, 1)


_known_sizes = functools.lru_cache(maxsize=4096)(_sizes_of)  # each pack and unpack asks for them


def uint_nbytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits in one bit stream."""
    return (count * bits + 7) // 8


def index_bits(rows: int) -> int:
    """The fewest bits for an index into so many rows: 1 to 8, 16, or 32."""
    bits = max(1, (rows - 1).bit_length())
    return bits if bits <= 8 else 16 if bits <= 16 else 32


def check_uint(x: Tensor, bits: int) -> None:
    """Raises for what `pack_uint` and `unpack_uint` cannot take."""
    if x.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"dtype {x.dtype}: codes are uint8 or bool")
    _check_bits(bits)


def check_borders(dtype: torch.dtype, borders: Sequence[float], bits: int) -> None:
    """Raises for what `encode_steps` cannot take: see `reference`."""
    check_float(dtype)
    _check_bits(bits)
    if len(borders) > 2**bits - 1:
        raise ValueError(f"{len(borders)} borders: codes of {bits} bits tell {2**bits - 1} apart")
    if not all(map(operator.le, borders, [*borders[1:], math.inf])):
        raise ValueError(f"borders {list(borders)}: must ascend, without NaN")


def check_levels(packed: Tensor, levels: Sequence[float], bits: int, dtype: torch.dtype) -> None:
    """Raises for what `decode_steps` cannot take: see `reference`."""
    check_float(dtype)
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"dtype {packed.dtype}: packed codes are uint8")
    if not 1 <= len(levels) <= 2**bits:
        raise ValueError(f"{len(levels)} levels: codes of {bits} bits need 1..{2**bits}")


def check_stream(packed: Tensor, bits: int, numel: int) -> None:
    """Raises ValueError unless `packed` has the bytes of `numel` codes."""
    if packed.numel() != uint_nbytes(numel, bits):
        raise ValueError(f"{packed.numel()} bytes cannot hold {numel} codes of {bits} bits")


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be 1..8")
