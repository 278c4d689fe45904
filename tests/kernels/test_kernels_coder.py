"""The value coder: what a decoded value may differ by, and what it must never lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropit_fx import kernels
from dropit_fx.codecs.mink import QUANT

OPS = torch.ops.dropit
BITS = range(1, 9)
FORMATS = [(bits, layout) for bits in BITS for layout in range(len(kernels.SPACINGS))]


def roundtrip(
    x: torch.Tensor, keep: int, block: int, bits: int, layout: int, stochastic: bool = False
) -> torch.Tensor:
    packed = OPS.sparsify(x, keep, block, bits, layout, stochastic)
    return OPS.unsparsify(*packed, x.numel(), x.dtype, keep, block, bits, layout)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 3000),
    st.sampled_from([0, 1, 1000, 3086, 10000]),
    st.sampled_from([0, 8, 256, 1024]),
    st.integers(0, 8),
    st.integers(0, 2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_predicted_bytes_are_measured_bytes(
    n: int, keep: int, block: int, bits: int, layout: int, dtype: torch.dtype
) -> None:
    x = torch.ones(n, dtype=dtype)
    packed = OPS.sparsify(x, keep, block, bits, layout, False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    predicted = kernels.Format(keep, block, bits, layout).nbytes(n, dtype.itemsize)
    assert sum(storages.values()) == predicted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("bits", "layout"), [f for f in FORMATS if f[1] != kernels.UNIFORM])
def test_each_value_becomes_a_neighbouring_level(
    bits: int, layout: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits)
    x = torch.distributions.StudentT(3.0).sample((4096,)).to(dtype)
    y = roundtrip(x, 10000, 512, bits, layout).double().view(-1, 512)
    rows = x.double().view(-1, 512)
    if layout == kernels.AFFINE:
        low = rows.amin(1, keepdim=True)
        before, after, count = rows - low, y - low, 2**bits
    else:
        assert torch.equal(y.sign(), rows.sign())
        before, after, count = rows.abs(), y.abs(), 2 ** (bits - 1)
    if (
        layout == kernels.AFFINE or bits > 3
    ):  # at most half a step of the square root, and the bfloat16 of the ends
        step = (before.amax(1, keepdim=True).sqrt() - before.amin(1, keepdim=True).sqrt()) / (
            count - 1
        )
        slack = before.amax(1, keepdim=True).sqrt() / 128
        if layout == kernels.AFFINE:  # the base is a bfloat16 below the minimum
            slack = slack + (low.abs() / 128).sqrt()
        assert ((before.sqrt() - after.clamp(min=0).sqrt()).abs() <= step / 2 + slack).all()
    else:  # cells in order, each with a level inside it, and the projection kept
        order = before.argsort(1)
        assert (after.gather(1, order).diff(dim=1) >= 0).all()
        assert (after.gather(1, order).diff(dim=1) > 0).sum(1).max() < count
        ratio = (before * after).sum(1) / (before * before).sum(1)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=5e-3)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=24)
    | st.lists(st.floats(2.9375, 3.0625, width=32), min_size=1, max_size=24)
    | st.lists(st.floats(-(2.0**-126), 2.0**-126, width=32), min_size=1, max_size=24),
    st.integers(1, 8),
    st.booleans(),
)
def test_uniform_levels_are_equal_steps_within_the_range(
    values: list[float], bits: int, stochastic: bool
) -> None:
    x = torch.tensor(values)
    form = (10000, 8, bits, kernels.UNIFORM)
    packed = OPS.sparsify(x, *form, stochastic)
    y = OPS.unsparsify(*packed, x.numel(), x.dtype, *form).double()
    ends = packed[1].view(-1, 2).repeat_interleave(8, 0)[: x.numel()].double()
    base, top = ends[:, 0], ends[:, 1]
    for start in range(0, x.numel(), 8):
        block = x[start : start + 8]
        if base[start].isnan():  # a range that float32 does not hold
            assert block.max().double() - block.min().double() > 3.3e38
            continue
        low, high = block.double().aminmax()
        largest = torch.finfo(torch.bfloat16).max
        for end, value, beyond in ((base, low, -largest), (top, high, largest)):
            inside = value.clamp(-largest, largest)
            assert (end[start] - inside) * beyond >= 0
            assert abs(end[start] - inside) <= max(abs(inside) / 128, 2.0**-133)
    finite = ~base.isnan()
    x, y, base, top = (t[finite].double() for t in (x, y, base, top))
    step = (top - base) / (2**bits - 1)
    rounding = torch.maximum(base.abs(), top.abs()) * 2.0**-22 + 2.0**-141
    within = step * 1.001 if stochastic else step * 0.501
    x = x.clamp(base, top)  # bfloat16 ends before float32 does
    assert ((y - x).abs() <= within + rounding).all()
    assert ((base <= y) & (y <= top)).all()


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_uniform_levels_have_the_mean_and_spread_of_a_fair_draw(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(64) * 3 + 1
    form = (10000, 64, bits, kernels.UNIFORM)
    packed = OPS.sparsify(x.repeat(4000), *form, True)
    base, top = packed[1][:2].double()
    y = OPS.unsparsify(*packed, 64 * 4000, x.dtype, *form).view(4000, 64).double()
    step = (top - base) / (2**bits - 1)
    up = ((x.double() - base) / step) % 1
    deviation = step * (up * (1 - up)).sqrt()
    rounding = 2.0**-20 * torch.maximum(base.abs(), top.abs())
    error = y.mean(0) - x.double()
    assert (error.abs() <= 5 * deviation / 4000**0.5 + step * 1e-3 + rounding).all()
    torch.testing.assert_close(y.std(0), deviation, rtol=0.15, atol=0.03 * step.item())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_uniform_levels_of_equal_values_are_exact(bits: int, stochastic: bool) -> None:
    for value in (0.0, 1.0, -2.5, 1e-40, -3e38):
        x = torch.full((17,), value).bfloat16().float()  # its tail is one element
        assert torch.equal(roundtrip(x, 10000, 8, bits, kernels.UNIFORM, stochastic), x)
    x = torch.randn(33).bfloat16()
    kept = roundtrip(x, 1250, 8, bits, kernels.UNIFORM, stochastic)  # one of each eight
    assert torch.equal(kept[kept != 0], x[kept != 0])
    assert (kept != 0).sum() == 4


@pytest.mark.parametrize("layout", range(3))
def test_the_codec_quant_names_the_layouts(layout: int) -> None:
    x = torch.randn(1000)
    options = {option.name: option.default for option in QUANT.options}
    options["range"] = kernels.SPACINGS[layout]
    packed = QUANT.pack(x, options)
    back = QUANT.unpack(packed, options, 1000, x.dtype)
    assert torch.equal(back, roundtrip(x, 10000, options["block"], options["bits"], layout))
    assert sum(part.nbytes for part in packed) == QUANT.nbytes(1000, x.dtype, options)


@pytest.mark.parametrize("bits", range(4, 9))
@pytest.mark.parametrize("layout", range(3))
def test_the_largest_value_is_not_shrunk(bits: int, layout: int) -> None:
    x = torch.cat([torch.linspace(0, 1, 1023), torch.tensor([500.0])])
    assert roundtrip(x, 10000, 1024, bits, layout)[-1] == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize(("bits", "layout"), FORMATS)
def test_stochastic_rounding_is_unbiased(bits: int, layout: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(64) * 3
    draws = torch.stack([roundtrip(x, 10000, 64, bits, layout, True) for _ in range(1500)])
    error = (draws.double().mean(0) - x.double()).abs()
    rare = 8 / 1500 * x.abs().max()  # a step that 1500 draws may never have taken
    assert (error <= 5 * draws.double().std(0) / 1500**0.5 + rare).all()
    assert draws.std(0).max() > 0


@pytest.mark.parametrize("bits", [3, 4])
def test_stochastic_rounding_follows_torch_seed_also_compiled(bits: int) -> None:
    x = torch.randn(3000)

    def draw() -> torch.Tensor:
        return roundtrip(x, 5000, 256, bits, kernels.SYMMETRIC, True)

    torch.manual_seed(3)
    eager = [draw(), draw()]
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    again = [compiled(), compiled()]
    assert not torch.equal(eager[0], eager[1])
    assert torch.equal(eager[0], again[0])
    assert torch.equal(eager[1], again[1])


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [
    [torch.nan],
    [torch.inf],
    [-torch.inf],
    [torch.inf, -torch.inf],
    [-torch.inf, torch.nan, torch.inf],
]


@pytest.mark.parametrize("values", SPECIAL, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("keep", [5000, 10000])
@pytest.mark.parametrize(("bits", "layout"), FORMATS)
def test_nan_and_infinity_are_read_back_as_what_they_were(
    bits: int, layout: int, keep: int, stochastic: bool, values: list[float]
) -> None:
    """In a block with NaN infinity is NaN too; so is what one bit has of several kinds."""
    dtype = DTYPES[bits % len(DTYPES)]
    x = torch.randn(128).to(dtype)
    given = torch.tensor(values).to(dtype)
    x[40 : 40 + len(values)] = given
    x[64:96] = given.repeat(32)[:32]  # a block of nothing else
    torch.manual_seed(1)
    y = roundtrip(x, keep, 32, bits, layout, stochastic)
    lost = given.isnan().any() or (bits == 1 and len(values) > 1)
    expected = torch.full_like(given, torch.nan) if lost else given
    torch.testing.assert_close(
        y[40 : 40 + len(values)], expected, rtol=0.0, atol=0.0, equal_nan=True
    )
    y[40 : 40 + len(values)] = 0.0
    assert not (y[64:96].isfinite() & (y[64:96] != 0)).any()  # 0: dropped
    assert torch.cat([y[:64], y[96:]]).isfinite().all()


@pytest.mark.parametrize("kind", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("bits", "layout"), [f for f in FORMATS if f[0] > 3])
def test_what_stands_beside_is_not_grossly_wrong(
    bits: int, layout: int, stochastic: bool, kind: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(256)
    x = x.abs() if layout == 1 else x
    x[7] = kind
    y = roundtrip(x, 10000, 64, bits, layout, stochastic)
    rest = torch.arange(256) != 7
    assert (y - x)[rest].norm() < 3 * 2.0**-bits * x[rest].norm()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 0.3])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("kind", [torch.nan, -torch.inf])
@pytest.mark.parametrize(("bits", "layout"), [f for f in FORMATS if f[0] > 1])
def test_one_value_beside_what_is_not_finite_is_read_as_it_is(
    bits: int, layout: int, kind: float, stochastic: bool, value: float
) -> None:
    """To a bfloat16 number, of which the last bit says what kind it stands beside."""
    x = torch.full((32,), value)
    x[5] = kind
    y = roundtrip(x, 10000, 32, bits, layout, stochastic)
    torch.testing.assert_close(y, x, rtol=2.0**-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("bits", "layout"), [f for f in FORMATS if f[0] > 1])
def test_beside_nan_one_level_is_missing(bits: int, layout: int) -> None:
    x = torch.randn(256)
    x = torch.cat([x, -x])
    alone = roundtrip(x, 10000, 512, bits, layout)
    beside = roundtrip(torch.cat([x, torch.full((8,), torch.nan)]), 10000, 520, bits, layout)[:512]
    if layout == 0 and bits <= 3:  # a codebook: half of the levels
        assert beside.unique().numel() == 2 ** (bits - 1)
        assert torch.equal(beside.sign(), x.sign())
        torch.testing.assert_close((x * beside).sum(), (x * x).sum(), rtol=0.01, atol=0.0)
    else:
        missing, nearest = (t.amin() if layout == 0 else t.amax() for t in (alone, beside))
        there = alone != missing
        assert (beside[~there] == nearest).all()
        step = 2 * (x.amax() - x.amin()).item() * 2.0**-bits  # where the mark moves a tie
        torch.testing.assert_close(beside[there], alone[there], atol=step, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("bits", "layout"), FORMATS)
def test_finite_extremes_stay_finite(
    bits: int, layout: int, stochastic: bool, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    for edge in ([info.max / 4], [tiny, tiny / 2, -tiny / 4], [0.0], [-0.0, 0.0], [info.max, 0.0]):
        x = torch.tensor(edge, dtype=dtype).repeat(16)
        assert roundtrip(x, 10000, 8, bits, layout, stochastic).isfinite().all()
    zeros = torch.zeros(20, dtype=dtype)
    assert torch.equal(roundtrip(zeros, 5000, 8, bits, layout, stochastic), zeros)


@pytest.mark.parametrize(("bits", "layout"), FORMATS)
def test_opcheck(bits: int, layout: int) -> None:
    x = torch.randn(300)
    args = (5000, 64, bits, layout)
    tests = ("test_schema", "test_faketensor")  # the slow rest: test_kernels.py
    torch.library.opcheck(OPS.sparsify.default, (x, *args, False), test_utils=tests)
    packed = OPS.sparsify(x, *args, False)
    back = (*packed, 300, torch.float32, *args)
    torch.library.opcheck(OPS.unsparsify.default, back, test_utils=tests)
