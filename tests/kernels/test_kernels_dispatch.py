"""What every op does on CUDA before its kernel runs, shown without a GPU."""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dropit_fx  # noqa: F401  registers the ops
from dropit_fx.kernels import Format, dispatch, reference


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())


def test_a_machine_without_triton_uses_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "dropit_fx.kernels.triton", None)  # makes the import fail
    x = torch.randn(100)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            op = dispatch.on_cuda("sparsify", reference.sparsify)
            packed = op(x, Format(1000, 64))
    for left, right in zip(packed, reference.sparsify(x, Format(1000, 64)), strict=True):
        assert torch.equal(left, right)
    (record,) = caplog.records
    assert "no Triton" in record.getMessage()


@pytest.mark.parametrize(
    ("device", "entered"), [("cuda:1", [torch.device("cuda:1")]), ("cuda:0", []), ("cpu", [])]
)
def test_a_kernel_is_launched_on_the_device_of_its_tensor(
    device: str, entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[Any] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.append("left")

    module = types.ModuleType("triton")
    module.op = lambda x, n: (list(inside), n)
    monkeypatch.setitem(sys.modules, "dropit_fx.kernels.triton", module)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        x = torch.empty(8, device=device)
    assert dispatch.on_cuda("op", reference.sparsify)(x, 3) == (entered, 3)
    assert inside == [*entered, *["left"] * len(entered)]


def test_every_op_has_a_kernel_on_cuda() -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    ops = {op for op in registered("CompositeExplicitAutograd") if op.startswith("dropit::")}
    assert len(ops) >= 12
    assert ops - set(registered("CUDA")) == {"dropit::attention_backward"}  # called on CPU only


def test_a_warning_is_given_once_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for kind in ("float64", "block 0", "float64"):
            dispatch.warn_once(kind, f"{kind} runs in PyTorch")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["dropit_fx: float64 runs in PyTorch", "dropit_fx: block 0 runs in PyTorch"]
