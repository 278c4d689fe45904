"""The tests' way to compile C++ kernels, one file for a graph, gives the bits of inductor's own."""

from __future__ import annotations

from unittest import mock

import cpp_kernels
import pytest
import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache


def several(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reductions of one another, with a size among the arguments of their kernels."""
    y = torch.tanh(x.softmax(-1) @ x.T)
    return y.cumsum(0), (y @ x).var(0), y.argmax(-1)


def outputs() -> list[Tensor]:
    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    torch.manual_seed(0)
    compiled = torch.compile(several, dynamic=True)
    with torch.compiler.config.patch(force_disable_caches=True):
        return [out for rows in (9, 34) for out in compiled(torch.randn(rows, 20))]


def test_kernels_of_a_graph_are_one_file_with_the_bits_of_one_file_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with mock.patch.object(cpp_kernels, "load", wraps=cpp_kernels.load) as load:
        found = outputs()
    ((kernels,), _) = load.call_args
    assert load.call_count == 1
    assert len(kernels) > 2
    assert any("int64_t" in kind for kernel in kernels for kind in kernel.argtypes)
    own = dict(zip(("cpp_pybinding", "wait"), cpp_kernels.INDUCTORS_OWN, strict=True))
    for name, method in own.items():
        monkeypatch.setattr(AsyncCompile, name, method)
    expected = outputs()
    assert load.call_count == 1
    assert all(map(torch.equal, found, expected))
