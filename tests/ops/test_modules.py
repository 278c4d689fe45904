"""Ops as modules, as users write them, through every tracer; what a compiled forward hands over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    LOSSLESS,
    assert_same,
)
from torch import Tensor, nn

import dropit_fx
from dropit_fx.codecs import CODEC
from dropit_fx.codecs.codec import Codec
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.ops.rule import Use
from dropit_fx.ops.table import RULES


class Conv1D(nn.Module):
    """Hugging Face's layer of GPT-2: ``addmm`` over the flattened input."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D as Layer

        self.layer = Layer(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def modules() -> list[Any]:
    return [
        ("linear", nn.Linear(8, 5), (2, 6, 8)),
        ("linear", nn.Linear(8, 5, bias=False), (6, 8)),
        ("conv1d", nn.Conv1d(3, 4, 3, padding="same"), (2, 3, 12)),
        ("conv2d", nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9)),
        ("conv2d", nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
        ("conv3d", nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
        ("conv_transpose1d", nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 8)),
        ("conv_transpose2d", nn.ConvTranspose2d(3, 4, 3, output_padding=1, stride=2), (2, 3, 5, 5)),
        ("conv_transpose3d", nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
        ("addmm", Conv1D(), (2, 6, 8)),
        ("relu", nn.ReLU(), (4, 9)),
        ("relu", nn.ReLU(inplace=True), (4, 9)),
        ("hardtanh", nn.ReLU6(), (4, 9)),  # PyTorch's ReLU6 is a Hardtanh
        ("hardtanh", nn.ReLU6(inplace=True), (4, 9)),
        ("hardtanh", nn.Hardtanh(-0.5, 0.5), (4, 9)),
        ("leaky_relu", nn.LeakyReLU(0.1, inplace=True), (4, 9)),
        ("dropout", nn.Dropout(0.4), (4, 9)),
        ("dropout", nn.Dropout(0.4, inplace=True), (4, 9)),
        ("max_pool1d", nn.MaxPool1d(3), (2, 3, 12)),
        ("max_pool2d", nn.MaxPool2d(3, 2, 1), (2, 3, 9, 9)),
        ("max_pool3d", nn.MaxPool3d(2), (1, 2, 4, 4, 4)),
        ("gelu", nn.GELU(), (4, 9)),
        ("gelu", nn.GELU("tanh"), (4, 9)),
        ("silu", nn.SiLU(inplace=True), (4, 9)),
        ("mish", nn.Mish(), (4, 9)),
        ("elu", nn.ELU(0.5), (4, 9)),
        ("selu", nn.SELU(), (4, 9)),
        ("celu", nn.CELU(2.0), (4, 9)),
        ("softplus", nn.Softplus(2.0, 5.0), (4, 9)),
        ("hardswish", nn.Hardswish(inplace=True), (4, 9)),
        ("hardsigmoid", nn.Hardsigmoid(), (4, 9)),
        ("logsigmoid", nn.LogSigmoid(), (4, 9)),
        ("sigmoid", nn.Sigmoid(), (4, 9)),
        ("tanh", nn.Tanh(), (4, 9)),
        ("layer_norm", nn.LayerNorm(9), (4, 9)),
        ("layer_norm", nn.LayerNorm((4, 9), elementwise_affine=False), (2, 4, 9)),
        ("group_norm", nn.GroupNorm(2, 4), (2, 4, 5, 5)),
        ("rms_norm", nn.RMSNorm(9), (4, 9)),
        ("batch_norm", nn.BatchNorm1d(9), (4, 9)),
        ("batch_norm", nn.BatchNorm2d(3, momentum=0.3), (2, 3, 5, 5)),
        ("batch_norm", nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 5, 5)),
        ("softmax", nn.Softmax(-1), (4, 9)),
        ("log_softmax", nn.LogSoftmax(1), (4, 9)),
        ("avg_pool2d", nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 3, 9, 9)),
        ("scaled_dot_product_attention", Calls(_attend), (2, 3, 6, 8)),
        ("cross_entropy", Calls(_loss), (4, 9)),
        ("mul", Calls(lambda x: x * x), (4, 9)),
        ("div", Calls(lambda x: x / (x + 2.0)), (4, 9)),
        ("pow", Calls(lambda x: x**2), (4, 9)),
    ]


class Calls(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def _loss(x: Tensor) -> Tensor:
    return F.cross_entropy(x, torch.tensor([3, 0, 8, 3]))


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
    ("quant", {"bits": 4}),
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
