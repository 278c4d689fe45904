"""The ops as plain tensor ops: bytes and values of the reference, in eager mode and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, KINDS, assert_same_bits, cases, make
from torch import Tensor

from dropit_fx.kernels import FULL, Format, fused, reference
from dropit_fx.kernels.format import uint_nbytes
from dropit_fx.kernels.masks import apply_mask_reference, pack_between_reference
from dropit_fx.kernels.reference import unpack_rows
from dropit_fx.private import minor

BITS = range(1, 9)
SIZES = (0, 1, 7, 8, 9, 255, 256, 257, 1001)
TIES = 2e-3  # of the elements of random tensors, at most, lie between two levels to the last bit
Numbers = tuple[int, int, int, int]


def codes(values: Tensor, numel: int, bits: int) -> Tensor:
    return unpack_rows(values[None], bits, numel)[0].to(torch.int64)


def levels_of(code: Tensor, form: Format) -> Tensor:
    """Codes as numbers that count levels upwards from the least."""
    if form.spacing:
        return code
    count = 2 ** (form.bits - 1)
    return torch.where(code < count, code, count - 1 - code)


def assert_packs_alike(found: Any, expected: Any, numel: int, numbers: Numbers) -> int:
    """The same bytes, but for codes at ties, whose number it gives: the next level there."""
    form = Format(*numbers)
    values, scale, mask = found
    assert_same_bits(scale, expected[1])
    assert_same_bits(mask, expected[2])
    if not form.bits:
        assert_same_bits(values, expected[0])
        return 0
    assert values.dtype == torch.uint8
    assert values.shape == expected[0].shape
    ours, theirs = (levels_of(codes(v, numel, form.bits), form) for v in (values, expected[0]))
    assert ((ours - theirs).abs() <= 1).all()
    return int((ours != theirs).sum())


@given(cases(st.integers(0, 700), (0, 8, 64, 256)))
def test_it_packs_into_the_bytes_of_the_reference(case: Any) -> None:
    x, _, (_, *rest, _) = case
    numbers = (FULL, *rest)
    expected = reference.sparsify(x, Format(*numbers))
    found = fused.sparsify(x, *numbers, False)
    differing = assert_packs_alike(found, expected, x.numel(), numbers)
    assert differing <= max(2, TIES * x.numel())


@given(cases(st.integers(0, 700), (0, 8, 64, 256)))
def test_it_reads_back_the_bits_of_the_reference(case: Any) -> None:
    x, _, (_, *rest, _) = case
    numbers = (FULL, *rest)
    parts = reference.sparsify(x, Format(*numbers))
    for dtype in (x.dtype, torch.float32, torch.float64):
        if not numbers[2] and dtype != x.dtype:
            continue
        found = fused.unsparsify(*parts, x.numel(), dtype, *numbers)
        expected = reference.unsparsify(*parts, x.numel(), dtype, Format(*numbers))
        assert found is not None
        assert_same_bits(found, expected)


def test_what_selects_or_draws_has_no_such_form() -> None:
    x = torch.randn(512)
    assert fused.sparsify(x, 5000, 256, 4, 0, False) is None
    assert fused.sparsify(x, FULL, 256, 4, 0, True) is None
    assert fused.sparsify(x, FULL, 256, 0, 0, True) is not None  # nothing to round
    parts = reference.sparsify(x, Format(5000, 256, 4))
    assert fused.unsparsify(*parts, 512, x.dtype, 5000, 256, 4, 0) is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numel", SIZES)
def test_codes_are_those_of_the_reference(bits: int, numel: int) -> None:
    x = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8)
    packed = reference.pack_uint(x, bits)
    assert_same_bits(fused.pack_uint(x, bits), packed)
    assert_same_bits(fused.unpack_uint(packed, bits, numel), x)
    assert packed.numel() == uint_nbytes(numel, bits)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("numel", SIZES)
def test_steps_are_those_of_the_reference(dtype: torch.dtype, bits: int, numel: int) -> None:
    x = make("special", numel, dtype, 1)
    borders = torch.randn(2**bits - 1).sort().values.tolist()
    levels = torch.randn(2**bits).tolist()
    packed = reference.encode_steps(x, borders, bits)
    assert_same_bits(fused.encode_steps(x, borders, bits), packed)
    found = fused.decode_steps(packed, levels, bits, numel, dtype)
    assert_same_bits(found, reference.decode_steps(packed, levels, bits, numel, dtype))
    shorter = reference.decode_steps(packed, levels[:2], bits, numel, dtype)
    assert_same_bits(fused.decode_steps(packed, levels[:2], bits, numel, dtype), shorter)


@pytest.mark.parametrize("bounds", [(0.0, None), (0.0, 6.0), (None, 0.5), (None, None)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_masks_are_those_of_the_reference(numel: int, dtype: torch.dtype, bounds: Any) -> None:
    x, grad = make("special", numel, dtype, 0), make("ties", numel, dtype, 1)
    bits = pack_between_reference(x, *bounds)
    assert_same_bits(fused.pack_between(x, *bounds), bits)
    for off in (0.0, 0.01):
        assert_same_bits(fused.apply_mask(bits, grad, off), apply_mask_reference(bits, grad, off))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("inner", [1, 25])
def test_channels_are_those_of_the_reference(inner: int, dtype: torch.dtype) -> None:
    x = make("outliers", 6 * 10 * inner, dtype, 3)
    mean, deviation = torch.randn(10), torch.rand(10) + 0.5
    for layout in range(3):
        numbers = (FULL, 64, 5, layout)
        given = x, mean, 1 / deviation, inner
        expected = reference.sparsify_channels(*given, Format(*numbers))
        found = fused.sparsify_channels(*given, *numbers, False)
        assert assert_packs_alike(found, expected, x.numel(), numbers) <= 1
        read = *expected, mean, deviation, inner, x.numel(), dtype
        back = fused.unsparsify_channels(*read, *numbers)
        assert back is not None
        assert_same_bits(back, reference.unsparsify_channels(*read, Format(*numbers)))


COMPILED: list[Numbers] = [(FULL, 256, 3, 0), (FULL, 256, 4, 0), (FULL, 256, 5, 1), (FULL, 0, 8, 2)]


def both_ways(x: Tensor, formats: list[Numbers]) -> list[Any]:
    out = []
    for numbers in formats:
        parts = fused.sparsify(x, *numbers, False)
        expected = torch.ops.dropit.sparsify(x, *numbers, False)
        back = fused.unsparsify(*expected, x.numel(), x.dtype, *numbers)
        out.append((parts, expected, back))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "dynamic"), list(zip(DTYPES, (True, False, False), strict=True)))
def test_compiled_it_is_the_same(dtype: torch.dtype, dynamic: bool) -> None:
    """A compiler that computes in float32 what is bfloat16, and contracts, would show here."""
    run = torch.compile(both_ways, fullgraph=True)  # a format is made of constants
    # Code that PyTorch 2.11 makes for CPUs puts borders of a codebook a unit in the last place off:
    # of values that lie on them, as many subnormal ones do, others count to a level.
    on_borders = minor(torch.__version__) < (2, 13) and dtype == torch.float16
    for kind in (k for k in KINDS if not (on_borders and k == "subnormal")):
        x = make(kind, 1001, dtype, 5)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        for numbers, (parts, expected, back) in zip(COMPILED, run(x, COMPILED), strict=True):
            differing = assert_packs_alike(parts, expected, 1001, numbers)
            assert differing <= TIES * 1001, f"{kind} {numbers}"
            dense = reference.unsparsify(*expected, 1001, dtype, Format(*numbers))
            assert_same_bits(back, dense)
