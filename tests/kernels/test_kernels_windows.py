"""Max-pool's indices: the ops, and which of them runs where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dropit_fx.ops.pooling import Window

dropit = torch.ops.dropit
CALL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False}


def _window() -> tuple[Window, tuple[Any, ...]]:
    window = Window(2, CALL)
    return window, (window.kernel, window.stride, window.padding, window.dilation)


def test_ops_give_what_the_window_gives_and_pass_opcheck() -> None:
    window, call = _window()
    _, indices = torch.ops.aten.max_pool2d_with_indices(torch.randn(2, 3, 9, 9), *window.arguments)
    codes = dropit.encode_window(indices, [9, 9], *call)
    assert torch.equal(codes, window.encode(indices, [9, 9]))
    assert codes.dtype == torch.uint8
    assert torch.equal(dropit.decode_window(codes, [9, 9], *call), indices)
    assert torch.equal(window.decode(codes, [9, 9]), indices)
    torch.library.opcheck(dropit.encode_window.default, (indices, [9, 9], *call))
    torch.library.opcheck(dropit.decode_window.default, (codes, [9, 9], *call))


def _targets(device: str) -> set[str]:
    window, _ = _window()

    def there_and_back(indices: torch.Tensor) -> torch.Tensor:
        return window.decode(window.encode(indices, [9, 9]), [9, 9])

    with FakeTensorMode():
        indices = torch.empty(2, 3, 5, 5, dtype=torch.int64, device=device)
        graph = make_fx(there_and_back)(indices).graph
    return {str(n.target).split(".")[0] for n in graph.nodes if n.op == "call_function"}


def test_on_cuda_each_is_one_kernel_but_a_compiler_gets_the_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _targets("cuda") == {"dropit"}
    assert _targets("cpu") == {"aten"}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "dropit" not in _targets("cuda")
