"""The C kernels give the bits of the reference, on every instruction set that this machine has."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, KINDS, assert_same_bits, cases, make

from dropit_fx.kernels import Format, cpu, reference

built = pytest.mark.skipif(cpu.library() is None, reason="the C kernels are not built")


@pytest.fixture(params=["plain", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    level = ["plain", "avx2", "avx512"].index(request.param)
    lib = cpu.library()
    if lib is None or lib.dropit_level(level) != level:
        pytest.skip(f"this machine has no {request.param}")
    yield
    lib.dropit_level(-1)


sizes = st.one_of(st.integers(0, 3000), st.integers(2**14, 40_000))


@built
@pytest.mark.usefixtures("instructions")
def test_same_bits_as_the_reference() -> None:
    @settings(max_examples=100, deadline=None)
    @given(cases(sizes, (0, 8, 64, 1024, 4096)))
    def check(case) -> None:  # type: ignore[no-untyped-def]
        x, seed, numbers = case
        form = Format(*numbers)
        expected = reference.sparsify(x, form, seed)
        packed = cpu.sparsify(x, form, seed)
        for left, right in zip(packed, expected, strict=True):
            assert_same_bits(left, right)
        back = (x.numel(), x.dtype, form)
        assert_same_bits(cpu.unsparsify(*expected, *back), reference.unsparsify(*expected, *back))
        form = Format(form.keep, form.block)
        sampled, drawn = cpu.sample(x, form, seed), reference.sample(x, form, seed)
        for left, right in zip(sampled, drawn, strict=True):
            assert_same_bits(left, right)

    check()


CHANNEL_FORMS = [
    Format(10000, 64, 6),
    Format(10000, 1024, 2),
    Format(10000, 40, 5, 2),
    Format(10000, 40, 4, 1, True),
    Format(5000, 64, 4),
    Format(2500, 0, 0),
]


@built
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_have_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from([1, 1, 3, 16, 70]),  # elements of a run: 1, where channels come last
        st.sampled_from([1, 3, 33]),
        st.sampled_from([1, 7]),
        st.sampled_from(CHANNEL_FORMS),
    )
    def check(inner: int, channels: int, outer: int, form: Format) -> None:
        x = (torch.randn(outer * channels * inner) * 5 + 2).to(dtype)
        x[:: 1 + 97 * channels] = float("nan")
        mean, inverse = torch.randn(channels), torch.rand(channels) + 0.1
        seed = torch.tensor([11])
        values = x, mean, inverse, inner, form, seed
        expected = reference.sparsify_channels(*values)
        for left, right in zip(cpu.sparsify_channels(*values), expected, strict=True):
            assert_same_bits(left, right)
        back = *expected, mean, inverse.reciprocal(), inner, x.numel(), dtype, form
        assert_same_bits(cpu.unsparsify_channels(*back), reference.unsparsify_channels(*back))

    check()


@built
def test_every_half_and_bfloat_is_converted_as_torch_does() -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        x = x[x.isfinite()]
        for bits, layout in ((2, 0), (8, 0), (8, 1), (8, 2)):
            form = Format(10000, 8, bits, layout)
            packed = cpu.sparsify(x, form)
            expected = reference.sparsify(x, form)
            for left, right in zip(packed, expected, strict=True):
                assert_same_bits(left, right)
            back = (x.numel(), dtype, form)
            assert_same_bits(cpu.unsparsify(*packed, *back), reference.unsparsify(*packed, *back))


@built
@pytest.mark.parametrize(
    ("keep", "block", "bits", "layout"),
    [(2000, 256, 3, 0), (10000, 8, 3, 0), (10000, 40, 5, 0), (10000, 40, 5, 2)],
)
def test_the_number_of_threads_changes_nothing(
    keep: int, block: int, bits: int, layout: int
) -> None:
    x = torch.randn(100_001)
    form = Format(keep, block, bits, layout)

    def there_and_back(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        packed = cpu.sparsify(x, form)
        steps = cpu.encode_steps(x, [-1.0, 0.0, 1.0], bits)
        back = cpu.unsparsify(*packed, x.numel(), x.dtype, form)
        levels = cpu.decode_steps(steps, [1.0, 2.0], bits, x.numel(), x.dtype)
        return [*packed, steps, back, levels]

    alone, together = there_and_back(1), there_and_back(3)
    for left, right in zip(alone, together, strict=True):
        assert left.view(torch.uint8).equal(right.view(torch.uint8))


@built
@pytest.mark.parametrize("bits", range(1, 9))
def test_same_uint_streams_as_the_reference(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 1000, 32768, 70_001):
        codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
        packed = cpu.pack_uint(codes, bits)
        assert torch.equal(packed, reference.pack_uint(codes, bits))
        assert torch.equal(cpu.unpack_uint(packed, bits, count), codes)


@built
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bits", range(1, 9))
def test_same_steps_as_the_reference(bits: int) -> None:
    for i, count in enumerate((0, 1, 7, 31, 32, 63, 1000, 33_001, 70_001)):
        x = make(KINDS[(i + bits) % len(KINDS)], count, DTYPES[i % len(DTYPES)], seed=i)
        borders = x[:: count // 2**bits + 1].float().nan_to_num().sort().values.tolist()[1:]
        packed = cpu.encode_steps(x, borders, bits)
        assert torch.equal(packed, reference.encode_steps(x, borders, bits))
        levels = [1.0, *borders]
        back = (packed, levels, bits, count, x.dtype)
        assert_same_bits(cpu.decode_steps(*back), reference.decode_steps(*back))


@built
def test_buffers_of_the_wrong_size_are_refused() -> None:
    form = Format(1000, 1024, 4)
    values, scale, mask = cpu.sparsify(torch.randn(2048), form)
    with pytest.raises(ValueError, match="values has 101 elements, but a tensor of 2048 packed"):
        cpu.unsparsify(values[1:], scale, mask, 2048, torch.float32, form)
    with pytest.raises(ValueError, match="255 bytes cannot hold 2048 codes of 1 bits"):
        cpu.unpack_uint(mask[1:], 1, 2048)


def test_without_the_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(3000)
    expected = reference.sparsify(x, Format(1000, 1024, 4))
    monkeypatch.setattr(cpu, "EXTENSION_SUFFIXES", [".absent"])
    cpu.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            packed = torch.ops.dropit.sparsify(x, 1000, 1024, 4, 0, False)
            torch.ops.dropit.unsparsify(*packed, 3000, torch.float32, 1000, 1024, 4, 0)
            torch.ops.dropit.unpack_uint(torch.ops.dropit.pack_uint(x > 0, 1), 1, 3000)
            steps = torch.ops.dropit.encode_steps(x, [0.0], 1)
            torch.ops.dropit.decode_steps(steps, [0.0, 1.0], 1, 3000, torch.float32)
    finally:
        cpu.library.cache_clear()
    for left, right in zip(packed, expected, strict=True):
        assert_same_bits(left, right)
    assert [r.message for r in caplog.records] == [
        "dropit_fx: C kernels not built, using the slower PyTorch ones"
    ]
