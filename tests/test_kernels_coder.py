"""The value coder: what a decoded value may differ by, and what it must never lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropit_fx import kernels

OPS = torch.ops.dropit
BITS = range(1, 9)
FORMATS = [(bits, affine) for bits in BITS for affine in (False, True)]


def roundtrip(
    x: torch.Tensor, keep: int, block: int, bits: int, affine: bool, stochastic: bool = False
) -> torch.Tensor:
    packed = OPS.sparsify(x, keep, block, bits, affine, stochastic)
    return OPS.unsparsify(*packed, x.numel(), x.dtype, keep, block, bits, affine)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 3000),
    st.sampled_from([0, 1, 1000, 3086, 10000]),
    st.sampled_from([0, 8, 256, 1024]),
    st.integers(0, 8),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_predicted_bytes_are_measured_bytes(
    n: int, keep: int, block: int, bits: int, affine: bool, dtype: torch.dtype
) -> None:
    x = torch.ones(n, dtype=dtype)
    packed = OPS.sparsify(x, keep, block, bits, affine, False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    predicted = kernels.packed_nbytes(n, keep, block, bits, affine, dtype.itemsize)
    assert sum(storages.values()) == predicted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("bits", "affine"), FORMATS)
def test_each_value_becomes_a_neighbouring_level(
    bits: int, affine: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits)
    x = torch.distributions.StudentT(3.0).sample((4096,)).to(dtype)
    y = roundtrip(x, 10000, 512, bits, affine).double().view(-1, 512)
    rows = x.double().view(-1, 512)
    if affine:
        low = rows.amin(1, keepdim=True)
        before, after, count = rows - low, y - low, 2**bits
    else:
        assert torch.equal(y.sign(), rows.sign())
        before, after, count = rows.abs(), y.abs(), 2 ** (bits - 1)
    if affine or bits > 3:  # at most half a step of the square root, and the bfloat16 of the ends
        step = (before.amax(1, keepdim=True).sqrt() - before.amin(1, keepdim=True).sqrt()) / (
            count - 1
        )
        slack = before.amax(1, keepdim=True).sqrt() / 128
        if affine:  # the base is a bfloat16 below the minimum
            slack = slack + (low.abs() / 128).sqrt()
        assert ((before.sqrt() - after.clamp(min=0).sqrt()).abs() <= step / 2 + slack).all()
    else:  # cells in order, each with a level inside it, and the projection kept
        order = before.argsort(1)
        assert (after.gather(1, order).diff(dim=1) >= 0).all()
        assert (after.gather(1, order).diff(dim=1) > 0).sum(1).max() < count
        ratio = (before * after).sum(1) / (before * before).sum(1)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=5e-3)


@pytest.mark.parametrize("bits", range(4, 9))
@pytest.mark.parametrize("affine", [False, True])
def test_the_largest_value_is_not_shrunk(bits: int, affine: bool) -> None:
    x = torch.cat([torch.linspace(0, 1, 1023), torch.tensor([500.0])])
    assert roundtrip(x, 10000, 1024, bits, affine)[-1] == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
def test_stochastic_rounding_is_unbiased(bits: int, affine: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(64) * 3
    draws = torch.stack([roundtrip(x, 10000, 64, bits, affine, True) for _ in range(1500)])
    error = (draws.double().mean(0) - x.double()).abs()
    rare = 8 / 1500 * x.abs().max()  # a step that 1500 draws may never have taken
    assert (error <= 5 * draws.double().std(0) / 1500**0.5 + rare).all()
    assert draws.std(0).max() > 0


@pytest.mark.parametrize("bits", [3, 4])
def test_stochastic_rounding_follows_torch_seed_also_compiled(bits: int) -> None:
    x = torch.randn(3000)

    def draw() -> torch.Tensor:
        return roundtrip(x, 5000, 256, bits, False, True)

    torch.manual_seed(3)
    eager = [draw(), draw()]
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    again = [compiled(), compiled()]
    assert not torch.equal(eager[0], eager[1])
    assert torch.equal(eager[0], again[0])
    assert torch.equal(eager[1], again[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("bits", "affine"), FORMATS)
def test_a_block_with_nan_or_inf_decodes_to_nan_and_no_other_does(
    bits: int, affine: bool, stochastic: bool, value: float
) -> None:
    x = torch.randn(96)
    x[40] = value
    y = roundtrip(x, 5000, 32, bits, affine, stochastic)
    assert y[32:64].isnan().sum() == 16
    assert y[40].isnan()
    assert y[:32].isfinite().all()
    assert y[64:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("bits", "affine"), FORMATS)
def test_finite_extremes_stay_finite(
    bits: int, affine: bool, stochastic: bool, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    for edge in ([info.max / 4], [tiny, tiny / 2, -tiny / 4], [0.0], [-0.0, 0.0], [info.max, 0.0]):
        x = torch.tensor(edge, dtype=dtype).repeat(16)
        assert roundtrip(x, 10000, 8, bits, affine, stochastic).isfinite().all()
    zeros = torch.zeros(20, dtype=dtype)
    assert torch.equal(roundtrip(zeros, 5000, 8, bits, affine, stochastic), zeros)


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
def test_opcheck(bits: int, affine: bool) -> None:
    x = torch.randn(300)
    args = (5000, 64, bits, affine)
    tests = ("test_schema", "test_faketensor")  # the slow rest: test_kernels.py
    torch.library.opcheck(OPS.sparsify.default, (x, *args, False), test_utils=tests)
    packed = OPS.sparsify(x, *args, False)
    back = (*packed, 300, torch.float32, *args)
    torch.library.opcheck(OPS.unsparsify.default, back, test_utils=tests)
