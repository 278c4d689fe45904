"""The C++ kernels that inductor writes for a graph are compiled as one file.

Inductor compiles each by itself. Most of what g++ does then is PyTorch's headers, precompiled as
they are: 55 kernels of a small Swin take a minute, and five seconds together. Their code, their
flags and the functions that read their arguments stay inductor's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache

INDUCTORS_OWN = (AsyncCompile.cpp_pybinding, AsyncCompile.wait)


@dataclass(frozen=True)
class Kernel:
    """One that is not compiled yet."""

    argtypes: tuple[str, ...]
    source: str


def compile_graphs_as_one_file() -> None:
    """From now on, in this process."""

    def noted(self: AsyncCompile, argtypes: list[str], source_code: str) -> Kernel:
        return Kernel(tuple(argtypes), source_code)

    def compiled(self: AsyncCompile, scope: dict[str, Any]) -> None:
        kernels = {name: made for name, made in scope.items() if isinstance(made, Kernel)}
        if kernels:
            run = load(kernels.values())
            scope.update((name, functools.partial(run, n)) for n, name in enumerate(kernels))
        wait(self, scope)

    wait = INDUCTORS_OWN[1]
    AsyncCompile.cpp_pybinding, AsyncCompile.wait = noted, compiled


def load(kernels: Iterable[Kernel]) -> Any:
    """A function of the number of a kernel and of its arguments."""
    includes: dict[str, None] = {}
    sources, cases = [], []
    for n, kernel in enumerate(kernels):
        includes |= dict.fromkeys(re.findall(r"^#include .*$", kernel.source, re.MULTILINE))
        source = re.sub(r"^#include .*$", "", kernel.source, flags=re.MULTILINE)
        source, found = re.subn(r"\bkernel\(", f"kernel_{n}(", source)
        assert found == 1, kernel.source
        sources.append(f"namespace file_{n} {{\n{source}\n}}\n")
        read = ", ".join(
            f"parse_arg<{kind.replace('const ', '')}>(args, {place})"
            for place, kind in enumerate(kernel.argtypes, 1)
        )
        cases.append(f"case {n}: file_{n}::kernel_{n}({read}); break;")
    choice = f"switch (PyLong_AsLong(PyTuple_GET_ITEM(args, 0))) {{ {' '.join(cases)} }}"

    class OneFile(CppPythonBindingsCodeCache):
        """Its arguments are checked for their number, which differs here."""

        call_entry_function = f"{choice} Py_RETURN_NONE;".replace("{", "{{").replace("}", "}}")
        suffix_template = CppPythonBindingsCodeCache.suffix_template.replace(
            "PyTuple_GET_SIZE(args) != {arg_len}", "false"
        )

    return OneFile.load_pybinding([], "\n".join([*includes, *sources]))
