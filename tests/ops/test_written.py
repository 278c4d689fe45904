"""Spellings that write into their input run out of place; who reads it later sees the result."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import LOSSLESS, Case, T, assert_agrees, case_id, pack_graph, run, writes
from op_cases import RECORDS, spelled, spellings
from torch import Tensor, fx, nn

import dropit_fx
from dropit_fx.measure import saved_bytes
from dropit_fx.ops.table import OP_RULES, RULES


def writing() -> list[Any]:
    """(row, target, settings) of every spelling that writes into its input."""
    by_name = [(name, target, {}) for name, target in spellings() if writes(target)]
    takes = [r for r in OP_RULES if "inplace" in r.signature.parameters]
    rows = [r.name for r in takes if isinstance(r.targets[0], FunctionType)]  # no operators
    return by_name + [(name, RULES[name].targets[0], {"inplace": True}) for name in rows]


def writing_graph(target: Any, call: Case, settings: dict[str, Any], reader: str) -> fx.GraphModule:
    """A call that writes, and a reader: of what it wrote to, of a view of that, or its result."""
    graph = fx.Graph()
    count = sum(isinstance(a, T) for a in call.args)
    leaves = [graph.placeholder(f"t{i}") for i in range(count)]
    copies = [graph.call_method("clone", (leaf,)) for leaf in leaves]
    written, operands = copies[0], iter(copies)
    seen = {"the written tensor": written}
    if reader == "an older view":
        seen[reader] = graph.call_method("flatten", (written,))
    args = tuple(next(operands) if isinstance(a, T) else a for a in call.args)
    create = graph.call_method if isinstance(target, str) else graph.call_function
    seen["the result"] = create(target, args, settings)
    if reader == "a newer view":
        seen[reader] = graph.call_method("flatten", (written,))
    graph.output(graph.call_function(torch.neg, (seen[reader],)))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    "reader", ["the written tensor", "a newer view", "an older view", "the result"]
)
@pytest.mark.parametrize(("name", "target", "settings"), writing(), ids=case_id)
def test_later_readers_of_a_written_tensor_see_the_result(
    name: str, target: Any, settings: dict[str, Any], reader: str
) -> None:
    call = spelled(name, target)
    if RECORDS[name].rounds_in_place:
        call = replace(call, rounds=RECORDS[name].rounds_in_place)
    tensors = call.tensors()
    dense = writing_graph(target, call, settings, reader)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    # a result out of place would not be seen through a view that is there already
    assert any(d.packed for d in plan.decisions) == (reader != "an older view")
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


class Writes(nn.Module):
    """An augmented assignment between two layers, seen through an older view or not."""

    def __init__(self, op: Callable[..., Any], dtype: torch.dtype, viewed: bool) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.rand(8) + 1)
        self.op, self.dtype, self.viewed = op, dtype, viewed

    def forward(self, x: Tensor, number: float) -> Tensor:
        h = self.a(x).sigmoid().to(self.dtype).clone()
        view = h.flatten()
        h = self.op(self.op(h, number), self.w.abs() if self.op is not operator.ipow else 3)
        if self.viewed:
            h = h + view.view(h.shape)
        return self.b(F.gelu(h).float())


AUGMENTED = {
    f"{op.__name__}, {dtype}, {'viewed' if viewed else 'alone'}": Writes(op, dtype, viewed)
    for op in (
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow),
        operator.imod,
    )
    for dtype in (torch.float32, torch.bfloat16)  # which stays when the other operand is float32
    for viewed in (False, True)
}


class Branches(nn.Module):
    """Layers that all read the input; their results apart."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        return tuple(layer(*args) for layer in self.layers)


def test_augmented_assignments_are_what_they_are_in_the_dense_model() -> None:
    model, args = Branches(AUGMENTED.values()), (torch.randn(4, 8), 2.0)
    lossless, balanced = (
        dropit_fx.transform(model, preset=preset, example_args=args)
        for preset in ("lossless", "balanced")
    )
    dense = model(*args)
    for name, layer, out, *results in zip(
        AUGMENTED, model.layers, dense, lossless(*args), balanced(*args), strict=True
    ):
        assert all(torch.equal(out, other) for other in results), name
        grads = [
            torch.autograd.grad(t.square().sum(), list(layer.parameters()), allow_unused=True)
            for t in (out, results[0])
        ]
        assert all(a is b or torch.equal(a, b) for a, b in zip(*grads, strict=True)), name
    expected = saved_bytes(model, *args)
    for made in (lossless, balanced):
        told = dropit_fx.report(made)
        assert (told.dense_bytes, told.kept_bytes) == (expected, saved_bytes(made, *args))
