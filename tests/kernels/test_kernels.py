"""The packed format: contracts of the ops of namespace `dropit`, against brute-force oracles."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropit_fx import kernels

OPS = torch.ops.dropit
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_SCALE = torch.empty(0)


def brute_force_kept(x: torch.Tensor, keep: int, block: int) -> list[int]:
    """Indices that a block-wise top-k keeps, by Python's sort: NaN, then magnitude, then index."""
    n = x.numel()
    block_or_all = block or max(n, 1)
    kept: list[int] = []
    for start in range(0, n, block_or_all):
        values = x[start : start + block_or_all].tolist()
        k = len(values) * keep // 10000 if block == 0 else (len(values) * keep + 5000) // 10000
        order = sorted(
            range(len(values)), key=lambda i: (values[i] == values[i], -abs(values[i]), i)
        )
        kept += sorted(start + i for i in order[:k])
    return kept


def mask_bits(mask: torch.Tensor, n: int) -> list[int]:
    """Indices of the bits that are set, least significant bit first."""
    return [i for i in range(n) if mask[i // 8] >> (i % 8) & 1]


def special(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


tensors = st.builds(
    special,
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    0.0,
                    -0.0,
                    1.0,
                    -1.0,
                    1e-40,
                    -1e-45,
                    6e4,
                    float("inf"),
                    float("-inf"),
                    float("nan"),
                ]
            ),
            st.floats(-4, 4, width=16),
        ),
        max_size=70,
    ),
    st.sampled_from(DTYPES),
)
formats = st.tuples(
    st.sampled_from([0, 1, 500, 1000, 3333, 9999, 10000]), st.sampled_from([0, 8, 16, 24, 1024])
)


@settings(max_examples=300, deadline=None)
@given(tensors, formats)
def test_exactly_the_largest_are_kept(x: torch.Tensor, form: tuple[int, int]) -> None:
    keep, block = form
    values, scale, mask = OPS.sparsify(x, keep, block, 0, 0, False)
    expected = brute_force_kept(x, keep, block)
    if keep == 10000:
        assert mask.numel() == 0
    else:
        assert mask_bits(mask, x.numel()) == expected
    assert values.numel() == len(expected) == kernels.Format(keep, block).kept(x.numel())
    torch.testing.assert_close(values, x[expected], rtol=0, atol=0, equal_nan=True)
    back = OPS.unsparsify(values, scale, mask, x.numel(), x.dtype, keep, block, 0, 0)
    dense = torch.zeros_like(x)
    dense[expected] = x[expected]
    torch.testing.assert_close(back, dense, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 50), st.integers(0, 2**32))
