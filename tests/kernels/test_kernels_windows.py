"""Max-pool's indices: the ops, and which of them runs where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dropit_fx.kernels import windows
from dropit_fx.kernels.windows import decode_window_reference, encode_window_reference
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


CALLS = [
    ((2, 3, 9, 9), {}, torch.channels_last),
    ((3, 9, 7), {"kernel_size": (2, 3), "stride": (1, 3), "ceil_mode": True}, None),
    ((2, 5, 17, 11), {"dilation": (2, 3), "kernel_size": (3, 2)}, torch.channels_last),
    ((1, 2, 9, 8, 7), {"dilation": (1, 2, 1), "ceil_mode": True}, torch.channels_last_3d),
    ((2, 2, 6, 6, 6), {"kernel_size": (2, 3, 6), "padding": (1, 0, 3)}, torch.channels_last_3d),
    ((4, 64, 40, 40), {"kernel_size": 16, "stride": 1, "padding": 8}, torch.channels_last),
    ((2, 3, 4, 4), {"kernel_size": 4, "padding": 2, "stride": 5}, torch.channels_last),
    ((0, 3, 9, 9), {}, torch.channels_last),
]


@pytest.mark.parametrize(("shape", "changed", "last"), CALLS)
@pytest.mark.parametrize("is_last", [False, True])
def test_the_kernel_in_c_gives_the_bits_of_the_formula(
    shape: tuple[int, ...], changed: dict[str, Any], last: Any, is_last: bool
) -> None:
    dims = 3 if len(shape) == 5 else 2
    window = Window(dims, CALL | changed)
    x = torch.randint(4, shape).float()  # many ties
    x.view(-1)[::7] = float("nan")
    if is_last:
        x = x.contiguous(memory_format=last) if last else x.transpose(-1, -2)
    op = getattr(torch.ops.aten, f"max_pool{dims}d_with_indices")
    _, indices = op(x, *window.arguments)
    call = (list(x.shape[-dims:]), window.kernel, window.stride, window.padding, window.dilation)
    wanted = encode_window_reference(indices, *call)
    codes = dropit.encode_window(indices, *call)
    assert torch.equal(codes, wanted)
    assert codes.stride() == indices.stride()
    again = dropit.decode_window(codes, *call)
    assert torch.equal(again, indices)
    assert torch.equal(again, decode_window_reference(codes, *call))


def test_indices_of_another_layout_are_encoded_by_the_formula() -> None:
    window, call = _window()
    _, indices = torch.ops.aten.max_pool2d_with_indices(torch.randn(2, 3, 9, 9), *window.arguments)
    turned = indices.transpose(0, 1).contiguous().transpose(0, 1)
    codes = dropit.encode_window(turned, [9, 9], *call)
    assert torch.equal(codes, dropit.encode_window(indices, [9, 9], *call))
    assert torch.equal(dropit.decode_window(codes, [9, 9], *call), indices)


@pytest.mark.skipif(windows.library() is None, reason="no C kernels here")
def test_in_eager_mode_max_pool_runs_the_kernel_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_formula(*args: Any) -> None:
        raise AssertionError("the formula ran")

    monkeypatch.setattr("dropit_fx.ops.pooling.encode_window_reference", no_formula)
    monkeypatch.setattr(windows, "encode_window_reference", no_formula)
    window, _ = _window()
    _, indices = torch.ops.aten.max_pool2d_with_indices(torch.randn(2, 3, 9, 9), *window.arguments)
    assert window.encode(indices, [9, 9]).dtype == torch.uint8
