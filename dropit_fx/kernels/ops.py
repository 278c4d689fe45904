"""The custom ops of namespace `dropit`: schemas, fake kernels, and which implementation runs where.

    dropit::sparsify(Tensor x, int keep, int block, int bits, int layout, bool stochastic)
        -> (Tensor values, Tensor scale, Tensor mask)
    dropit::unsparsify(Tensor values, Tensor scale, Tensor mask, SymInt numel, ScalarType dtype,
                       int keep, int block, int bits, int layout) -> Tensor
    dropit::sparsify_channels(Tensor x, Tensor mean, Tensor inverse, SymInt inner, int keep,
                              int block, int bits, int layout, bool stochastic)
        -> (Tensor values, Tensor scale, Tensor mask)
    dropit::unsparsify_channels(Tensor values, Tensor scale, Tensor mask, Tensor mean,
                                Tensor deviation, SymInt inner, SymInt numel, ScalarType dtype,
                                int keep, int block, int bits, int layout) -> Tensor
    dropit::sample(Tensor x, int keep, int block) -> (Tensor values, Tensor mask)
    dropit::pack_uint(Tensor x, int bits) -> Tensor
    dropit::unpack_uint(Tensor packed, int bits, SymInt numel) -> Tensor
    dropit::encode_steps(Tensor x, float[] borders, int bits) -> Tensor
    dropit::decode_steps(Tensor packed, float[] levels, int bits, SymInt numel, ScalarType dtype)
        -> Tensor

`x` is 1-D. `keep` counts kept elements per 10000, `block` is in elements (0: the whole tensor),
`bits` is 0 (values as they are) or 1..8, `layout` is that of the levels: 0 symmetric, 1 affine, 2
uniform (see `coder`). The `_channels` ops pack what `mean` and `inverse` (float32, one a channel)
standardise: run r of `inner` elements is of channel r % C. Output shapes follow from input shapes
and these integers alone: see module `layout`. No op has a gradient: they are called inside an
`autograd.Function`, which does the differentiation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropit_fx.kernels import cpu, reference
from dropit_fx.kernels.dispatch import on_cuda
from dropit_fx.kernels.format import (
    block_count,
    check_borders,
    check_format,
    check_levels,
    codes_nbytes,
    kept,
    mask_nbytes,
    scale_columns,
    uint_nbytes,
)

_SCHEMAS = {
    "sparsify": "(Tensor x, int keep, int block, int bits, int layout, bool stochastic)"
    " -> (Tensor values, Tensor scale, Tensor mask)",
    "unsparsify": "(Tensor values, Tensor scale, Tensor mask, SymInt numel, ScalarType dtype,"
    " int keep, int block, int bits, int layout) -> Tensor",
    "sparsify_channels": "(Tensor x, Tensor mean, Tensor inverse, SymInt inner, int keep,"
    " int block, int bits, int layout, bool stochastic)"
    " -> (Tensor values, Tensor scale, Tensor mask)",
    "unsparsify_channels": "(Tensor values, Tensor scale, Tensor mask, Tensor mean,"
    " Tensor deviation, SymInt inner, SymInt numel, ScalarType dtype, int keep, int block,"
    " int bits, int layout) -> Tensor",
    "sample": "(Tensor x, int keep, int block) -> (Tensor values, Tensor mask)",
    "pack_uint": "(Tensor x, int bits) -> Tensor",
    "unpack_uint": "(Tensor packed, int bits, SymInt numel) -> Tensor",
    "encode_steps": "(Tensor x, float[] borders, int bits) -> Tensor",
    "decode_steps": "(Tensor packed, float[] levels, int bits, SymInt numel, ScalarType dtype)"
    " -> Tensor",
}
_TAGS = {"sample": (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)}


for _name, _schema in _SCHEMAS.items():
    _tags = _TAGS.get(_name, (torch.Tag.pt2_compliant_tag,))
    torch.library.define(f"dropit::{_name}", _schema, tags=_tags)
    _plain = getattr(reference, _name)
    torch.library.impl(f"dropit::{_name}", "CompositeExplicitAutograd", _plain)
    if not _name.endswith("_channels"):  # on a CPU, batch norm's kernel standardises in less time
        torch.library.impl(f"dropit::{_name}", "CPU", getattr(cpu, _name))
    torch.library.impl(f"dropit::{_name}", "CUDA", on_cuda(_name, _plain))


@torch.library.register_fake("dropit::sparsify")
def _fake_sparsify(
    x: Tensor, keep: int, block: int, bits: int, layout: int, stochastic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_format(keep, block, bits, layout)
    n = x.numel()
    if bits:
        values = x.new_empty(codes_nbytes(n, keep, block, bits), dtype=torch.uint8)
    else:
        values = x.new_empty(kept(n, keep, block))
    columns = scale_columns(bits, layout)
    scale = x.new_empty(block_count(n, block) * columns if bits else 0, dtype=torch.bfloat16)
    return values, scale, x.new_empty(mask_nbytes(n, keep), dtype=torch.uint8)


@torch.library.register_fake("dropit::unsparsify")
def _(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    numel: int,
    dtype: torch.dtype,
    keep: int,
    block: int,
    bits: int,
    layout: int,
) -> Tensor:
    check_format(keep, block, bits, layout)
    return values.new_empty(numel, dtype=dtype)


@torch.library.register_fake("dropit::sparsify_channels")
def _(x: Tensor, mean: Tensor, inverse: Tensor, inner: int, *form: Any) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = _fake_sparsify(x, *form)
    return parts


@torch.library.register_fake("dropit::unsparsify_channels")
def _(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    mean: Tensor,
    deviation: Tensor,
    inner: int,
    numel: int,
    dtype: torch.dtype,
    *form: int,
) -> Tensor:
    check_format(*form)
    return values.new_empty(numel, dtype=dtype)


@torch.library.register_fake("dropit::sample")
def _(x: Tensor, keep: int, block: int) -> tuple[Tensor, Tensor]:
    check_format(keep, block)
    n = x.numel()
    return x.new_empty(kept(n, keep, block)), x.new_empty(mask_nbytes(n, keep), dtype=torch.uint8)


@torch.library.register_fake("dropit::pack_uint")
def _(x: Tensor, bits: int) -> Tensor:
    return x.new_empty(uint_nbytes(x.numel(), bits), dtype=torch.uint8)


@torch.library.register_fake("dropit::unpack_uint")
def _(packed: Tensor, bits: int, numel: int) -> Tensor:
    return packed.new_empty(numel, dtype=torch.uint8)


@torch.library.register_fake("dropit::encode_steps")
def _(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    check_borders(x.dtype, borders, bits)
    return x.new_empty(uint_nbytes(x.numel(), bits), dtype=torch.uint8)


@torch.library.register_fake("dropit::decode_steps")
def _(packed: Tensor, levels: Sequence[float], bits: int, numel: int, dtype: torch.dtype) -> Tensor:
    check_levels(packed, levels, bits, dtype)
    return packed.new_empty(numel, dtype=dtype)
