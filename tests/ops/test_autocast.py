"""Autocast: the dtypes and the bits of the dense op, whatever its policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_calls import LOSSLESS, Case, T, assert_agrees, case_id, graph_of, pack_graph, run
from op_cases import ALL_CASES, CASES, RECORDS, spelled, spellings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dropit_fx.ops import autocasting
from dropit_fx.ops.autocasting import asked
from dropit_fx.ops.table import RULES, bind
from dropit_fx.runtime.packed_call import PACKED_OPS

LOWER = [torch.bfloat16, torch.float16]


def under_autocast(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def call(*leaves: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return function(*leaves)

    return call


def assert_agrees_under_autocast(
    target: Any, call: Case, dtype: torch.dtype, source: torch.dtype
) -> None:
    tensors = call.tensors(source)
    dense = graph_of(target, call)
    with torch.autocast("cpu", dtype, enabled=source is dtype):  # some have no kernel for it
        packed, _ = pack_graph(dense, tensors, LOSSLESS)
    found, wanted = (run(under_autocast(f, dtype), tensors) for f in (packed, dense))
    assert found[0].dtype == wanted[0].dtype
    assert_agrees(call, found, wanted)


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize(("name", "target"), spellings(), ids=case_id)
def test_every_spelling_has_the_dtypes_and_bits_of_dense_under_autocast(
    name: str, target: Any, dtype: torch.dtype
) -> None:
    for source in (torch.float32, dtype):
        assert_agrees_under_autocast(target, spelled(name, target), dtype, source)


@pytest.mark.parametrize(("name", "call"), ALL_CASES, ids=case_id)
def test_every_case_has_the_dtypes_and_bits_of_dense_under_autocast(name: str, call: Case) -> None:
    assert_agrees_under_autocast(RULES[name].targets[0], call, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_operands_of_different_dtypes_are_cast_as_dense_casts_them(name: str) -> None:
    call, target = CASES[name][0], RULES[name].targets[0]
    leaves = call.tensors()
    for odd, leaf in enumerate(leaves):
        if not leaf.is_floating_point():
            continue
        tensors = list(leaves)
        tensors[odd] = leaf.detach().bfloat16().requires_grad_(leaf.requires_grad)
        dense = graph_of(target, call)
        with torch.autocast("cpu", torch.bfloat16):
            packed, _ = pack_graph(dense, tensors, LOSSLESS)
        try:
            wanted = run(under_autocast(dense, torch.bfloat16), tensors)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                run(under_autocast(packed, torch.bfloat16), tensors)
            continue
        found = run(under_autocast(packed, torch.bfloat16), tensors)
        assert found[0].dtype == wanted[0].dtype
        assert_agrees(call, found, wanted)


@contextmanager
def autocast_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """``torch.autocast``, whose own context refuses a CUDA that is not there."""
    was, before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, was)
        torch.set_autocast_dtype(device, before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_packed_in_the_lower_precision_are_those_that_autocast_lowers(
    name: str, dtype: torch.dtype, device: str
) -> None:
    rule, call = RULES[name], CASES[name][0]
    bound = bind(rule, call.args, call.kwargs) or {}
    dtypes = iter([t.dtype for t in call.tensors()])
    with FakeTensorMode():
        given = [
            torch.empty(a.shape, device=device, dtype=next(dtypes)) if isinstance(a, T) else a
            for a in bound.values()
        ]
    with autocast_in(dtype, device):
        try:
            casts = dict(zip(bound, asked(rule, tuple(given)), strict=True))
        except RuntimeError:  # PyTorch refuses the op, and so does a packed call
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                PACKED_OPS[name](*given, packed={})
            return
    operands = [r.operand for r in rule.reads if casts.get(r.operand)]
    lowered = any(casts[n] == dtype for n in operands)
    assert lowered == (rule.autocast == "lower" or device in RECORDS[name].lowered_on)


def test_a_refusal_that_is_expected_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocasting, "_ANSWERS", {})
    logger, said = logging.getLogger(FakeTensorMode.__module__), list[logging.LogRecord]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    logger.addHandler(handler)
    x, weight = torch.randn(2, 4, 8, dtype=torch.bfloat16), torch.randn(8, 8)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            casts = asked(RULES["matmul"], (x, weight.expand(2, 8, 8)))
    finally:
        logger.removeHandler(handler)
    assert casts == (None, torch.bfloat16)
    assert not said
