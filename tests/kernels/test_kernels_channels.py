"""Mean and deviation of each channel, as a kernel makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dropit_fx.kernels import channels
from dropit_fx.runtime.copies import standardise
from dropit_fx.runtime.tensor_spec import flatten, memory_order

pytestmark = pytest.mark.skipif(channels.library() is None, reason="no C kernels here")
SHAPES = [(64, 16, 12, 12), (3, 5, 7), (1, 1, 1), (5, 3), (2, 33, 3, 3), (2, 2, 100, 90), (700, 70)]


def _found(x: Tensor) -> tuple[Tensor, Tensor]:
    order, inner = memory_order(x), 1
    for d in order[order.index(1) + 1 :]:
        inner *= x.shape[d]
    return channels.statistics(x, flatten(x), inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_statistics_are_those_of_double_precision(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool
) -> None:
    x = (torch.randn(shape) * 3 + 100).to(dtype)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    mean, inverse = _found(x)
    rows = x.double().transpose(0, 1).reshape(shape[1], -1)
    assert mean.dtype == inverse.dtype == torch.float32
    torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-6, atol=0)
    variance = rows.var(1, unbiased=False)
    wanted = (variance + channels.TINY).rsqrt()
    some = variance > 0
    torch.testing.assert_close(inverse.double()[some], wanted[some], rtol=1e-4, atol=0)


def test_a_constant_channel_has_no_deviation_but_eps() -> None:
    x = torch.full((4, 2, 50), 1234.5)
    mean, inverse = _found(x)
    assert torch.equal(mean, torch.full((2,), 1234.5))
    torch.testing.assert_close(inverse, standardise(x)[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_channel_that_is_not_finite_stays_as_it_is(value: float) -> None:
    x = torch.randn(4, 3, 50)
    x[1, 1, 7] = value
    (mean, inverse), (out, *other) = _found(x), standardise(x)
    for found in (mean, inverse), other:
        assert found[0][1] == 0
        assert found[1][1] == 1
    assert torch.equal(out[:, 1].nan_to_num(), x[:, 1].nan_to_num())
    whole = standardise(x[:, [0, 2]])[1:]
    torch.testing.assert_close((mean[[0, 2]], inverse[[0, 2]]), whole)


@pytest.mark.parametrize("shape", [(8, 6, 40, 40), (90_000, 6)])
def test_the_number_of_threads_changes_nothing(shape: tuple[int, ...]) -> None:
    x, found = torch.randn(shape), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(_found(x))
    torch.set_num_threads(before)
    for mean, inverse in found[1:]:
        assert torch.equal(mean, found[0][0])
        assert torch.equal(inverse, found[0][1])
