"""The helper that compiles kernels without a GPU sees what the tests of the kernels rely on."""

from __future__ import annotations

import subprocess

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from compiled_kernels import _ptxas, build

SIGNATURE = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i64"}


@triton.jit
def _double(x_ptr, out_ptr, n, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def _centre(x_ptr, out_ptr, n, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x - tl.sum(x), mask=i < n)


@pytest.mark.parametrize("capability", [80, 90])
def test_known_alignment_gives_accesses_of_sixteen_bytes(capability: int) -> None:
    known = build(_double, SIGNATURE, {"TILE": 1024}, SIGNATURE, capability)
    assert known.loads == known.stores == {16}
    assert f".target sm_{capability}" in known.ptx
    assert (known.spills, known.shared) == (0, 0)
    assert 0 < known.registers < 64
    unknown = build(_double, SIGNATURE, {"TILE": 1024}, (), capability)
    assert unknown.loads == unknown.stores == {4}


def test_a_kernel_with_too_few_registers_spills_and_shared_memory_is_counted() -> None:
    figures = build(_centre, SIGNATURE, {"TILE": 2048}, (), 90, num_warps=1, maxnreg=32)
    assert figures.spills > 100
    assert figures.registers <= 32
    assert build(_centre, SIGNATURE, {"TILE": 2048}, (), 90, num_warps=8).shared > 0


def test_an_argument_without_a_type_or_value_is_named() -> None:
    with pytest.raises(KeyError, match="TILE"):
        build(_double, SIGNATURE, {}, (), 90)


def test_what_ptxas_refuses_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        _ptxas(".version 8.0\n.target sm_90\n.address_size 64\nnonsense\n")
