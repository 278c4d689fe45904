"""Records what a function would launch on a GPU: kernels, grids and arguments, without one.

Tensors may be of any device, `meta` too: nothing runs. What is recorded is what the launcher said,
so that compiling it compiles the program that a GPU would run.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from compiled_kernels import Figures, build

import dropit_fx.kernels.triton as kernels

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by the names of the kernel's parameters
    options: Mapping[str, Any]  # num_warps and the like

    def build(self, capability: int) -> Figures:
        """Compiles it, with what Triton would specialise it for."""
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        constants |= {n for n, v in self.arguments.items() if isinstance(v, int) and v == 1}
        given = {n: v for n, v in self.arguments.items() if n not in constants}
        divisible = [n for n, v in given.items() if isinstance(v, torch.Tensor) or _sixteen(v)]
        return build(
            self.kernel,
            {n: _type(v) for n, v in given.items()},
            {n: v for n, v in self.arguments.items() if n in constants},
            divisible,
            capability,
            **self.options,
        )


def _sixteen(value: Any) -> bool:
    return isinstance(value, int) and value % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class _Recorder:
    def __init__(self, kernel: Any, into: list[Launch]) -> None:
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            named = dict(zip(names, args, strict=False))
            named = {k: (named | kwargs)[k] for k in names}  # a KeyError: one is not given
            options = {k: v for k, v in kwargs.items() if k not in names}
            self.into.append(
                Launch(kernel=self.kernel, grid=grid, arguments=named, options=options)
            )

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch of the package's kernels in the block, in order; none of them runs."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for info in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
            module = importlib.import_module(info.name)
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    patch.setattr(module, name, _Recorder(value, launches))
        yield launches
