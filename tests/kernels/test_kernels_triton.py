"""The Triton kernels: the bits of the reference in the interpreter, and code for real GPUs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from compiled_kernels import Figures
from launches import Launch, recorded
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from dropit_fx.codecs import CODEC
from dropit_fx.config import make_config, presets
from dropit_fx.kernels import FULL, Format, dispatch, reference
from dropit_fx.kernels import triton as kernels
from dropit_fx.kernels.triton import launch as launching
from dropit_fx.kernels.triton.launch import LARGEST_BLOCK, MAX_GRID

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEIT = 64 * 197 * 1536  # what a GELU of DeiT-S reads, of 64 images
Numbers = tuple[int, int, int, int, bool]  # of a Format


@pytest.mark.parametrize(("dtype", "formats"), [("float32", 17), ("bfloat16", 9), ("float16", 9)])
def test_same_bits_as_the_reference(dtype: str, formats: int) -> None:
    script = Path(__file__).parents[1] / "triton_interpreted.py"
    run = subprocess.run([sys.executable, script, dtype], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{formats} formats equal\n"


def formats_of_presets() -> list[Numbers]:
    """Every format of the packed format that a preset's rules ask for."""
    found: dict[Numbers, None] = {}

    def note(*arguments: Any) -> tuple[Any, ...]:
        found[arguments[1:]] = None
        return ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.dropit, "sparsify", note)
        for preset in presets():
            for rule in make_config(None, preset=preset).rules:
                codec = CODEC[rule.codec]
                if codec.name in ("mink", "quant"):
                    codec.pack(torch.empty(0), codec.defaults() | dict(rule.options))
    return list(found)


FORMATS = formats_of_presets()
OTHERS: list[Numbers] = [  # what a config may ask for beside
    (5000, 1024, 3, 0, False),
    (5000, 1024, 3, 0, True),
    (FULL, 256, 4, 1, False),
    (FULL, LARGEST_BLOCK, 5, 0, False),
    (5000, LARGEST_BLOCK, 4, 0, False),
    (5000, LARGEST_BLOCK, 3, 0, False),
]


def launch(op: Callable[..., Any], *args: Any) -> Launch:
    """What an op launches for its arguments: one kernel."""
    with recorded() as found:
        op(*args)
    assert len(found) == 1, op
    return found[0]


def both_ways(numel: int, dtype: torch.dtype, form: Numbers) -> tuple[Launch, Launch]:
    """The launches of packing and unpacking."""
    x = torch.empty(numel, dtype=dtype, device="meta")
    with recorded():
        parts = kernels.sparsify(x, Format(*form))
    back = *parts, numel, dtype, Format(*form)
    return launch(kernels.sparsify, x, Format(*form)), launch(kernels.unsparsify, *back)


def test_the_presets_have_the_formats_that_are_compiled_here() -> None:
    assert len(FORMATS) >= 8
    assert (FULL, 256, 5, 0, False) in FORMATS
    assert (5000, 1024, 4, 0, False) in FORMATS


def compiled(form: Numbers, dtype: torch.dtype, capability: int) -> tuple[Figures, Figures]:
    """What packing and unpacking take of a GPU."""
    pack, unpack = both_ways(DEIT, dtype, form)
    packing, unpacking = pack.build(capability), unpack.build(capability)
    assert 16 in packing.loads
    assert 16 in unpacking.stores
    return packing, unpacking


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_format_of_the_presets_compiles_without_spills_and_in_wide_accesses(
    form: Numbers, dtype: torch.dtype, capability: int
) -> None:
    packing, unpacking = compiled(form, dtype, capability)
    assert packing.spills == unpacking.spills == 0
    # two warps, at least, for each of the four schedulers of an SM
    assert packing.registers <= (255 if form[0] < FULL else 168)
    assert unpacking.registers <= 128
    assert max(packing.shared, unpacking.shared) <= 8192


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, 90), (torch.bfloat16, 80)])
@pytest.mark.parametrize("form", OTHERS, ids=str)
def test_any_format_compiles(form: Numbers, dtype: torch.dtype, capability: int) -> None:
    packing, unpacking = compiled(form, dtype, capability)
    # a thread's share of 8192 elements is at the limit of what it may have
    assert packing.spills <= 192
    assert unpacking.spills <= 64
    assert max(packing.shared, unpacking.shared) <= 65536  # an SM of sm_80 has 164 KiB


