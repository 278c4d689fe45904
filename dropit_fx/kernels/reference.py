"""The kernels in plain PyTorch: the oracle of the tests, and what runs where nothing faster does.

Works on every device, without host synchronisation. See `format` for what they make.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropit_fx.kernels.coder import decode, encode
from dropit_fx.kernels.dtypes import INT_OF, check_float
from dropit_fx.kernels.format import (
    Format,
    check_borders,
    check_levels,
    check_stream,
    check_uint,
    uint_nbytes,
)
from dropit_fx.kernels.seeds import draw_seed, rounding_seed


def magnitude_keys(x: Tensor) -> Tensor:
    """Bit patterns with the sign cleared: integers ordered by magnitude, NaN > Inf > finite."""
    check_float(x.dtype)
    pattern = x.view(INT_OF[x.dtype])
    return (pattern & torch.iinfo(pattern.dtype).max).to(torch.int64)


def random_keys(seed: Tensor, numel: int) -> Tensor:
    """Uniform 32-bit integers, one per index, from a 64-bit seed: the same numbers on every device.

    Two rounds of a multiply-xorshift mixer (C. Wellons' `lowbias32`) over index and seed; a
    counter-based generator, so blocks need no state and every implementation draws the same bits.

    Args:
        seed: int64 tensor with one element, on the device of the result.
        numel: how many; indices count modulo 2**32.
    """
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    index = torch.arange(numel, device=seed.device, dtype=torch.int64) & 0xFFFFFFFF
    return _mix(_mix(index ^ low) ^ high)


def _mix(v: Tensor) -> Tensor:
    v = _mul32(v ^ (v >> 16), 0x7FEB352D)
    v = _mul32(v ^ (v >> 15), 0x846CA68B)
    return v ^ (v >> 16)


def _mul32(v: Tensor, factor: int) -> Tensor:
    """The low 32 bits of v * factor, by halves: int64 never overflows."""
    return (v * (factor & 0xFFFF) + ((v * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def select_largest(keys: Tensor, k: int) -> Tensor:
    """Marks the k largest keys of each row; of equal keys those with the lowest index.

    Args:
        keys: (rows, length), non-negative int64.
        k: in 0..length.

    Returns:
        (rows, length) bool, with exactly k True in each row.
    """
    if k == 0 or keys.shape[0] == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    smallest = keys.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = keys > smallest, keys == smallest
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def gather_kept(x: Tensor, mask: Tensor, k: int) -> Tensor:
    """The values under `mask` in index order: (rows, length), (rows, length) -> (rows, k)."""
    slot = torch.where(
        mask, mask.cumsum(1) - 1, k
    )  # what is dropped goes to a slot that is cut off
    out = x.new_zeros(x.shape[0], k + 1)
    return out.scatter_(1, slot, x)[:, :k]


def scatter_kept(values: Tensor, mask: Tensor) -> Tensor:
    """Inverse of `gather_kept`, zeros where dropped: (rows, k) -> (rows, length)."""
    if values.shape[1] == 0:
        return values.new_zeros(mask.shape)
    slot = (mask.cumsum(1) - 1).clamp_(min=0)
    return torch.where(mask, values.gather(1, slot), values.new_zeros(()))


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Packs each row into a bit stream of its own: (rows, n) -> (rows, bytes) uint8."""
    rows, count = codes.shape
    groups = torch.zeros(rows, (count + 7) // 8 * 8, dtype=torch.int64, device=codes.device)
    groups[:, :count] = codes
    shifts = torch.arange(8, device=codes.device)
    words = (groups.view(rows, -1, 8) << (shifts * bits)).sum(2)  # 8 codes fill `bits` bytes
    packed: Tensor = (words[:, :, None] >> (shifts[:bits] * 8)) & 0xFF
    return packed.to(torch.uint8).view(rows, -1)[:, : uint_nbytes(count, bits)].contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_rows`: (rows, ceil(count * bits / 8)) uint8 -> (rows, count) uint8."""
    rows = packed.shape[0]
    groups = torch.zeros(rows, (count + 7) // 8 * bits, dtype=torch.int64, device=packed.device)
    groups[:, : packed.shape[1]] = packed
    shifts = torch.arange(8, device=packed.device)
    words = (groups.view(rows, -1, bits) << (shifts[:bits] * 8)).sum(2)
    codes: Tensor = (words[:, :, None] >> (shifts * bits)) & (2**bits - 1)
    return codes.to(torch.uint8).view(rows, -1)[:, :count].contiguous()


def pack_uint(x: Tensor, bits: int) -> Tensor:
    """Packs codes densely: code i takes bits [i*bits, (i+1)*bits) of a little-endian bit stream.

    Bit j of the stream is bit j % 8 of byte j // 8; what is left of the last byte is zero.

    Args:
        x: (n,) bool or uint8, each below 2**bits.
        bits: 1..8.

    Returns:
        (ceil(n * bits / 8),) uint8.
    """
    check_uint(x, bits)
    return pack_rows(x[None], bits)[0] if x.numel() else x.new_empty(0, dtype=torch.uint8)


def unpack_uint(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack_uint`: (ceil(numel * bits / 8),) uint8 -> (numel,) uint8."""
    check_uint(packed, bits)
    return unpack_rows(packed[None], bits, numel)[0] if numel else torch.empty_like(packed)


def encode_steps(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    """Packs the number of borders that each value reaches: codes for a step function of x.

    Code i counts the borders b with x[i] >= b, both as float32. NaN reaches none.

    Args:
        x: (n,) float32, bfloat16, float16 or float64.
        borders: ascending, at most 2**bits - 1; equal ones count apart.
        bits: 1..8.

    Returns:
        (ceil(n * bits / 8),) uint8, packed as by `pack_uint`.
    """
    check_borders(x.dtype, borders, bits)
    single = x.to(torch.float32)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for border in torch.tensor(borders, dtype=torch.float32).tolist():
        codes += single >= border
    return pack_uint(codes, bits)


def decode_steps(
    packed: Tensor, levels: Sequence[float], bits: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """The level of each code that `encode_steps` packed.

    Args:
        packed: (ceil(numel * bits / 8),) uint8.
        levels: 1..2**bits values, rounded to `dtype`; codes beyond them have the last one.
        bits: 1..8.
        numel: number of codes.
        dtype: float32, bfloat16, float16 or float64.

    Returns:
        (numel,) of `dtype`.
    """
    check_levels(packed, levels, bits, dtype)
    check_stream(packed, bits, numel)
    codes = unpack_uint(packed, bits, numel).to(torch.int64)
    table = torch.tensor(levels, dtype=dtype).to(packed.device)
    return table[codes.clamp(max=len(levels) - 1)]


def _rows(x: Tensor, form: Format) -> list[Tensor]:
    """Views of the flat `x`: full blocks as (blocks, block), the tail as (1, length)."""
    full, length, tail = form.split(x.numel())
    head = x[: full * length].view(full, length) if full else None
    rest = x[full * length :].view(1, tail) if tail else None
    return [part for part in (head, rest) if part is not None]


def _cat(parts: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    flat = [part.reshape(-1) for part in parts]
    return torch.cat(flat) if flat else like.new_empty(0, dtype=dtype)


def sparsify(x: Tensor, form: Format, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the largest |x| of each block; see `ops` for the contract.

    Args:
        x: (numel,) float32, bfloat16, float16 or float64.
        form: what it is packed into.
        seed: (1,) int64, of stochastic rounding; None: draws one (`seeds`).
    """
    seed = rounding_seed(form, x, seed)
    parts, mask = _select(x, magnitude_keys(x), form)
    if form.bits == 0:
        return _cat(parts, x, x.dtype), x.new_empty(0, dtype=torch.bfloat16), mask
    draws: list[Tensor | None] = [None] * len(parts)
    if seed is not None:
        at_kept = random_keys(seed, x.numel())
        draws = [*_gather_parts(at_kept, _marks(mask, x.numel(), form), form)]
    coded = [encode(part, form, draw) for part, draw in zip(parts, draws, strict=True)]
    values = _cat([pack_rows(codes, form.bits) for codes, _ in coded], x, torch.uint8)
    return values, _cat([scale for _, scale in coded], x, torch.bfloat16), mask


def _select(x: Tensor, keys: Tensor, form: Format) -> tuple[list[Tensor], Tensor]:
    """Kept values of the full blocks and of the tail, (rows, k) each, and the mask."""
    if form.full:
        return _rows(x, form), x.new_empty(0, dtype=torch.uint8)
    parts = [select_largest(r, form.kept_in_block(r.shape[1])) for r in _rows(keys, form)]
    marks = _cat(parts, x, torch.bool)
    return _gather_parts(x, marks, form), pack_uint(marks, 1)


def _marks(mask: Tensor, numel: int, form: Format) -> Tensor | None:
    """Which elements are kept; None: all."""
    return None if form.full else unpack_uint(mask, 1, numel).bool()


def _gather_parts(x: Tensor, marks: Tensor | None, form: Format) -> list[Tensor]:
    if marks is None:
        return _rows(x, form)
    return [
        gather_kept(part, mark, form.kept_in_block(part.shape[1]))
        for part, mark in zip(_rows(x, form), _rows(marks, form), strict=True)
    ]


def unsparsify(
    values: Tensor, scale: Tensor, mask: Tensor, numel: int, dtype: torch.dtype, form: Format
) -> Tensor:
    """Inverse of `sparsify`, zeros where dropped; see `ops` for the contract."""
    marks = _marks(mask, numel, form)
    shape = torch.empty(numel, device="meta") if marks is None else marks
    parts, start, row = [], 0, 0
    for mark in _rows(shape, form):
        rows, length = mark.shape
        k = form.kept_in_block(length)
        width = form.stream(k)
        part = values[start : start + rows * width].view(rows, width)
        start += rows * width
        if form.bits:
            levels = scale[row * form.columns : (row + rows) * form.columns].view(rows, -1)
            part = decode(unpack_rows(part, form.bits, k), levels, form, dtype)
            row += rows
        parts.append(part if marks is None else scatter_kept(part, mark))
    return _cat(parts, values, dtype).to(dtype, copy=form.bits == 0 and marks is None)


def sample(x: Tensor, form: Format, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keeps a uniform random choice of exactly k per block, scaled by n / k; see `ops`.

    Args:
        x: as for `sparsify`.
        form: with `bits = 0`.
        seed: (1,) int64, of the choice; None: draws one.
    """
    check_float(x.dtype)
    seed = draw_seed(x.device) if seed is None else seed
    parts, mask = _select(x, random_keys(seed, x.numel()), form)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    scaled = [
        part.to(work) * (whole.shape[1] / max(part.shape[1], 1))
        for part, whole in zip(parts, _rows(x, form), strict=True)
    ]
    return _cat(scaled, x, work).to(x.dtype), mask


def sparsify_channels(
    x: Tensor, mean: Tensor, inverse: Tensor, inner: int, form: Format, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sparsify`, of ``(x - mean) * inverse``, channel by channel.

    Args:
        x: (numel,), a whole number of runs of `inner` elements; run r is of channel r % C.
        mean: (C,) float32.
        inverse: (C,) float32.
        inner: elements of a run.
        form: as for `sparsify`.
        seed: as for `sparsify`.
    """
    runs = x.view(-1, mean.numel(), inner)
    scaled = (runs.to(torch.float32) - mean[:, None]) * inverse[:, None]
    return sparsify(scaled.to(x.dtype).view(-1), form, seed)


def unsparsify_channels(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    mean: Tensor,
    deviation: Tensor,
    inner: int,
    numel: int,
    dtype: torch.dtype,
    form: Format,
) -> Tensor:
    """Inverse of `sparsify_channels`: times `deviation`, plus `mean`, each rounded to `dtype`."""
    flat = unsparsify(values, scale, mask, numel, dtype, form)
    runs = flat.view(-1, mean.numel(), inner)
    return runs.mul_(deviation[:, None]).add_(mean[:, None]).view(-1)
