"""Compiles a Triton kernel for a GPU that need not be there, and reads what it takes of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas")
_ACCESS = r"\b{}\.global(?:\.[A-Za-z_][\w:]*)*?(?:\.v(\d+))?\.[bfsu](\d+)\b"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one compiled kernel takes."""

    registers: int  # of a thread
    spills: int  # bytes of a thread, stores and loads together
    shared: int  # bytes of a program, static and dynamic
    ptx: str

    @property
    def loads(self) -> frozenset[int]:
        """Bytes that a thread's loads from global memory read at once, each width once."""
        return self._widths("ld")

    @property
    def stores(self) -> frozenset[int]:
        """Bytes that a thread's stores to global memory write at once, each width once."""
        return self._widths("st")

    def _widths(self, access: str) -> frozenset[int]:
        found = re.findall(_ACCESS.format(access), self.ptx)
        return frozenset(int(count or 1) * int(bits) // 8 for count, bits in found)


def build(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Collection[str],
    capability: int,
    **options: Any,
) -> Figures:
    """Compiles `kernel` (a function under `triton.jit`), and asks ptxas.

    Args:
        kernel: the function.
        signature: type of each argument that is no constant: ``{"x_ptr": "*fp32", "n": "i64"}``.
        constants: value of each ``tl.constexpr`` argument.
        divisible: arguments that are multiples of 16, as a launch finds of pointers and sizes.
        capability: of the GPU: 80, 90.
        options: as of a launch: ``num_warps``, ``enable_fp_fusion``.

    Raises:
        KeyError: an argument is in neither `signature` nor `constants`, or in both.
        subprocess.CalledProcessError: ptxas refuses the kernel.
    """
    names = kernel.arg_names
    if sorted(names) != sorted([*signature, *constants]):
        raise KeyError(f"the arguments are {names}, not {[*signature, *constants]}")
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    said = _ptxas(ptx)
    (registers,) = re.findall(r"Used (\d+) registers", said)
    static = re.findall(r"(\d+) bytes smem", said)
    return Figures(
        registers=int(registers),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        shared=sum(map(int, static)) + compiled.metadata.shared,
        ptx=ptx,
    )


def _ptxas(ptx: str) -> str:
    """What `ptxas -v` says of a program: registers, spills, shared memory."""
    arch = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", f"--gpu-name={arch}", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
