"""What graphs call: by names that pickles of before know, and what is kept of a tensor."""

import pytest
import torch

from dropit_fx.capture.graph_module import _resolve
from dropit_fx.codecs import CODEC
from dropit_fx.runtime.copies import Kept, Packed, kept_as, shared_out, unpack
from dropit_fx.runtime.packed_call import PACKED_OPS, pack
from dropit_fx.runtime.tensor_spec import flatten, spec_of, unflatten

CALLED = ("pack", "derived", "by_mode", "in_mode", "require_mode", "stand_in", "packed_checkpoint")


@pytest.mark.parametrize("module", ["packed_call", "runtime.packed_call"])
@pytest.mark.parametrize("name", [*CALLED, "checkpointed", "packed_linear", "packed_gelu"])
def test_what_a_pickled_graph_calls_is_found(module: str, name: str) -> None:
    assert _resolve(f"dropit_fx.{module}.{name}").__name__ == name


def test_packed_calls_are_named_by_one_module() -> None:
    ops = [op for op in PACKED_OPS.values() if op is not PACKED_OPS["checkpoint"]]
    assert {op.__module__ for op in (pack, *ops)} == {"dropit_fx.runtime.packed_call"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_spec_says_how_a_tensor_lies_in_memory(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    spec = spec_of(x)
    assert (spec.shape, spec.stride, spec.dtype) == ((2, 3, 4, 5), x.stride(), torch.float32)
    again = unflatten(flatten(x), spec.shape, spec.order)
    assert torch.equal(again, x)
    assert again.stride() == spec.stride


def test_tensors_are_shared_out_in_their_order() -> None:
    x, y, z = torch.ones(1), torch.zeros(1), torch.ones(2)
    kept = (Kept("mask", "bitmask"), Kept("input", "keep", tensors=0), Kept("weight", "quant"))
    assert [len(own) for _, own in shared_out(kept, [x, y])] == [1, 0, 1]
    (one,) = shared_out([kept_as("input", Packed((x, y, z), "quant", (), x.dtype))], [x, y, z])
    assert one == (Kept("input", "quant", (), x.dtype, 3), (x, y, z))


def test_a_packed_copy_is_read_back_as_it_lay() -> None:
    x = torch.randn(4, 6).t().requires_grad_()
    packed = pack(x, (x,), "mink", CODEC["mink"].defaults() | {"gamma": 0.0, "bits": None})
    assert packed is not None
    assert torch.equal(unpack(packed, x), x)
    assert unpack(packed, x).stride() == x.stride()
