"""The ops of namespace `dropit` as plain tensor ops, which a compiler schedules and fuses itself.

Each function takes what the op of its name takes, and gives what it gives: the same bytes (see
`fused_coder` for ties), the same values; or None where there is no such form, and the op stays: of
what draws random numbers or selects. Nothing here is read by eager mode: run as they are, these
would be slow. `compile.fuse` puts them in the place of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropit_fx.kernels import fused_coder as coder
from dropit_fx.kernels import masks
from dropit_fx.kernels.format import Format
from dropit_fx.kernels.fused_bits import (
    as_stored,
    bytes_by_codes,
    bytes_of,
    codes_at,
    codes_together,
    divides,
    is_empty,
    places,
    take,
)

Parts = tuple[Tensor, Tensor, Tensor]


def sparsify(
    x: Tensor, keep: int, block: int, bits: int, layout: int, stochastic: bool
) -> Parts | None:
    """Of every element, rounded to nearest; None else."""
    form = Format(keep, block, bits, layout, stochastic)
    if not form.full or form.draws:
        return None
    nothing = x.new_empty(0, dtype=torch.uint8)
    if bits == 0:
        return x.clone(), x.new_empty(0, dtype=torch.bfloat16), nothing
    numel = x.numel()
    if is_empty(numel):
        return nothing, x.new_empty(0, dtype=torch.bfloat16), nothing.clone()
    if x.dtype == torch.float64:
        x = x.to(torch.float32)
    length = block or numel
    rows = form.blocks(numel) if block else 1
    if divides(length, numel) and divides(codes_together(bits), length) and not form.is_codebook:
        return _in_one_pass(x, length, form)
    x = x.to(torch.float32)
    valid = None
    if divides(length, numel):
        table = x.view(rows, length)
    else:
        at = places(rows * length, x).view(rows, length)
        table, valid = take(x, at.clamp(max=numel - 1)), at < numel
    blocks = coder.blocks_of(table, valid, form)

    def code(at: Tensor) -> Tensor:
        row = at // length
        return coder.encode(
            take(x, at),
            lambda j: take(scale, row * form.columns + j).to(torch.float32),
            lambda j: take(blocks.borders[j], row),
            form,
        )

    scale = _stored(blocks.columns)
    return bytes_of(code, numel, bits, x), scale, nothing


def _in_one_pass(x: Tensor, length: int, form: Format) -> Parts:
    """Of whole blocks, an iteration for each value: a compiler joins it to what makes the values.

    The loop over a block for its scale and the one that writes its bytes become one, in which the
    block is read from memory once.
    """
    blocks = coder.blocks_of(x.view(-1, length), None, form)

    def code(at: Tensor) -> Tensor:
        row = at // length
        value = take(x, at).to(torch.float32)
        return coder.encode(value, lambda j: take(blocks.columns[j], row), None, form)

    values = bytes_by_codes(code, x.numel(), form.bits, x)
    return values, _stored(blocks.columns), x.new_empty(0, dtype=torch.uint8)


def _stored(columns: list[Tensor]) -> Tensor:
    # Rounded one by one, each column is stored by the kernel that has reduced the blocks
    return torch.stack([c.to(torch.bfloat16) for c in columns], 1).view(-1)


def unsparsify(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    numel: Any,
    dtype: torch.dtype,
    keep: int,
    block: int,
    bits: int,
    layout: int,
) -> Tensor | None:
    """Of every element; None where some were dropped."""
    form = Format(keep, block, bits, layout)
    if not form.full:
        return None
    if bits == 0:
        return values.to(dtype, copy=True)
    if is_empty(numel):
        return values.new_empty(0, dtype=dtype)
    at = places(numel, values)
    first = at // (block or numel) * form.columns

    def column(j: int | Tensor) -> Tensor:
        return take(scale, first + j).to(torch.float32)

    codes = codes_at(values, at, bits)
    return coder.decode(codes, column, column, form, dtype)


def sparsify_channels(
    x: Tensor, mean: Tensor, inverse: Tensor, inner: Any, *numbers: Any
) -> Parts | None:
    """As `sparsify`."""
    runs = x.view(-1, mean.numel(), inner)
    scaled = (runs.to(torch.float32) - mean[:, None]) * inverse[:, None]
    return sparsify(as_stored(scaled, x.dtype).reshape(-1), *numbers)


def unsparsify_channels(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    mean: Tensor,
    deviation: Tensor,
    inner: Any,
    numel: Any,
    dtype: torch.dtype,
    *numbers: Any,
) -> Tensor | None:
    """As `unsparsify`."""
    flat = unsparsify(values, scale, mask, numel, dtype, *numbers)
    if flat is None:
        return None
    runs = flat.view(-1, mean.numel(), inner)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    product = as_stored(runs.to(work) * deviation[:, None].to(work), dtype)
    # The sum in double precision, rounded once more, is that in single; not contracted with it
    total = product.double() + mean[:, None].double()
    return as_stored(total.to(work), dtype).reshape(-1)


def pack_uint(x: Tensor, bits: int) -> Tensor:
    """Of every tensor."""
    numel = x.numel()
    if is_empty(numel):
        return x.new_empty(0, dtype=torch.uint8)
    return bytes_of(lambda at: take(x, at).to(torch.int32), numel, bits, x)


def unpack_uint(packed: Tensor, bits: int, numel: Any) -> Tensor:
    """Of every tensor."""
    return _codes(packed, bits, numel).to(torch.uint8)


def _codes(packed: Tensor, bits: int, numel: Any) -> Tensor:
    if is_empty(numel):
        return packed.new_empty(0, dtype=torch.int32)
    return codes_at(packed, places(numel, packed), bits)


def encode_steps(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    """Of every tensor."""
    single = x.to(torch.float32)
    found = torch.zeros_like(single, dtype=torch.uint8)
    for border in borders:
        found = found + (single >= border)
    return pack_uint(found, bits)


def decode_steps(
    packed: Tensor, levels: Sequence[float], bits: int, numel: Any, dtype: torch.dtype
) -> Tensor:
    """Of every tensor."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = _codes(packed, bits, numel)
    out = torch.full_like(codes, levels[-1], dtype=work)
    for i, level in enumerate(levels[:-1]):
        out = torch.where(codes == i, level, out)
    return as_stored(out, dtype)


def pack_between(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Of every tensor."""
    return pack_uint(masks.between(x, low, high), 1)


def apply_mask(bits: Tensor, grad: Tensor, off: float) -> Tensor:
    """Of every tensor."""
    return masks.masked(_codes(bits, 1, grad.numel()) != 0, grad, off)
