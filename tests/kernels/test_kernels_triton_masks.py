"""The Triton kernels of masks and windows: the bits of PyTorch, and what a GPU makes of them."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compiled_kernels import Figures, build

from dropit_fx.kernels import dispatch, masks
from dropit_fx.kernels.triton import masks as triton_masks
from dropit_fx.kernels.triton import windows as triton_windows
from dropit_fx.kernels.triton.launch import programs


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("float32", "49 masks equal"),
        ("bfloat16", "49 masks equal"),
        ("float16", "49 masks equal"),
        ("windows", "30 pools equal"),
    ],
)
def test_same_bits_as_the_reference(what: str, said: str) -> None:
    script = Path(__file__).parents[1] / "triton_interpreted_masks.py"
    run = subprocess.run([sys.executable, script, what], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{said}\n"


def _exact(figures: Figures) -> None:
    """No spills, and no arithmetic that PyTorch does otherwise."""
    assert figures.spills == 0
    for other in (".ftz", "fma.rn", "approx"):
        assert other not in figures.ptx


SINGLE, HALVES = "fp32", ("bf16", "fp16")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [SINGLE, *HALVES])
def test_masks_are_packed_with_loads_of_sixteen_bytes(dtype: str, capability: int) -> None:
    signature = {"x_ptr": f"*{dtype}", "bits_ptr": "*u8", "numel": "i64"}
    figures = build(
        triton_masks._pack_between_kernel,
        signature | {"low": "fp32", "high": "fp32"},
        {"TILE": triton_masks.TILE},
        signature,
        capability,
    )
    _exact(figures)
    assert figures.loads == {16}
    assert figures.registers <= 64


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, *HALVES])
def test_masks_are_applied_with_accesses_of_sixteen_bytes(
    dtype: str, scaled: bool, capability: int
) -> None:
    signature = {"bits_ptr": "*u8", "grad_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "numel": "i64"}
    figures = build(
        triton_masks._apply_mask_kernel,
        signature | {"off": "fp32"},
        {"SCALED": scaled, "TILE": triton_masks.TILE},
        signature,
        capability,
    )
    _exact(figures)
    assert figures.loads == {16, 1}  # 1: the bytes of the mask
    assert figures.stores == {16}
    assert figures.registers <= 96


NCHW = ([8, 64, 56, 56], 1, [112, 112], [3, 3], [2, 2], [1, 1], [1, 1])
NHWC = ([8, 64, 56, 56], 64, [112, 112], [3, 3], [2, 2], [1, 1], [1, 1])
VOLUME = ([2, 8, 16, 28, 28], 1, [32, 56, 56], [2, 3, 3], [2, 2, 2], [0, 1, 1], [1, 1, 2])
LARGE = ([2, 8, 16, 2**14, 2**14], 1, [32, 2**15, 2**15], [2] * 3, [2] * 3, [0] * 3, [1] * 3)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pool", [NCHW, NHWC, VOLUME, LARGE], ids=["nchw", "nhwc", "3d", "large"])
def test_windows_are_read_and_written_in_wide_accesses(pool: Any, capability: int) -> None:
    shape, inner, sizes, *window = pool
    given = triton_windows.geometry(shape[-len(sizes) :], inner, sizes, *window)
    assert given["WIDE"] == (pool is LARGE)
    # what a launch takes for a constant
    constants = {n: v for n, v in given.items() if n.isupper() or v == 1}
    types = {n: "i64" if v >= 2**31 else "i32" for n, v in given.items() if n not in constants}
    for kernel, read, written, widths in (
        (triton_windows._encode_kernel, "*i64", "*u8", (16, 8)),
        (triton_windows._decode_kernel, "*u8", "*i64", (8, 16)),
    ):
        source, target = kernel.arg_names[:2]
        signature = {source: read, target: written, "numel": "i64"}
        figures = build(kernel, signature | types, constants, signature, capability)
        assert figures.spills == 0
        assert (figures.loads, figures.stores) == ({widths[0]}, {widths[1]})
        slow = len(re.findall(r"\b(?:div|rem)\.s64", figures.ptx))
        assert pool is LARGE or slow == 1, "one for a program, none for an element"


def test_one_element_is_compiled_too() -> None:
    # a launch takes a size of 1 for a constant
    build(
        triton_masks._pack_between_kernel,
        {"x_ptr": "*fp32", "bits_ptr": "*u8", "low": "fp32", "high": "fp32"},
        {"numel": 1, "TILE": triton_masks.TILE},
        (),
        80,
    )
    given = triton_windows.geometry([1, 1], 1, [1, 1], *([1, 1], [1, 1], [0, 0], [1, 1]))
    pointers = {"indices_ptr": "*i64", "codes_ptr": "*u8"}
    build(triton_windows._encode_kernel, pointers, given | {"numel": 1}, (), 80)


@pytest.mark.parametrize("module", [triton_masks, triton_windows])
@pytest.mark.parametrize(
    "numel", sorted({n for e in range(34) for n in (2**e - 1, 2**e, 2**e + 1)})
)
def test_launches_stay_within_the_limits_of_cuda(module: Any, numel: int) -> None:
    x, *rest = programs(numel, module.TILE)
    assert x <= 2**31 - 1
    assert all(n <= 65535 for n in rest)
    assert (x - 1) * module.TILE < numel <= x * module.TILE or numel == x == 0


def test_float64_is_refused_by_the_kernels_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    x = torch.randn(77, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        bits = triton_masks.pack_between(x, 0.0, None)
        out = triton_masks.apply_mask(bits, x, 0.01)
    assert torch.equal(bits, masks.pack_between_reference(x, 0.0, None))
    assert torch.equal(out, masks.apply_mask_reference(bits, x, 0.01))
    (record,) = caplog.records
    assert "masks of torch.float64 run in PyTorch, with about 19 bytes" in record.getMessage()


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes are no mask of 3 elements"):
        triton_masks.apply_mask(torch.zeros(2, dtype=torch.uint8), torch.zeros(3), 0.0)
