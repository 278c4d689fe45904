"""Compares the Triton kernels, run by Triton's interpreter, with the reference; a script.

The interpreter is chosen when triton is imported, so this needs a process of its own.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from kernel_cases import KINDS, assert_same_bits, make

from dropit_fx.kernels import Format, reference
from dropit_fx.kernels import triton as kernels

BITS_LAYOUT_STOCHASTIC = [
    *((bits, 0, False) for bits in (0, 1, 2, 3, 4, 8)),
    *((bits, 1, False) for bits in (1, 5)),
    *((bits, 2, False) for bits in (8, 4, 1)),
    *((bits, 0, True) for bits in (1, 2, 3, 6)),
    (4, 1, True),
    (4, 2, True),
]
SPECIAL = [  # of two blocks, of which the first has three
    [torch.nan, torch.inf, -torch.inf, torch.inf],
    [torch.inf, torch.inf, torch.inf, -torch.inf],
    [-torch.inf, -torch.inf, -torch.inf, torch.nan],
    [-torch.inf, torch.inf, torch.inf, -torch.inf],
]


def main(dtype: torch.dtype) -> None:
    count = 0
    for i, (bits, layout, stochastic) in enumerate(BITS_LAYOUT_STOCHASTIC):
        if dtype != torch.float32 and bits in (1, 3, 5, 6):
            continue  # beyond float32 only the conversions differ
        x = make(KINDS[(i + dtype.itemsize) % len(KINDS)], 110, dtype, seed=i)
        if i % 2:  # in the tail too
            some = SPECIAL[i // 2 % len(SPECIAL)]
            x[torch.tensor([3, 40, 41, 100])] = torch.tensor(some).to(dtype)
        seed = torch.tensor([-(3**i) * 1_000_003])
        keep = (3333, 10000, 50)[i % 3]
        form = Format(keep, 96, bits, layout, stochastic)  # not a power of two, with a tail
        packed = kernels.sparsify(x, form, seed)
        expected = reference.sparsify(x, form, seed)
        for left, right in zip(packed, expected, strict=True):
            assert_same_bits(left, right)
        back = (*expected, 110, dtype, form)
        assert_same_bits(kernels.unsparsify(*back), reference.unsparsify(*back))
        count += 1
    mean, inverse = torch.randn(5), torch.rand(5) + 0.1
    for inner, numbers in ((1, (10000, 96, 6, 2)), (11, (10000, 64, 5, 0)), (2, (3333, 96, 4, 0))):
        form = Format(*numbers)
        channels = (x, mean, inverse, inner, form, seed)
        packed = kernels.sparsify_channels(*channels)
        for left, right in zip(packed, reference.sparsify_channels(*channels), strict=True):
            assert_same_bits(left, right)
        back = (*packed, mean, 1 / inverse, inner, 110, dtype, form)
        assert_same_bits(kernels.unsparsify_channels(*back), reference.unsparsify_channels(*back))
    form = Format(2500, 64)
    for left, right in zip(
        kernels.sample(x, form, seed), reference.sample(x, form, seed), strict=True
    ):
        assert_same_bits(left, right)
    for bits in range(1, 9) if dtype == torch.float32 else ():
        codes = torch.randint(0, 2**bits, (2 * bits + 2049,), dtype=torch.uint8)
        packed_codes = kernels.pack_uint(codes, bits)
        assert_same_bits(packed_codes, reference.pack_uint(codes, bits))
        assert_same_bits(kernels.unpack_uint(packed_codes, bits, codes.numel()), codes)
    for bits, numel in ((1, 9), (3, 110), (4, 2100)):
        x = make(KINDS[bits], numel, dtype, seed=bits)
        borders = [-1.0, -0.0, 0.1, 1e-40, 1.0, 2.5, float("inf")][: 2**bits - 1]
        borders.sort()
        steps = kernels.encode_steps(x, borders, bits)
        assert_same_bits(steps, reference.encode_steps(x, borders, bits))
        back = (steps, [-0.0, *borders], bits, numel, dtype)
        assert_same_bits(kernels.decode_steps(*back), reference.decode_steps(*back))
    print(f"{count} formats equal")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
