"""The kernel of attention's backward against autograd in double precision."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.kernels import attention
from dropit_fx.measure import peak_memory

needs_c = pytest.mark.skipif(attention.library() is None, reason="no C kernel runs here")
IMPLEMENTATIONS = [
    pytest.param(torch.ops.dropit.attention_backward, id="c", marks=needs_c),
    pytest.param(attention.attention_backward_reference, id="reference"),
]
SHAPES = [  # batch, heads, key heads, queries, keys, size
    (2, 3, 3, 53, 53, 20),
    (1, 4, 2, 7, 100, 64),
    (2, 2, 1, 97, 31, 8),
    (1, 1, 1, 1, 1, 1),
    (1, 2, 2, 48, 16, 32),
    (1, 1, 1, 130, 130, 17),
]


def operands(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """``grad, query, key, value``, in the memory order (batch, rows, heads, size)."""
    batch, heads, kv_heads, queries, keys, size = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = [(queries, heads)] * 2 + [(keys, kv_heads)] * 2
    return [torch.randn(batch, n, h, size, generator=draw).transpose(1, 2) for n, h in sizes]


def by_autograd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: Any
) -> tuple[Tensor, ...]:
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    return torch.autograd.grad(out, (q, k, v), grad.double())


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(run: Any, shape: tuple[int, ...], causal: bool) -> None:
    args = *operands(shape), None, causal, None
    assert_close(run(*args), by_autograd(*args))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bool", "added", "one row", "one column"])
def test_masks(run: Any, kind: str) -> None:
    shape = 2, 4, 2, 53, 40, 24
    mask = {
        "bool": torch.rand(2, 1, 53, 40) > 0.3,
        "added": torch.randn(53, 40),
        "one row": torch.randn(2, 4, 1, 40),
        "one column": torch.randn(1, 4, 53, 1),
    }[kind]
    args = *operands(shape), mask, False, 0.4
    assert_close(run(*args), by_autograd(*args))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_a_row_without_keys_gets_no_gradient(run: Any) -> None:
    grad, q, k, v = operands((1, 2, 2, 20, 33, 16))
    mask = torch.ones(20, 33, dtype=torch.bool)
    mask[5] = False
    got = run(grad, q, k, v, mask, False, None)
    assert torch.equal(got[0][:, :, 5], torch.zeros(1, 2, 16))
    rest = [i for i in range(20) if i != 5]
    without = by_autograd(grad[:, :, rest], q[:, :, rest], k, v, None, False, None)
    assert_close((got[0][:, :, rest], *got[1:]), without)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("operand", range(4))
def test_what_is_not_finite_stays_so(run: Any, bad: float, operand: int) -> None:
    args = operands((1, 1, 1, 20, 33, 16))
    args[operand][0, 0, 3, 2] = bad
    got = run(*args, None, False, None)
    assert not all(torch.isfinite(x).all() for x in got)


@needs_c
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_scores(size: float) -> None:
    """One key takes nearly everything: exponentials go down to zero."""
    grad, q, k, v = operands((1, 2, 2, 40, 60, 32))
    args = grad, q * size, k, v, None, False, None
    exact = by_autograd(*args)
    got = torch.ops.dropit.attention_backward(*args)
    plain = attention.attention_backward_reference(*args)
    for mine, other, wanted in zip(got, plain, exact, strict=True):
        assert (mine - wanted).norm() <= 1.5 * (other - wanted).norm()


@needs_c
def test_any_strides_and_number_of_threads() -> None:
    args = operands((2, 3, 3, 53, 40, 20))
    expected = torch.ops.dropit.attention_backward(*args, None, False, None)
    spread = [x.mT.contiguous().mT for x in args]  # the last dimension is not contiguous
    torch.set_num_threads(1)  # of several, which come back behind the test
    got = torch.ops.dropit.attention_backward(*spread, None, False, None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_c
def test_a_boolean_mask_is_there_once_more_in_float32() -> None:
    args = operands((2, 2, 2, 64, 64, 8))
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool).tril()
    peak = peak_memory(torch.ops.dropit.attention_backward, *args, mask, False, None)
    gradients = sum(x.nbytes for x in args[1:])
    assert gradients + 4 * mask.numel() <= peak < gradients + 4.5 * mask.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_in_pytorch(dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in operands((1, 2, 2, 9, 9, 8))]
    got = torch.ops.dropit.attention_backward(*args, None, True, None)
    expected = by_autograd(*args, None, True, None)
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine - other).norm() <= 0.02 * other.norm()


def test_its_fake_kernel_tells_the_truth() -> None:
    args = operands((2, 4, 2, 9, 7, 8))
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(
        torch.ops.dropit.attention_backward, (*args, None, True, None), test_utils=checks
    )


@needs_c
@pytest.mark.parametrize("empty", [(0, 2, 2, 3, 3, 4), (1, 2, 2, 0, 3, 4)])
def test_nothing_to_attend(empty: tuple[int, ...]) -> None:
    got = torch.ops.dropit.attention_backward(*operands(empty), None, False, None)
    assert [x.shape for x in got] == [x.shape for x in operands(empty)[1:]]
    assert all(not x.any() for x in got)