@pytest.mark.parametrize(
    ("form", "exact"),
    [
        ((FULL, 256, 3, 0, False), "sqrt.rn.f32"),
        ((FULL, 256, 5, 1, True), "sqrt.rn.f32"),
        ((FULL, 256, 4, 2, True), "div.rn.f32"),
        ((5000, 256, 4, 0, False), "div.rn.f32"),
    ],
)
def test_no_arithmetic_is_fused_or_approximate(form: Numbers, exact: str) -> None:
    pack, unpack = both_ways(4096, torch.float32, form)
    ptx = pack.build(80).ptx
    assert exact in ptx
    for text in (ptx, unpack.build(80).ptx):
        for inexact in ("fma.rn.f32", "div.full", "div.approx", "sqrt.approx", ".ftz"):
            assert inexact not in text


def of_every_op(numel: int, dtype: torch.dtype) -> dict[str, tuple[Launch, float]]:
    """Name -> the launch of each op on `numel` elements, and the bytes that it has to move."""
    x = torch.empty(numel, dtype=dtype, device="meta")
    codes = x.to(torch.uint8)
    dense = numel * dtype.itemsize
    found: dict[str, tuple[Launch, float]] = {}
    for form in (*FORMATS, *OTHERS):
        least = dense + Format(*form).nbytes(numel, dtype.itemsize)
        pack, unpack = both_ways(numel, dtype, form)
        found |= {f"pack {form}": (pack, least), f"unpack {form}": (unpack, least)}
    coded, drawn = Format(FULL, 256, 6, 2), Format(1000, 1024)
    least = dense + coded.nbytes(numel, dtype.itemsize)
    mean = torch.empty(1, device="meta")
    channels = x, mean, mean, 1, coded
    with recorded():
        parts = kernels.sparsify_channels(*channels)
    back = *parts, mean, mean, 1, numel, dtype, coded
    found["pack channels"] = launch(kernels.sparsify_channels, *channels), least
    found["unpack channels"] = launch(kernels.unsparsify_channels, *back), least
    least = dense + drawn.nbytes(numel, dtype.itemsize)
    found["sample"] = launch(kernels.sample, x, drawn), least
    for bits in range(1, 9):
        packed = torch.empty((numel * bits + 7) // 8, dtype=torch.uint8, device="meta")
        least = numel + packed.numel()
        found[f"pack_uint {bits}"] = launch(kernels.pack_uint, codes, bits), least
        found[f"unpack_uint {bits}"] = launch(kernels.unpack_uint, packed, bits, numel), least
    packed = torch.empty((numel * 3 + 7) // 8, dtype=torch.uint8, device="meta")
    levels = [float(i) for i in range(8)]
    least = dense + packed.numel()
    found["encode_steps"] = launch(kernels.encode_steps, x, levels[1:], 3), least
    found["decode_steps"] = launch(kernels.decode_steps, packed, levels, 3, numel, dtype), least
    bit = torch.empty((numel + 7) // 8, dtype=torch.uint8, device="meta")
    found["pack_between"] = launch(kernels.pack_between, x, 0.0, None), dense + bit.numel()
    found["apply_mask"] = launch(kernels.apply_mask, bit, x, 0.0), 2 * dense + bit.numel()
    window = ([1, 2 * numel], [1, 2], [1, 2], [0, 0], [1, 1])
    positions = torch.empty(1, 1, 1, numel, dtype=torch.int64, device="meta")
    offsets = positions.to(torch.uint8)
    found["encode_window"] = launch(kernels.encode_window, positions, *window), 9 * numel
    found["decode_window"] = launch(kernels.decode_window, offsets, *window), 9 * numel
    return found


@pytest.mark.parametrize("numel", [1, 2**33])
def test_every_kernel_compiles_for_the_smallest_and_the_largest(numel: int) -> None:
    """Triton makes a constant of each argument that is 1, and int64 of large ones."""
    done: dict[tuple[str, int], None] = {}
    for name, (one, _) in of_every_op(numel, torch.bfloat16).items():
        bits = one.arguments.get("BITS", 0)
        if (one.kernel.__name__, bits) not in done or "channels" in name:
            assert one.build(80).registers > 0, name
            done[one.kernel.__name__, bits] = None
    assert len({kernel for kernel, _ in done}) == 10


@pytest.mark.parametrize("numel", [1, 255, 2**16 + 1, DEIT, 2**31 - 1, 2**31, 2**33])
def test_every_op_is_one_launch_within_the_limits_of_a_grid(numel: int) -> None:
    for name, (one, _) in of_every_op(numel, torch.bfloat16).items():
        (grid,) = one.grid
        assert 1 <= grid <= MAX_GRID, name
        assert one.options.get("num_warps", 4) <= 16, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_reads_once_and_writes_the_packed_form_once(dtype: torch.dtype) -> None:
    """What a launch is given is what it moves: it has no temporary in memory to pass data by."""
    for name, (one, least) in of_every_op(DEIT, dtype).items():
        given = [v for v in one.arguments.values() if isinstance(v, torch.Tensor)]
        storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in given}
        moved = sum(storages.values())
        assert least <= moved <= 1.15 * least, f"{name}: {moved / DEIT:.2f} bytes an element"


@pytest.mark.parametrize(
    ("dtype", "block", "said"),
    [
        (torch.float64, 64, "torch.float64 in blocks of 64 has no CUDA kernel"),
        (torch.float32, 0, "torch.float32 in whole tensors has no CUDA kernel"),
        (torch.float32, 2 * LARGEST_BLOCK, "in blocks of 16384 has no CUDA kernel"),
    ],
)
def test_what_has_no_kernel_says_so_once(
    dtype: torch.dtype,
    block: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    x, form = torch.randn(100, dtype=dtype), Format(5000, block, 4)
    for _ in range(2):
        parts = kernels.sparsify(x, form)
        kernels.unsparsify(*parts, 100, dtype, form)
        kernels.sample(x, Format(5000, block))
    assert caplog.text.count(said) == 1
    for left, right in zip(parts, reference.sparsify(x, form), strict=True):
        assert torch.equal(left, right)


class Driver:
    """A GPU that compiles, and on which nothing is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What goes to the compiled kernels, behind all that Triton itself does at a launch."""
    found: list[tuple[Any, ...]] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def launcher(self: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: found.append((grid, *args))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(CompiledKernel, "__getitem__", launcher)
    monkeypatch.setattr(launching, "_READY", {})
    monkeypatch.setattr(driver, "_active", Driver())
    return found


def every_launch() -> list[Callable[[Tensor], object]]:
    """A call of each op that launches a kernel, with its own tensors behind the first."""
    form, seed = Format(5000, 1024, 4, 0, True), torch.tensor([1])
    mean, window = torch.zeros(4), ([2, 2], [2, 2], [0, 0], [1, 1])
    pooled = torch.zeros(1, 4, 16, 32, dtype=torch.uint8)

    def channels(x: Tensor) -> None:
        parts = kernels.sparsify_channels(x, mean, mean, 1024, form, seed)
        kernels.unsparsify_channels(*parts, mean, mean, 1024, x.numel(), x.dtype, form)

    return [
        lambda x: kernels.unsparsify(*kernels.sparsify(x, form, seed), x.numel(), x.dtype, form),
        channels,
        lambda x: kernels.sample(x, Format(5000, 64), seed),
        lambda x: kernels.decode_steps(
            kernels.encode_steps(x, [0.0], 1), [-0.0, 1.0], 1, x.numel(), x.dtype
        ),
        lambda x: kernels.apply_mask(kernels.pack_between(x, 0.0, None), x, 0.5),
        lambda x: kernels.unpack_uint(kernels.pack_uint(x > 0, 3), 3, x.numel()),
        lambda x: kernels.encode_window(
            kernels.decode_window(pooled, [32, 64], *window), [32, 64], *window
        ),
    ]


@pytest.mark.parametrize("number", range(len(every_launch())))
def test_triton_takes_every_launch_and_is_asked_once(
    number: int, launched: list[tuple[Any, ...]]
) -> None:
    call, x = every_launch()[number], torch.randn(4097)
    call(x[:4096])
    assert launched == []  # through Triton, which compiles
    call(x[:4096])
    (first, *_) = launched
    assert all(len(grid) == 3 for grid, *_ in launched)
    tensors = [a for a in first[1:] if isinstance(a, Tensor)]
    assert first[1 : 1 + len(tensors)] == tuple(tensors)  # pointers first, as they were given
    call(x[1:])  # not aligned: another program, through Triton
    pointers = [a for _, *args in launched for a in args if isinstance(a, Tensor)]
    assert all(p.data_ptr() % 16 == 0 for p in pointers)


def test_levels_that_differ_in_the_sign_of_zero_are_other_launches() -> None:
    packed = torch.zeros(4, dtype=torch.uint8, device="meta")
    with recorded() as found:
        for zero in (0.0, -0.0):
            kernels.decode_steps(packed, [zero, 1.0], 1, 32, torch.float32)
    plus, minus = (launch.arguments["LEVELS"] for launch in found)
    assert plus != minus
