"""One-bit slopes: C and PyTorch give the same bits, whatever the values and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropit_fx.kernels import masks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = [0.0, -0.0, 1.0, 6.0, -0.3, 1e-45, torch.inf, -torch.inf, torch.nan]
BOUNDS = [(0.0, None), (0.0, 6.0), (-0.3, 0.8), (None, 1.0), (None, None)]


def values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * 4
    at = torch.randint(0, 3, (numel,), generator=generator) == 0
    odd = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (numel,), generator=generator)]
    return torch.where(at, odd, x).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    numel=st.integers(0, 70) | st.sampled_from([65535, 65536, 131073]),
    dtype=st.sampled_from(DTYPES),
    bounds=st.sampled_from(BOUNDS),
    off=st.sampled_from([0.0, 0.01, -1.0]),
    seed=st.integers(0, 99),
)
def test_both_implementations_give_the_same_bits(
    numel: int, dtype: torch.dtype, bounds: Any, off: float, seed: int
) -> None:
    x, grad = values(numel, dtype, seed), values(numel, dtype, seed + 100)
    bits = torch.ops.dropit.pack_between(x, *bounds)
    assert torch.equal(bits, masks.pack_between_reference(x, *bounds))
    out = torch.ops.dropit.apply_mask(bits, grad, off)
    expected = masks.apply_mask_reference(bits, grad, off)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_a_set_bit_is_strictly_between_and_nan() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0, torch.inf, torch.nan, 5.9])
    bits = torch.ops.dropit.pack_between(x, 0.0, 6.0)
    assert bits.tolist() == [0b11000100]
    assert torch.ops.dropit.pack_between(x, 0.0, None).tolist() == [0b11111100]


def test_where_the_bit_is_not_set_an_infinite_gradient_is_stopped() -> None:
    bits = torch.tensor([0b01], dtype=torch.uint8)
    grad = torch.tensor([torch.inf, torch.nan])
    assert torch.ops.dropit.apply_mask(bits, grad, 0.0).tolist() == [torch.inf, 0.0]


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes are no mask of 3 elements"):
        torch.ops.dropit.apply_mask(torch.zeros(2, dtype=torch.uint8), torch.zeros(3), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(77).to(dtype)  # opcheck takes NaN for different from itself
    torch.library.opcheck(torch.ops.dropit.pack_between.default, (x, 0.0, None))
    bits = torch.ops.dropit.pack_between(x, 0.0, None)
    torch.library.opcheck(torch.ops.dropit.apply_mask.default, (bits, x, 0.01))
