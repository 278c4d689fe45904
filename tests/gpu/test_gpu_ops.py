"""Every case of the op tables on CUDA: the bits of dense CUDA, forwards and backwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_calls import LOSSLESS, Case, T, assert_same, case_id, graph_of, pack_graph, run
from op_cases import ALL_CASES, CASES, RECORDS
from torch import Tensor

from dropit_fx.ops.table import RULES


@pytest.fixture(autouse=True)
def the_same_algorithms_again() -> Iterator[None]:
    """Some of cuDNN's algorithms add up in another order at every call."""
    as_it_is = torch.backends.cudnn.allow_tf32
    # PyTorch's own test helpers, which a worker may have imported, forbid setting the flag alone
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=as_it_is):
        yield


def tensors_of(
    call: Case, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    leaves = call.tensors(dtype)
    return [t.detach().to(device).requires_grad_(t.requires_grad) for t in leaves]


def alerts(function: Callable[..., Any], tensors: list[Tensor]) -> list[str]:
    """What PyTorch itself says of ops whose results on CUDA differ from run to run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(function, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    said = [str(warning.message).splitlines()[0] for warning in caught]
    return [line for line in said if "does not have a deterministic implementation" in line]


def check(
    name: str, call: Case, tensors: list[Tensor], record_property: Callable[[str, object], None]
) -> None:
    dense = graph_of(RULES[name].targets[0], call)
    packed, _ = pack_graph(dense, tensors, LOSSLESS)
    try:
        first, again = run(dense, tensors), run(dense, tensors)
    except RuntimeError as error:
        pytest.skip(f"dense raises here: {error}")
    mine = run(packed, tensors)
    assert_same(mine[0], first[0])
    reasons = [r for r in (call.rounds, RECORDS[name].rounds_on_cuda, *alerts(dense, tensors)) if r]
    if name in COPYING and any(map(is_copied, call.args)):
        reasons.append("cuBLAS is given a copy of an operand with gaps, in an order of its own")
    if any(a is not None and not same(a, b) for a, b in zip(first[1], again[1], strict=True)):
        reasons.append("two dense runs differ")
    if not reasons:
        assert_same(mine[1], first[1])
        return
    record_property("compared with a tolerance", "; ".join(reasons))
    torch.testing.assert_close(mine[1], first[1], equal_nan=True)


COPYING = ("matmul", "mm", "addmm")  # products that were seen to round otherwise for it


def is_copied(argument: Any) -> bool:
    """Whether PyTorch copies an operand of a product, since neither dimension is dense."""
    if not isinstance(argument, T):
        return False
    strides = argument.view(torch.empty(argument.shape)).stride()
    return len(strides) > 1 and 1 not in strides[-2:]


def same(a: Tensor, b: Tensor | None) -> bool:
    if b is None:
        return False
    return torch.allclose(a.to_dense(), b.to_dense(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "call"), ALL_CASES, ids=case_id)
def test_lossless_gradients_have_the_bits_of_dense_ones(
    name: str, call: Case, device: torch.device, record_property: Any
) -> None:
    check(name, call, tensors_of(call, device), record_property)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_lossless_gradients_have_the_bits_of_dense_ones_in_other_dtypes(
    name: str, dtype: torch.dtype, device: torch.device, record_property: Any
) -> None:
    call = CASES[name][0]
    if device.type == "cpu" and not RECORDS[name].half_on_cpu and dtype != torch.float64:
        pytest.skip("PyTorch has no such kernel for CPUs")
    check(name, call, tensors_of(call, device, dtype), record_property)


@pytest.mark.parametrize("name", ["linear", "conv2d", "layer_norm", "batch_norm", "gelu", "relu"])
def test_under_autocast_the_forward_has_the_bits_of_the_dense_one(
    name: str, device: torch.device
) -> None:
    call = CASES[name][0]
    tensors = tensors_of(call, device)
    dense = graph_of(RULES[name].targets[0], call)
    with torch.autocast(device.type, torch.bfloat16):
        packed, _ = pack_graph(dense, tensors, LOSSLESS)
        assert_same(run(packed, tensors)[0], run(dense, tensors)[0])