def test_packed_codes_are_a_little_endian_bit_stream(bits: int, n: int, seed: int) -> None:
    codes = torch.randint(
        0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    packed = OPS.pack_uint(codes, bits)
    assert bytes(packed.tolist()) == stream.to_bytes((n * bits + 7) // 8, "little")
    assert torch.equal(OPS.unpack_uint(packed, bits, n), codes)


def test_bool_masks_pack_to_one_bit() -> None:
    flags = torch.rand(1001) < 0.5
    packed = OPS.pack_uint(flags, 1)
    assert packed.numel() == 126
    assert torch.equal(OPS.unpack_uint(packed, 1, 1001).bool(), flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keep", "block"), [(1000, 1024), (5000, 64), (2500, 0)])
def test_sample_is_exact_in_count_and_unbiased(dtype: torch.dtype, keep: int, block: int) -> None:
    torch.manual_seed(0)
    x = torch.linspace(1, 2, 2304).to(dtype)
    total = torch.zeros(2304, dtype=torch.float64)
    for _ in range(200):
        values, mask = OPS.sample(x, keep, block)
        assert values.numel() == kernels.Format(keep, block).kept(2304)
        total += OPS.unsparsify(values, NO_SCALE, mask, 2304, dtype, keep, block, 0, 0).double()
    ratio = total / 200 / x.double()
    # Each element is Bernoulli(p) / p: the mean of 200 draws deviates by sqrt((1 - p) / p / 200)
    deviation = ((1 - keep / 10000) / (keep / 10000) / 200) ** 0.5
    assert abs(ratio.mean() - 1) < 0.01
    assert ratio.std() == pytest.approx(deviation, rel=0.15)


def test_sample_follows_torch_seed_and_draws_anew() -> None:
    x = torch.randn(5000)

    def draw() -> torch.Tensor:
        return OPS.sample(x, 1000, 1024)[1]

    torch.manual_seed(7)
    eager = [draw(), draw()]
    compiled = torch.compile(draw, backend="aot_eager")
    torch.manual_seed(7)
    again = [compiled(), compiled()]
    assert not torch.equal(eager[0], eager[1])
    assert torch.equal(eager[0], again[0])
    assert torch.equal(eager[1], again[1])


@pytest.mark.parametrize(
    ("n", "keep", "block", "bits"), [*itertools.product([0, 3000], [1000, 10000], [0, 1024], [0])]
)
def test_opcheck(n: int, keep: int, block: int, bits: int) -> None:
    x = torch.randn(n)
    args = (keep, block, bits, 0)
    torch.library.opcheck(OPS.sparsify.default, (x, *args, False))
    packed = OPS.sparsify(x, *args, False)
    torch.library.opcheck(OPS.unsparsify.default, (*packed, n, torch.float32, *args))
    torch.library.opcheck(OPS.sample.default, (x, keep, block))


def test_opcheck_uint() -> None:
    codes = torch.arange(30, dtype=torch.uint8)
    torch.library.opcheck(OPS.pack_uint.default, (codes, 5))
    torch.library.opcheck(OPS.unpack_uint.default, (OPS.pack_uint(codes, 5), 5, 30))


def test_opcheck_steps() -> None:
    for bits, borders in ((2, [-1.0, 0.0, 1.5]), (4, [])):
        x = torch.randn(45)
        packed = OPS.encode_steps(x, borders, bits)
        torch.library.opcheck(OPS.encode_steps.default, (x, borders, bits))
        levels = [0.5, *borders]
        torch.library.opcheck(OPS.decode_steps.default, (packed, levels, bits, 45, torch.bfloat16))


@settings(max_examples=100, deadline=None)
@given(
    tensors,
    st.integers(1, 8),
    st.lists(st.sampled_from([float("-inf"), -2.0, -0.0, 0.0, 1e-45, 0.1, 1.0, 7e4, 1e39])),
)
def test_steps_count_the_borders_that_are_reached(
    x: torch.Tensor, bits: int, some: list[float]
) -> None:
    borders = sorted(some)[: 2**bits - 1]
    packed = OPS.encode_steps(x, borders, bits)
    single = torch.tensor(borders, dtype=torch.float32).tolist()
    expected = [sum(v >= b for b in single) for v in x.float().tolist()]
    assert packed.numel() == (x.numel() * bits + 7) // 8
    assert OPS.unpack_uint(packed, bits, x.numel()).tolist() == expected
    levels = [i / 3 - 1 for i in range(len(borders) + 1)]
    back = OPS.decode_steps(packed, levels, bits, x.numel(), x.dtype)
    rounded = torch.tensor([levels[code] for code in expected], dtype=x.dtype)
    torch.testing.assert_close(back, rounded, rtol=0, atol=0)


def test_codes_beyond_the_levels_have_the_last_one() -> None:
    packed = OPS.pack_uint(torch.arange(16, dtype=torch.uint8), 4)
    back = OPS.decode_steps(packed, [1.0, 2.0, 3.0], 4, 16, torch.float32)
    assert back.tolist() == [1.0, 2.0, *[3.0] * 14]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the C kernel, the reference
@pytest.mark.parametrize(
    ("borders", "bits", "text"),
    [
        ([1.0, 0.0], 2, r"borders \[1.0, 0.0\]: must ascend, without NaN"),
        ([float("nan")], 2, "must ascend, without NaN"),
        ([0.0, float("nan")], 2, "must ascend, without NaN"),
        ([0.0, 1.0], 1, "2 borders: codes of 1 bits tell 1 apart"),
        ([], 9, "bits=9: must be 1..8"),
    ],
)
def test_impossible_borders_are_refused(
    borders: list[float], bits: int, text: str, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=text):
        OPS.encode_steps(torch.randn(9, dtype=dtype), borders, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_levels_are_refused(dtype: torch.dtype) -> None:
    packed = torch.zeros(2, dtype=torch.uint8)
    for levels, numel, text in (
        ([], 8, "0 levels: codes of 2 bits need 1..4"),
        ([0.0] * 5, 8, "5 levels: codes of 2 bits need 1..4"),
        ([0.0] * 4, 9, "2 bytes cannot hold 9 codes of 2 bits"),
    ):
        with pytest.raises(ValueError, match=text):
            OPS.decode_steps(packed, levels, 2, numel, dtype)
    with pytest.raises(TypeError, match=r"dtype torch\.int8: packed codes are uint8"):
        OPS.decode_steps(packed.to(torch.int8), [0.0], 2, 8, dtype)
    with pytest.raises(TypeError, match=r"dtype torch\.int32: must be one of"):
        OPS.decode_steps(packed, [0.0], 2, 8, torch.int32)


@pytest.mark.parametrize("bits", [0])
def test_a_symbolic_size_does_not_specialise(bits: int) -> None:
    compiles = 0

    def counting(gm: torch.fx.GraphModule, _: object) -> object:
        nonlocal compiles
        compiles += 1
        return gm

    @torch.compile(backend=counting, dynamic=True, fullgraph=True)
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        packed = OPS.sparsify(x.flatten(), 1000, 1024, bits, 0, False)
        flat = OPS.unsparsify(*packed, x.numel(), x.dtype, 1000, 1024, bits, 0)
        return flat.view_as(x)

    for rows in (3, 5, 70, 1000):
        x = torch.randn(rows, 11)
        assert (there_and_back(x) != 0).sum() == kernels.Format(1000, 1024).kept(rows * 11)
    assert compiles == 1


@pytest.mark.parametrize(
    ("keep", "block", "bits", "layout", "text"),
    [
        (10001, 0, 0, 0, "keep=10001"),
        (-1, 0, 0, 0, "keep=-1"),
        (1, 12, 0, 0, "block=12"),
        (1, 8, 9, 0, "bits=9"),
        (1, 8, 4, 3, "layout=3: must be in 0..2"),
        (1, 8, 4, -1, "layout=-1"),
    ],
)
def test_impossible_formats_are_refused(
    keep: int, block: int, bits: int, layout: int, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        OPS.sparsify(torch.randn(9), keep, block, bits, layout, False)


def test_integer_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype torch\.int32: must be one of"):
        OPS.sparsify(torch.ones(9, dtype=torch.int32), 1000, 0, 0, 0, False)
    with pytest.raises(TypeError, match=r"dtype torch\.int32: must be one of"):
        OPS.encode_steps(torch.ones(9, dtype=torch.int32), [0.0], 1)
