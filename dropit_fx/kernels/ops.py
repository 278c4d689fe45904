"""The ops of the packed format, in namespace `dropit`: schemas, and what runs where.

`x` is 1-D. `keep` counts kept elements per 10000, `block` is in elements (0: the whole tensor),
`bits` is 0 (values as they are) or 1..8, `layout` is the spacing of the levels: 0 symmetric, 1
affine, 2 uniform (see `coder`). The `_channels` ops pack what `mean` and `inverse` (float32, one a
channel) standardise: run r of `inner` elements is of channel r % C. Output shapes follow from input
shapes and these integers alone: see `format`. No op has a gradient: they are called inside an
`autograd.Function`, which does the differentiation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropit_fx.kernels import cpu, reference
from dropit_fx.kernels.dispatch import define
from dropit_fx.kernels.format import Format, check_borders, check_levels, uint_nbytes


def _fake_parts(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    form: Format = rest[-1]
    return form.buffers(x)


def _fake_sample(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    values, _, mask = form.buffers(x)
    return values, mask


def _fake_dense(values: Tensor, *rest: Any) -> Tensor:
    *_, numel, dtype, _ = rest
    return values.new_empty(numel, dtype=dtype)


def _fake_codes(x: Tensor, bits: int) -> Tensor:
    return x.new_empty(uint_nbytes(x.numel(), bits), dtype=torch.uint8)


def _fake_steps(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    check_borders(x.dtype, borders, bits)
    return _fake_codes(x, bits)


def _fake_levels(
    packed: Tensor, levels: Sequence[float], bits: int, numel: int, dtype: torch.dtype
) -> Tensor:
    check_levels(packed, levels, bits, dtype)
    return packed.new_empty(numel, dtype=dtype)


define(
    "sparsify(Tensor x, int keep, int block, int bits, int layout, bool stochastic)"
    " -> (Tensor values, Tensor scale, Tensor mask)",
    reference.sparsify,
    _fake_parts,
    cpu.sparsify,
)
define(
    "unsparsify(Tensor values, Tensor scale, Tensor mask, SymInt numel, ScalarType dtype,"
    " int keep, int block, int bits, int layout) -> Tensor",
    reference.unsparsify,
    _fake_dense,
    cpu.unsparsify,
)
define(
    "sparsify_channels(Tensor x, Tensor mean, Tensor inverse, SymInt inner, int keep, int block,"
    " int bits, int layout, bool stochastic) -> (Tensor values, Tensor scale, Tensor mask)",
    reference.sparsify_channels,
    _fake_parts,
    cpu.sparsify_channels,
)
define(
    "unsparsify_channels(Tensor values, Tensor scale, Tensor mask, Tensor mean, Tensor deviation,"
    " SymInt inner, SymInt numel, ScalarType dtype, int keep, int block, int bits, int layout)"
    " -> Tensor",
    reference.unsparsify_channels,
    _fake_dense,
    cpu.unsparsify_channels,
)
define(
    "sample(Tensor x, int keep, int block) -> (Tensor values, Tensor mask)",
    reference.sample,
    _fake_sample,
    cpu.sample,
    tags=(torch.Tag.nondeterministic_seeded,),
)
define("pack_uint(Tensor x, int bits) -> Tensor", reference.pack_uint, _fake_codes, cpu.pack_uint)
define(
    "unpack_uint(Tensor packed, int bits, SymInt numel) -> Tensor",
    reference.unpack_uint,
    lambda packed, bits, numel: packed.new_empty(numel, dtype=torch.uint8),
    cpu.unpack_uint,
)
define(
    "encode_steps(Tensor x, float[] borders, int bits) -> Tensor",
    reference.encode_steps,
    _fake_steps,
    cpu.encode_steps,
)
define(
    "decode_steps(Tensor packed, float[] levels, int bits, SymInt numel, ScalarType dtype)"
    " -> Tensor",
    reference.decode_steps,
    _fake_levels,
    cpu.decode_steps,
)
