"""The kernels in plain PyTorch: the oracle of the tests, and what runs where nothing faster does.

Works on every device, without host synchronisation. See `layout` for the format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropit_fx.kernels.layout import (
    FULL,
    check_format,
    kept_in_block,
    split_blocks,
    uint_nbytes,
)

_INT_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def magnitude_keys(x: Tensor) -> Tensor:
    """Integers that order `x` by magnitude: its bit pattern with the sign cleared, so NaN > Inf > finite."""
    if x.dtype not in _INT_OF:
        raise TypeError(f"dtype {x.dtype}: must be one of {', '.join(map(str, _INT_OF))}")
    pattern = x.view(_INT_OF[x.dtype])
    return (pattern & torch.iinfo(pattern.dtype).max).to(torch.int64)


def random_keys(seed: Tensor, numel: int) -> Tensor:
    """Uniform 32-bit integers, one per index, from a 64-bit seed: the same numbers on every device.

    Two rounds of a multiply-xorshift mixer (C. Wellons' `lowbias32`) over index and seed; a counter-based
    generator, so blocks need no state and every implementation draws the same bits.

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


def draw_seed(device: torch.device) -> Tensor:
    """A fresh 64-bit seed from torch's default generator of `device`: no host sync, safe in CUDA graphs."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


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
    """Inverse of `gather_kept`, zeros where dropped: (rows, k), (rows, length) -> (rows, length)."""
    if values.shape[1] == 0:
        return values.new_zeros(mask.shape)
    slot = (mask.cumsum(1) - 1).clamp_(min=0)
    return torch.where(mask, values.gather(1, slot), values.new_zeros(()))


def pack_uint(x: Tensor, bits: int) -> Tensor:
    """Packs codes densely: code i takes bits [i*bits, (i+1)*bits) of a little-endian bit stream.

    Bit j of the stream is bit j % 8 of byte j // 8; what is left of the last byte is zero.

    Args:
        x: (n,) bool or uint8, each below 2**bits.
        bits: 1..8.

    Returns:
        (ceil(n * bits / 8),) uint8.
    """
    count = x.numel()
    groups = torch.zeros((count + 7) // 8 * 8, dtype=torch.int64, device=x.device)
    groups[:count] = x
    shifts = torch.arange(8, device=x.device)
    words = (groups.view(-1, 8) << (shifts * bits)).sum(1)  # 8 codes fill exactly `bits` bytes
    packed = (words[:, None] >> (shifts[:bits] * 8)) & 0xFF
    return packed.to(torch.uint8).view(-1)[: uint_nbytes(count, bits)].clone()


def unpack_uint(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack_uint`: (ceil(numel * bits / 8),) uint8 -> (numel,) uint8."""
    groups = torch.zeros((numel + 7) // 8 * bits, dtype=torch.int64, device=packed.device)
    groups[: packed.numel()] = packed
    shifts = torch.arange(8, device=packed.device)
    words = (groups.view(-1, bits) << (shifts[:bits] * 8)).sum(1)
    codes = (words[:, None] >> (shifts * bits)) & (2**bits - 1)
    return codes.to(torch.uint8).view(-1)[:numel].clone()


def _rows(x: Tensor, block: int) -> list[Tensor]:
    """Views of the flat `x`: the full blocks as (blocks, block) and the tail as (1, length), where there are any."""
    full, length, tail = split_blocks(x.numel(), block)
    head = x[: full * length].view(full, length) if full else None
    rest = x[full * length :].view(1, tail) if tail else None
    return [part for part in (head, rest) if part is not None]


def _cat(parts: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    flat = [part.reshape(-1) for part in parts]
    return torch.cat(flat) if flat else like.new_empty(0, dtype=dtype)


def sparsify(
    x: Tensor, keep: int, block: int, bits: int, affine: bool, stochastic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the largest |x| of each block; see `ops` for the contract."""
    check_format(keep, block, bits)
    if bits:
        raise NotImplementedError("bits > 0")
    values, mask = _select(x, magnitude_keys(x), keep, block)
    return values, x.new_empty(0, dtype=torch.float16), mask


def _select(x: Tensor, keys: Tensor, keep: int, block: int) -> tuple[Tensor, Tensor]:
    check_format(keep, block)
    if keep == FULL:
        return x.clone(), x.new_empty(0, dtype=torch.uint8)
    values, marks = [], []
    for part, part_keys in zip(_rows(x, block), _rows(keys, block), strict=True):
        k = kept_in_block(part.shape[1], keep, block)
        mark = select_largest(part_keys, k)
        marks.append(mark)
        values.append(gather_kept(part, mark, k))
    return _cat(values, x, x.dtype), pack_uint(_cat(marks, x, torch.bool), 1)


def unsparsify(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    numel: int,
    dtype: torch.dtype,
    keep: int,
    block: int,
    bits: int,
    affine: bool,
) -> Tensor:
    """Inverse of `sparsify`, zeros where dropped; see `ops` for the contract."""
    check_format(keep, block, bits)
    if bits:
        raise NotImplementedError("bits > 0")
    if keep == FULL:
        return values.to(dtype, copy=True)
    marks = unpack_uint(mask, 1, numel).bool()
    parts, start = [], 0
    for mark in _rows(marks, block):
        k = kept_in_block(mark.shape[1], keep, block)
        count = mark.shape[0] * k
        parts.append(scatter_kept(values[start : start + count].view(mark.shape[0], k), mark))
        start += count
    return _cat(parts, values, values.dtype).to(dtype)


def sample(x: Tensor, keep: int, block: int, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keeps a uniform random choice of exactly k per block, scaled by n / k; see `ops` for the contract."""
    seed = draw_seed(x.device) if seed is None else seed
    values, mask = _select(x, random_keys(seed, x.numel()), keep, block)
    start = 0
    work = values.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    for part in _rows(x, block):
        k = kept_in_block(part.shape[1], keep, block)
        if k:
            work[start : start + part.shape[0] * k] *= part.shape[1] / k
        start += part.shape[0] * k
    return work.to(x.dtype), mask
