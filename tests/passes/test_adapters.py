"""Adapters beside a frozen base, in the spellings of users: nothing is kept for frozen weights."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.check.compare import losses, paired

WIDTH, RANK = 128, 8


class Layer(nn.Module):
    """A frozen weight with two thin factors beside it, and nothing but parameters."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner) / math.sqrt(inner))
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(RANK, inner) / math.sqrt(inner))
        self.lora_B = nn.Parameter(torch.randn(outer, RANK) / 10)
        self.p, self.merged = 0.1, False

    def low(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * 2

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.low(F.dropout(x, self.p, self.training))


class IfTraining(Layer):
    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        if self.training and self.p > 0:
            x = F.dropout(x, self.p)
        return out + self.low(x)


class Einsum(Layer):
    def forward(self, x: Tensor) -> Tensor:
        thin = torch.einsum("...i,ri->...r", x, self.lora_A)
        return F.linear(x, self.weight) + torch.einsum("...r,or->...o", thin, self.lora_B)


class Magnitude(Layer):
    """DoRA: the columns of the sum have lengths of their own."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.lengths = nn.Parameter(torch.rand(outer) + 1)

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.weight + 2 * self.lora_B @ self.lora_A).norm(dim=1).detach()
        return (F.linear(x, self.weight) + self.low(x)) * (self.lengths / norm)


class Scaled(Layer):
    """IA3: the outputs of the frozen layer are scaled."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.requires_grad_(False)
        self.scales = nn.Parameter(torch.rand(outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scales


class Merging(Layer):
    """Eval mode adds the product of the factors to the weight, training mode takes it off."""

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.lora_B.data @ self.lora_A.data * (-2 if mode else 2)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + (0 if self.merged else self.low(x))


class MergedInEval(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight + 2 * self.lora_B @ self.lora_A)
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, layer: type[Layer]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.up, self.down = layer(WIDTH, 4 * WIDTH), layer(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class Language(nn.Module):
    """Frozen embeddings, blocks with adapters, a frozen norm."""

    def __init__(self, layer: type[Layer]) -> None:
        super().__init__()
        self.words = nn.Embedding(64, WIDTH).requires_grad_(False)
        self.blocks = nn.Sequential(*[Block(layer) for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.norm(self.blocks(self.words(ids)))
        return out


def language(layer: type[Layer]) -> tuple[Language, Tensor]:
    torch.manual_seed(0)
    return Language(layer), torch.randint(64, (8, 64))


OPENED = (Layer, IfTraining, Einsum, Magnitude, Scaled)


@pytest.mark.parametrize("layer", OPENED)
def test_the_preset_keeps_an_eighth_and_gradients_within_a_twentieth(layer: type[Layer]) -> None:
    model, ids = language(layer)
    packed = dropit_fx.transform(model, preset="adapters", example_args=(ids,))
    report = dropit_fx.report(packed)
    assert report.kept_bytes == measure.saved_bytes(packed, ids)
    assert report.ratio <= 0.13, str(report)
    found = []
    for runs in (model, packed):
        torch.manual_seed(1)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(runs(ids).sin().sum(), list(trained.values()))
        found.append(dict(zip(trained, grads, strict=True)))
    for end in {n.rpartition(".")[2] for n in found[0]}:
        pairs = [p for p in paired(*found) if p[0].endswith(end)]
        assert losses(pairs)[0].relative <= 0.05, end
    packed.eval()
    assert torch.equal(packed(ids), model.eval()(ids))


@pytest.mark.parametrize("backend", ["transform", "dropit_eager"])
@pytest.mark.parametrize("layer", [IfTraining, Magnitude, Merging, MergedInEval])
def test_check_passes(layer: type[Layer], backend: Any) -> None:
    model, ids = language(layer)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    checked = dropit_fx.check(model, (ids,), preset="adapters", backend=backend)
    assert checked, str(checked)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_that_merges_its_adapters_is_left_as_it_was() -> None:
    model, ids = language(Merging)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    dropit_fx.transform(model, example_args=(ids,))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not model.blocks[0].up.merged


def test_modes_that_differ_in_more_than_dropout_are_both_kept_and_said_to_cost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = language(MergedInEval)
    packed = dropit_fx.transform(model, example_args=(ids,))
    assert "what these save is not packed: blocks.0.up, blocks.0.down" in caplog.text
    assert torch.equal(packed.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize("door", ["transform", "dropit_eager"])
def test_nothing_is_kept_for_what_is_frozen(door: str) -> None:
    """Only what is behind the first adapter, and what the trained factors read."""
    model, ids = language(Layer)
    for block in model.blocks[:2]:
        block.requires_grad_(False)  # type: ignore[union-attr]
    if door == "transform":
        packed: Any = dropit_fx.transform(model, preset="adapters", example_args=(ids,))
        report = dropit_fx.report(packed)
    else:
        torch._dynamo.reset()
        packed = torch.compile(model, backend=door, options={"preset": "adapters"})
        packed(ids)
        report = dropit_fx.compile.backend.compiled_graphs()[-1].report
    assert report.kept_bytes == measure.saved_bytes(packed, ids)
    assert {r.module.removeprefix("L['self'].") for r in report.rows if r.kept_bytes} <= {
        *("blocks.2.up", "blocks.2.down", "blocks.2", "norm")
    }
    lossy = [r for r in report.rows if r.op == "linear" and r.shape[-1] == RANK]
    assert {r.codec for r in lossy} <= {"keep"}


def test_the_thin_tensor_is_exact_whatever_its_rank() -> None:
    """PEFT's names: the preset goes by them, however large the rank."""
    torch.manual_seed(0)
    parts = [[nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)] for _ in range(3)]
    layers = [nn.Sequential(*part) for part in parts]
    config = peft.LoraConfig(r=64, target_modules=r".*\.0", lora_dropout=0.1)
    model = peft.get_peft_model(nn.Sequential(*layers), config)
    x = torch.randn(64, WIDTH)
    packed = dropit_fx.transform(model, preset="adapters", example_args=(x,))
    rows = [r for r in dropit_fx.report(packed).rows if "lora_B" in r.module]
    assert {r.codec for r in rows} == {"keep"}
    packed.eval()
    assert torch.equal(packed(x), model.eval()(x))
