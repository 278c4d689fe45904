"""Ops as modules, as users write them, through every tracer; what a compiled forward hands over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import LOSSLESS, assert_same
from op_cases import RECORDS
from torch import Tensor, nn

import dropit_fx
from dropit_fx.codecs import CODEC
from dropit_fx.codecs.codec import Codec
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.ops.rule import Use
from dropit_fx.ops.table import RULES


def modules() -> list[Any]:
    """(row, layer, shape of its input)."""
    return [(name, *made) for name, record in RECORDS.items() for made in record.modules()]


class Between(nn.Module):
    """A layer between two products with scalars, so that it reads no model input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 2.0) * 3.0


def lossless(name: str) -> dict[str, Any]:
    """Only the rule that ``name`` needs: one that matches nothing is an error."""
    read = RULES[name].reads[0]
    rule: dict[str, Any] = {"codec": "quant", "bits": None}
    if read.use is Use.CONTRACT:
        rule = {"codec": "mink", "gamma": 0.0}
    if read.bits is not None:
        rule = {"codec": "bitmask"}
    return LOSSLESS | {"rules": [rule]}


def by_symbolic_trace(model: nn.Module, x: Tensor, name: str) -> Any:
    return dropit_fx.transform(model, lossless(name), example_args=(x,))


def by_export(model: nn.Module, x: Tensor, name: str) -> Any:
    exported = torch.export.export(model, (x,)).module()
    return dropit_fx.transform(exported, lossless(name), example_args=(x,))


def by_dynamo(model: nn.Module, x: Tensor, name: str) -> Any:
    options = {"config": lossless(name)}
    return torch.compile(model, backend="dropit_eager", fullgraph=True, options=options)


@pytest.mark.parametrize("by", [by_symbolic_trace, by_export, by_dynamo])
@pytest.mark.parametrize(("name", "layer", "shape"), modules(), ids=lambda v: type(v).__name__)
def test_module_is_packed_by_every_tracer(
    name: str, layer: nn.Module, shape: tuple[int, ...], by: Any
) -> None:
    model = Between(layer)
    x = torch.randn(shape).requires_grad_()  # a layer without parameters saves nothing else
    packed = by(model, x, name)

    def step(function: Any) -> list[Any]:
        torch.manual_seed(5)
        leaf = x.detach().clone().requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])]

    assert_same(step(packed), step(model))
    report = compiled_graphs()[-1].report if by is by_dynamo else dropit_fx.report(packed)
    assert {row.op for row in report.rows if not row.reason} == {name}


HALF = Codec(  # as CONTRIBUTING.md writes one: of plain tensor ops
    name="half",
    serves=frozenset({Use.CONTRACT}),
    pack=lambda flat, options: (flat.to(torch.bfloat16),),
    unpack=lambda parts, options, numel, dtype: parts[0].to(dtype),
    nbytes=lambda numel, dtype, options: 2 * numel,
)
SPLIT = Codec(  # of several ops and parts, some of them views
    name="split",
    serves=frozenset({Use.CONTRACT}),
    pack=lambda flat, options: (
        (flat * 16).round().clamp(-128, 127).to(torch.int8),
        flat.abs().amax().view(1),
    ),
    unpack=lambda parts, options, numel, dtype: (parts[0].to(dtype) / 16).minimum(parts[1]),
    nbytes=lambda numel, dtype, options: numel + dtype.itemsize,
    buffers=2,
)
COMPILED_CODECS = [
    ("half", {}),
    ("split", {}),
    ("mink", {"gamma": 0.5, "bits": 4}),
    ("random", {"gamma": 0.5}),
    ("rows", {"bits": 4}),
    ("low_rank", {"bits": 6}),
    ("low_rank", {"projection": "random"}),
    ("quant", {"bits": 4}),
    ("cast", {}),
    ("cast", {"dtype": "bfloat16"}),
    ("few_bit", {}),
    ("bitmask", {}),
]


@pytest.mark.parametrize(("codec", "options"), COMPILED_CODECS, ids=lambda v: str(v))
def test_a_compiled_forward_hands_over_what_a_codec_packs(
    codec: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for foreign in (HALF, SPLIT):
        monkeypatch.setitem(CODEC, foreign.name, foreign)
    act = nn.Dropout(0.5) if codec == "bitmask" else nn.GELU()  # a mask that nothing else reads
    model = nn.Sequential(nn.Linear(16, 64), act, nn.Linear(64, 8))
    config = {"preset": None, "force": True, "rules": [{"codec": codec, **options}]}
    torch._dynamo.reset()
    inner = {"config": config, "inner": "aot_eager_decomp_partition"}
    compiled = torch.compile(model, backend="dropit", options=inner)
    compiled(torch.randn(32, 16)).sum().backward()
    record = compiled_graphs()[-1]
    (partition,) = record.partitions
    packed = [r for r in record.report.rows if not r.reason]
    assert packed
    assert partition.packed_bytes == sum(r.kept_bytes for r in packed)
    assert not partition.packs_in_backward
    assert not partition.unpacks_in_forward
