"""Every op of namespace `dropit` on CUDA: the bits of the reference, whatever the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import KINDS, assert_same_bits, make
from torch import Tensor

import dropit_fx
from dropit_fx.bench.gpu_rows import preset_codecs
from dropit_fx.codecs import CODEC
from dropit_fx.kernels import Format, reference, row_norms, rows
from dropit_fx.runtime import packed_call
from dropit_fx.runtime.linear_loss import linear_cross_entropy

OPS = torch.ops.dropit
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the numbers of each Format
FORMATS = (
    *((10000, 256, bits, 0, False) for bits in (4, 5, 6, 8)),
    *((10000, 256, bits, 2, False) for bits in (4, 6)),
    *((10000, 256, bits, 2, True) for bits in (4, 8)),
    (10000, 256, 4, 1, False),
    (10000, 1024, 0, 0, False),
    (10000, 96, 1, 0, True),
    (5000, 1024, 4, 0, False),
    (3000, 1024, 2, 0, False),
    (1000, 1024, 0, 0, False),
    (6611, 1024, 3, 0, False),
    (5000, 1024, 3, 0, True),
    (3333, 96, 4, 1, False),
    (1000, 8192, 4, 0, False),
    (5000, 16384, 4, 0, False),
    (1000, 0, 0, 0, False),
)
BOUNDS = ((0.0, None), (0.0, 6.0), (-0.3, 0.8), (None, 1.0))
SIZES = (1, 8, 255, 2049, 50_003)
TESTED = {
    *("sparsify", "unsparsify", "sample", "pack_uint", "unpack_uint"),
    *("encode_steps", "decode_steps", "pack_between", "apply_mask"),
    *("sparsify_channels", "unsparsify_channels", "encode_window", "decode_window"),
    *("linear_rows", "linear_rows_backward", "stands_for", "select_rows", "rotate"),
    *("mix_rows", "unmix_rows", "fresh_seed", "select_known_rows", "note_rows"),
}


def test_every_op_with_a_cuda_kernel_is_tested_here() -> None:
    names = [n.split(".")[0] for n in torch._C._dispatch_get_all_op_names()]
    ours = {n for n in names if n.startswith("dropit::")}
    on_cuda = {n for n in ours if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")}
    assert {n.removeprefix("dropit::") for n in on_cuda} <= TESTED


def inputs(dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors that are hard in one way each, on the CPU; none of them aligned to 16 bytes."""
    for i, size in enumerate(SIZES):
        for kind in KINDS if size == 2049 else (KINDS[i], "special"):
            yield make(kind, size + 1, dtype, seed=i)[1:]


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a view that keeps its offset in memory."""
    return x.new_empty(x.numel() + 1, device=device)[1:].copy_(x)


def next_seed(device: torch.device, number: int) -> Tensor:
    """What an op will draw from the generator of `device`, which is put back to before the draw."""
    torch.manual_seed(number)
    seed = reference.draw_seed(device).cpu()
    torch.manual_seed(number)
    return seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_formats_have_the_bits_of_the_reference(
    form: tuple[int, int, int, int, bool], dtype: torch.dtype, device: torch.device
) -> None:
    for number, x in enumerate(inputs(dtype)):
        seed = next_seed(device, number)
        packed = OPS.sparsify(moved(x, device), *form)
        wanted = reference.sparsify(x, Format(*form), seed)
        for part, other in zip(packed, wanted, strict=True):
            assert_same_bits(part.cpu(), other)
        back = OPS.unsparsify(*packed, x.numel(), dtype, *form[:4])
        assert_same_bits(back.cpu(), reference.unsparsify(*wanted, x.numel(), dtype, Format(*form)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("keep", "block"), [(1000, 1024), (5000, 64), (2500, 0)])
def test_random_choices_are_those_of_the_reference(
    keep: int, block: int, dtype: torch.dtype, device: torch.device
) -> None:
    for number, x in enumerate(inputs(dtype)):
        seed = next_seed(device, number)
        drawn = OPS.sample(moved(x, device), keep, block)
        for part, other in zip(drawn, reference.sample(x, Format(keep, block), seed), strict=True):
            assert_same_bits(part.cpu(), other)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("select", rows.SELECTIONS)
def test_rows_are_chosen_in_order_and_with_the_weights_of_their_norms(
    select: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(500, 33).to(dtype)
    x[7] = torch.nan
    for count in (0, 1, 150, 500):
        seed = next_seed(device, count)
        index, weight = OPS.select_rows(x.to(device), count, select)
        if select == "uniform":  # norms are sums, which devices take in orders of their own
            wanted = rows.select_rows(x, count, select, seed)
            assert torch.equal(index.cpu(), wanted[0])
            assert torch.equal(weight.cpu(), wanted[1])
        assert index.dtype == torch.int32
        assert index.device.type == weight.device.type == device.type
        assert len(index.unique()) == count
        assert torch.equal(index, index.sort().values)
        assert count == 0 or 7 in index.tolist()
        assert len(weight) == (0 if select == "norm" else count)
        assert (weight >= 1).all()


def test_what_is_known_of_rows_stays_on_the_device(device: torch.device) -> None:
    x, grad = torch.randn(500, 33), torch.randn(500, 9) * torch.logspace(-2, 0, 500)[:, None]
    name = row_norms.new_name("test")
    memory = row_norms.named(name)
    index = torch.arange(0, 500, 7, dtype=torch.int32)
    noted = OPS.note_rows(grad.to(device), index.to(device), name)
    assert torch.equal(noted.cpu(), grad[index])
    found, weight = OPS.select_known_rows(x.to(device), 150, name)
    assert found.device.type == weight.device.type == device.type
    assert len(found.unique()) == 150
    squares = grad.square().sum(1)
    known = (squares / squares.mean()).clamp(min=row_norms.FLOOR).sqrt()
    torch.testing.assert_close(memory.known(x.to(device)).cpu(), known)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rows_are_mixed_as_on_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randint(-9, 10, (500, 33)).to(dtype)  # whose sums no order of addition changes
    wanted = next_seed(device, 1)
    seed = OPS.fresh_seed(x.to(device))
    assert torch.equal(seed.cpu(), wanted)
    for count in (0, 1, 150, 500):
        mixed = OPS.mix_rows(x.to(device), seed, count)
        assert torch.equal(mixed.cpu(), OPS.mix_rows(x, wanted, count))
        back = OPS.unmix_rows(mixed, seed, 500)
        assert torch.equal(back.cpu(), OPS.unmix_rows(mixed.cpu(), wanted, 500))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_have_the_bits_of_the_reference(bits: int, device: torch.device) -> None:
    for size in (0, 1, 7, 8, 9, 4097, 300_001):
        codes = torch.randint(0, 2**bits, (size + 1,), dtype=torch.uint8)[1:]
        packed = OPS.pack_uint(moved(codes, device), bits)
        assert torch.equal(packed.cpu(), reference.pack_uint(codes, bits))
        assert torch.equal(OPS.unpack_uint(packed, bits, size).cpu(), codes)
    flags = torch.rand(1001) < 0.5
    assert torch.equal(
        OPS.pack_uint(flags.to(device), bits).cpu(), reference.pack_uint(flags, bits)
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_steps_have_the_bits_of_the_reference(
    bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    borders = sorted([-1.0, -0.0, 0.1, 1e-40, 1.0, 2.5, float("inf")][: 2**bits - 1])
    levels = [-0.0, *borders]
    for x in inputs(dtype if dtype != torch.float64 else torch.float32):
        x = x.to(dtype)
        packed = OPS.encode_steps(moved(x, device), borders, bits)
        assert torch.equal(packed.cpu(), reference.encode_steps(x, borders, bits))
        back = OPS.decode_steps(packed, levels, bits, x.numel(), dtype).cpu()
        wanted = reference.decode_steps(packed.cpu(), levels, bits, x.numel(), dtype)
        assert torch.equal(back, wanted)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_masks_have_the_bits_of_the_cpu(
    bounds: tuple[Any, Any], dtype: torch.dtype, device: torch.device
) -> None:
    for x in inputs(dtype if dtype != torch.float64 else torch.float32):
        x = x.to(dtype)
        bits = OPS.pack_between(moved(x, device), *bounds)
        assert torch.equal(bits.cpu(), OPS.pack_between(x, *bounds))
        for off in (0.0, 0.01, -1.0):
            grad = OPS.apply_mask(bits, moved(x.flip(0), device), off)
            torch.testing.assert_close(
                grad.cpu(),
                OPS.apply_mask(bits.cpu(), x.flip(0), off),
                rtol=0,
                atol=0,
                equal_nan=True,
            )


@pytest.mark.parametrize("label", preset_codecs())
def test_what_presets_pack_is_what_the_cpu_packs(label: str, device: torch.device) -> None:
    codec, options = preset_codecs()[label]
    x = torch.randn(30_011).to(torch.bfloat16)
    if options.get("rounding") == "stochastic":
        options |= {"rounding": "nearest"}  # the seeds of two devices differ
    packed, wanted = CODEC[codec].pack(x.to(device), options), CODEC[codec].pack(x, options)
    for part, other in zip(packed, wanted, strict=True):
        assert_same_bits(part.cpu(), other)
    back = CODEC[codec].unpack(packed, options, x.numel(), x.dtype)
    assert_same_bits(back.cpu(), CODEC[codec].unpack(wanted, options, x.numel(), x.dtype))


PLAIN = [  # codecs in plain ops of PyTorch
    ("cast", {"dtype": "float8_e4m3fn"}),
    ("cast", {"dtype": "float8_e5m2", "block": None}),
    ("cast", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("codec", "options"), PLAIN, ids=str)
def test_codecs_of_plain_ops_pack_and_give_back_what_the_cpu_does(
    codec: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    full = CODEC[codec].defaults() | options
    for x in inputs(dtype):
        packed, wanted = CODEC[codec].pack(moved(x, device), full), CODEC[codec].pack(x, full)
        for part, other in zip(packed, wanted, strict=True):
            assert part.dtype == other.dtype
            same = {"rtol": 0, "atol": 0, "equal_nan": True}
            torch.testing.assert_close(part.cpu().float(), other.float(), **same)
        back = CODEC[codec].unpack(packed, full, x.numel(), dtype)
        assert_same_bits(back.cpu(), CODEC[codec].unpack(wanted, full, x.numel(), dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rotated_values_come_back_as_on_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    """But where a product is rounded otherwise, and the level is the next one."""
    full = CODEC["quant"].defaults() | {"bits": 8, "hadamard": True}
    x = torch.randn(50_003).to(dtype)
    packed = CODEC["quant"].pack(x.to(device), full)
    back = CODEC["quant"].unpack(packed, full, x.numel(), dtype).cpu()
    wanted = CODEC["quant"].unpack(CODEC["quant"].pack(x, full), full, x.numel(), dtype)
    off = (back - wanted).float().norm() / x.float().norm()
    assert off < 1e-3
    assert (back - x).float().norm() < 0.02 * x.float().norm()


@pytest.mark.parametrize(("form", "rows"), [(FORMATS[1], 66_000), (FORMATS[11], 66_000)], ids=str)
def test_more_rows_than_a_grid_has_in_y(
    form: tuple[int, int, int, int, bool], rows: int, device: torch.device, rehearsal: bool
) -> None:
    x = torch.randn((100 if rehearsal else rows) * form[1] + 3).to(torch.bfloat16)
    packed, wanted = OPS.sparsify(x.to(device), *form), OPS.sparsify(x, *form)
    for part, other in zip(packed, wanted, strict=True):
        assert torch.equal(part.cpu(), other)
    back = OPS.unsparsify(*packed, x.numel(), x.dtype, *form[:4])
    assert torch.equal(back.cpu(), OPS.unsparsify(*wanted, x.numel(), x.dtype, *form[:4]))


def beyond_int32(device: torch.device, rehearsal: bool, needed: int) -> int:
    """A number of elements that no int32 counts: a multiple of every block, and some more."""
    if rehearsal:
        return 2**14 + 1031
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, {needed / 2**30:.0f} GiB are needed")
    return 2**31 + 2**20 + 1031


def test_codes_beyond_two_billion(device: torch.device, rehearsal: bool) -> None:
    count = beyond_int32(device, rehearsal, 16 * 2**30)
    codes = torch.randint(0, 8, (count,), dtype=torch.uint8, device=device)
    packed = OPS.pack_uint(codes, 3)
    last = codes[-1031:].cpu()  # begins at a byte: what is before it is a multiple of 8
    assert torch.equal(packed[(count - 1031) * 3 // 8 :].cpu(), reference.pack_uint(last, 3))
    assert torch.equal(OPS.unpack_uint(packed, 3, count), codes)


def test_a_format_beyond_two_billion_elements(device: torch.device, rehearsal: bool) -> None:
    count = beyond_int32(device, rehearsal, 30 * 2**30)
    form = FORMATS[1]
    x = torch.empty(count, dtype=torch.bfloat16, device=device).normal_()
    values, scale, mask = OPS.sparsify(x, *form)
    last = x[-1031:].cpu()
    wanted = reference.sparsify(last, Format(*form))
    assert torch.equal(values[-wanted[0].numel() :].cpu(), wanted[0])
    assert torch.equal(scale[-wanted[1].numel() :].cpu(), wanted[1])
    back = OPS.unsparsify(values, scale, mask, count, x.dtype, *form[:4])
    assert torch.equal(
        back[-1031:].cpu(), reference.unsparsify(*wanted, 1031, x.dtype, Format(*form))
    )
    assert (back[: 2**12] - x[: 2**12]).abs().max() < 0.5


@pytest.mark.parametrize("inner", [1, 49, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [FORMATS[2], FORMATS[4], FORMATS[5], FORMATS[6]], ids=str)
def test_standardised_channels_have_the_bits_of_the_reference(
    form: tuple[int, int, int, int, bool], dtype: torch.dtype, inner: int, device: torch.device
) -> None:
    channels = 24
    x = torch.randn(channels * inner * (700 if inner == 1 else 3)).to(dtype)
    mean, inverse = torch.randn(channels), torch.rand(channels) + 0.5
    seed = next_seed(device, 5)
    on_device = [t.to(device) for t in (x, mean, inverse)]
    packed = OPS.sparsify_channels(*on_device, inner, *form)
    wanted = reference.sparsify_channels(x, mean, inverse, inner, Format(*form), seed)
    for part, other in zip(packed, wanted, strict=True):
        assert_same_bits(part.cpu(), other)
    rest = (inner, x.numel(), dtype)
    back = OPS.unsparsify_channels(*packed, *on_device[1:], *rest, *form[:4])
    unpacked = reference.unsparsify_channels(*wanted, mean, inverse, *rest, Format(*form))
    assert_same_bits(back.cpu(), unpacked)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_places_in_windows_are_those_of_the_cpu(
    dims: int, last: bool, device: torch.device
) -> None:
    pool = {2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}[dims]
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    window = [3, 2, 3][:dims], [2, 1, 2][:dims], [1, 1, 0][:dims], [1, 2, 1][:dims]
    x = torch.randn(2, 5, *(17, 14, 9)[:dims])
    _, indices = pool(x, *window, return_indices=True)
    if last:
        indices = indices.contiguous(memory_format=formats[dims])
    sizes = list(x.shape[2:])
    codes = OPS.encode_window(indices.to(device), sizes, *window)
    assert torch.equal(codes.cpu(), OPS.encode_window(indices, sizes, *window))
    back = OPS.decode_window(codes, sizes, *window)
    assert torch.equal(back.cpu(), indices)
    assert back.stride() == indices.stride()


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_statistics_are_those_of_the_tensor(
    dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    x = torch.randn(8, 24, 14, 14, device=device).to(dtype)
    x = x * torch.logspace(-2, 2, 24, device=device).to(dtype).view(-1, 1, 1) + 3
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    reader = torch.empty(0, device=device, requires_grad=True)
    options = {"bits": 6, "block": 256, "range": "uniform", "rounding": "nearest"}
    packed = packed_call.pack(x, (reader,), "quant", options | {"by_channel": True})
    assert packed is not None
    mean, deviation = packed.parts[-2].flatten(), packed.parts[-1].flatten()
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deviation.double(), exact.std(1, correction=0), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kernel", [2, 3, (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_indices_of_max_pooling_lead_to_the_same_maxima(
    dtype: torch.dtype, kernel: Any, device: torch.device, rehearsal: bool
) -> None:
    pool = torch.nn.Sequential(torch.nn.Identity(), torch.nn.MaxPool2d(kernel, 2, 1))
    x = torch.randn(2 if rehearsal else 64, 16, 57, 56, device=device).to(dtype).requires_grad_()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x * 1)

    net = Net()
    packed = dropit_fx.transform(net, preset="lossless", example_args=(x,))
    assert any(row.codecs == ("bitmask",) for row in dropit_fx.report(packed).rows)
    dense, mine = net(x), packed(x)
    assert torch.equal(dense, mine)
    grad = torch.randint(-4, 5, dense.shape, device=device).to(dtype)  # sums are exact in any order
    (wanted,), (got,) = (torch.autograd.grad(out, x, grad) for out in (dense, mine))
    assert torch.equal(got, wanted)


def test_a_tensor_of_another_device_than_the_current_one(other_device: torch.device) -> None:
    x = torch.randn(70_003).to(torch.bfloat16)
    for form in (FORMATS[1], FORMATS[11]):
        packed, wanted = (
            OPS.sparsify(x.to(other_device), *form),
            reference.sparsify(x, Format(*form)),
        )
        for part, other in zip(packed, wanted, strict=True):
            assert part.device == other_device
            assert torch.equal(part.cpu(), other)
        back = OPS.unsparsify(*packed, x.numel(), x.dtype, *form[:4])
        assert back.device == other_device
        assert torch.equal(
            back.cpu(), reference.unsparsify(*wanted, x.numel(), x.dtype, Format(*form))
        )
    bits = OPS.pack_between(x.to(other_device), 0.0, None)
    assert torch.equal(bits.cpu(), OPS.pack_between(x, 0.0, None))
    assert torch.equal(OPS.unpack_uint(bits, 1, x.numel()).cpu(), (x > 0).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_of_logits_are_those_of_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, target = torch.randn(40, 24), torch.randn(5000, 24) / 5, torch.arange(40) * 100
    target[3] = -100
    found: list[list[Tensor]] = []
    for place in (torch.device("cpu"), device):
        operands = [t.to(place, dtype, copy=True).requires_grad_() for t in (x, weight)]
        loss = linear_cross_entropy(*operands, None, target.to(place), label_smoothing=0.1)
        loss.backward()
        found.append([loss.detach().cpu(), *[t.grad.cpu() for t in operands if t.grad is not None]])
    for ours, theirs in zip(*found, strict=True):
        near = 1e-5 if dtype == torch.float32 else 2e-2
        assert (ours - theirs).float().norm() <= near * theirs.float().norm()


def test_what_stands_for_a_tensor_is_a_copy_of_the_other(device: torch.device) -> None:
    value, x = torch.randn(2, 300, device=device).unbind()
    stands = OPS.stands_for(value, x)
    assert torch.equal(stands, value)
    assert stands.data_ptr() != value.data_ptr()
    assert stands.device.type == device.type
