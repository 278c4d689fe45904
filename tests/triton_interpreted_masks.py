"""Compares the kernels of masks and windows, run by Triton's interpreter, with PyTorch; a script.

The interpreter is chosen when triton is imported, so this needs a process of its own.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from kernel_cases import assert_same_bits

from dropit_fx.kernels import masks, windows
from dropit_fx.kernels.triton import masks as triton_masks
from dropit_fx.kernels.triton import windows as triton_windows

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 9e-41, 2e-38, 6e-8, 3e38, math.inf, -math.inf, math.nan]
# a bound that its dtype rounds up, one that it rounds down, one beyond float16, subnormal ones
BOUNDS = [
    *((0.0, None), (0.0, 6.0), (None, 1.0), (None, None)),
    *((0.01, 0.7), (-0.3, 70000.0), (1e-45, 1e-40)),
]
OFF = (0.0, -0.0, 0.01, -1.0, 1e30, math.nan)


def values(numel: int, bounds: tuple[float | None, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, and in every second place what is special here, bounds among them."""
    x = torch.randn(numel) * 4
    odd = torch.tensor([*SPECIAL, *(b for b in bounds if b is not None)])
    x[::2] = odd.repeat(numel)[: (numel + 1) // 2] if numel else x
    return x.to(dtype)


def compare_masks(dtype: torch.dtype) -> int:
    count = 0
    for numel in (0, 1, 7, 8, 9, 255, 4096 + 3):
        for i, bounds in enumerate(BOUNDS):
            x = values(numel, bounds, dtype)
            bits = triton_masks.pack_between(x, *bounds)
            assert_same_bits(bits, masks.pack_between_reference(x, *bounds))
            grad = values(numel, (), dtype)[torch.randperm(numel)]
            for off in OFF if i == 0 else OFF[2:3]:
                out = triton_masks.apply_mask(bits, grad, off)
                assert_same_bits(out, masks.apply_mask_reference(bits, grad, off))
            count += 1
    grad = torch.randn(6, 5).to(dtype)[:, ::2].T.reshape(-1)[::2]  # with gaps
    bits = torch.tensor([0b10110101], dtype=torch.uint8)
    out = triton_masks.apply_mask(bits, grad[:8], 0.0)
    assert_same_bits(out, masks.apply_mask_reference(bits, grad[:8], 0.0))
    return count


# shape, kernel, stride, padding, dilation, ceil_mode
POOLS = [
    ((2, 3, 9, 9), [3, 3], [2, 2], [1, 1], [1, 1], False),
    ((2, 3, 41, 37), [3, 2], [2, 1], [1, 0], [2, 3], True),  # more than one program
    ((3, 7, 5), [2, 2], [2, 2], [0, 0], [1, 1], True),  # no batch
    ((2, 3, 1, 40), [1, 5], [1, 2], [0, 2], [1, 2], True),  # 1-D
    ((1, 2, 40, 40), [16, 16], [3, 3], [8, 8], [1, 1], False),  # 256 cells
    ((1, 2, 6, 7, 8), [2, 3, 2], [1, 2, 3], [1, 1, 0], [2, 1, 1], True),
    ((4, 5, 1, 1), [1, 1], [1, 1], [0, 0], [1, 1], False),
    ((0, 3, 9, 9), [3, 3], [2, 2], [1, 1], [1, 1], False),
]


def compare_windows() -> int:
    count = 0
    aten, narrow = torch.ops.aten, triton_windows.geometry

    def wide(*args: Any) -> dict[str, Any]:
        return narrow(*args) | {"WIDE": True}

    for shape, kernel, stride, padding, dilation, ceil_mode in POOLS:
        dims = len(kernel)
        pool = aten.max_pool3d_with_indices if dims == 3 else aten.max_pool2d_with_indices
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        inputs = [torch.randn(shape)]
        if len(shape) == dims + 2:
            inputs.append(inputs[0].to(memory_format=last))
        for x in inputs:
            indices = pool(x, kernel, stride, padding, dilation, ceil_mode)[1]
            call = (list(x.shape[-dims:]), kernel, stride, padding, dilation)
            codes = windows.encode_window_reference(indices, *call)
            for triton_windows.geometry in (narrow, wide):
                encoded = triton_windows.encode_window(indices, *call)
                decoded = triton_windows.decode_window(codes, *call)
                assert torch.equal(encoded, codes)
                assert torch.equal(decoded, indices)
                assert encoded.stride() == decoded.stride() == codes.stride()
                count += 1
    # an order that is neither of the two that the kernels know
    odd = aten.max_pool2d_with_indices(torch.randn(2, 3, 9, 9), [2, 2])[1].permute(1, 0, 2, 3)
    call = ([9, 9], [2, 2], [2, 2], [0, 0], [1, 1])
    codes = triton_windows.encode_window(odd, *call)
    assert codes.stride() == odd.stride()
    assert torch.equal(triton_windows.decode_window(codes, *call), odd)
    return count


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "windows":
        print(f"{compare_windows()} pools equal")
    else:
        print(f"{compare_masks(getattr(torch, sys.argv[1]))} masks equal")
