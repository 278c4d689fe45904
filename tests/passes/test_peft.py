"""PEFT's kinds of adapters: exact forwards, the bits of dense where lossless, bytes as told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropit_fx
from dropit_fx.check.compare import losses
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.measure import saved_bytes

peft = pytest.importorskip("peft")
WIDTH, RANK = 96, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class Language(nn.Module):
    inputs = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))

    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(64, WIDTH), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.words(ids))))
        return out


class Images(nn.Module):
    inputs = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __init__(self) -> None:
        super().__init__()
        parts = [[nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.GELU()] for _ in "ab"]
        self.first, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 10)
        self.layers = nn.Sequential(*[nn.Sequential(*part) for part in parts])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.first(x)).mean((2, 3)))
        return out


def lora(model: type[nn.Module] = Language, **how: Any) -> Any:
    on = ["up", "down"] if model is Language else r"layers\.\d\.0"
    config = {"target_modules": on, "r": RANK, "lora_dropout": 0.1, "init_lora_weights": False}
    return peft.get_peft_model(model(), peft.LoraConfig(**config | how))


def ia3() -> Any:
    config = peft.IA3Config(
        target_modules=["up", "down"], feedforward_modules=["down"], init_ia3_weights=False
    )
    return peft.get_peft_model(Language(), config)


def with_another(active: str | list[str]) -> Any:
    model = lora()
    config = peft.LoraConfig(target_modules=["up"], r=4, init_lora_weights=False)
    model.add_adapter("another", config)
    model.base_model.set_adapter(active)
    return model


def merged_and_unmerged() -> Any:
    model = lora()
    model.merge_adapter()
    model.unmerge_adapter()
    return model


# each with what it keeps of dense with the preset `adapters`, at most
KINDS: dict[str, tuple[Callable[[], Any], float]] = {
    "lora": (lora, 0.1),
    "rslora, a bias": (lambda: lora(use_rslora=True, lora_bias=True), 0.1),
    "dora": (lambda: lora(use_dora=True), 0.15),
    "ia3": (ia3, 0.1),
    "a head beside it": (lambda: lora(modules_to_save=["head"]), 0.1),
    "embeddings": (lambda: lora(target_modules=["up", "down", "words"]), 0.1),
    "convolutions": (lambda: lora(Images), 0.12),
    "convolutions, dora": (lambda: lora(Images, use_dora=True, lora_dropout=0.0), 0.17),
    "two at once": (lambda: with_another(["default", "another"]), 0.1),
    "the other of two": (lambda: with_another("another"), 0.2),
    "merged and unmerged": (merged_and_unmerged, 0.1),
}
ENDS = ("lora_A", "lora_B", "embedding_A", "embedding_B", "magnitude", "ia3", "head")


def made(kind: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = KINDS[kind][0]().train()
    return model, model.base_model.model.inputs


def step(run: Any, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    out = run(x)
    out.sin().sum().backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def through(door: str, model: nn.Module, x: Tensor, preset: str) -> tuple[Any, Any]:
    """What runs it, and its report."""
    if door == "transform":
        run: Any = dropit_fx.transform(model, preset=preset, example_args=(x,))
        return run, dropit_fx.report(run)
    torch.compiler.reset()
    run = torch.compile(model, backend=door, options={"preset": preset})
    run(x)
    return run, compiled_graphs()[-1].report


# each kind once, and LoRA both ways; Dynamo gives no graph of DoRA's layers: PEFT asks for the
# module of a weight's class
TRACED = ("lora", "dora", "convolutions, dora", "a head beside it")
DOORS = [("transform" if kind in TRACED else "dropit_eager", kind) for kind in KINDS]
DOORS += [("dropit_eager", "lora")]


@pytest.mark.parametrize(("door", "kind"), DOORS)
def test_adapters_of_every_kind(door: str, kind: str) -> None:
    model, x = made(kind)
    out, dense = step(model, model, x)
    run, report = through(door, model, x, "lossless")
    found = step(run, model, x)
    torch.testing.assert_close(found, (out, dense), rtol=0, atol=0)
    assert report.kept_bytes == saved_bytes(run, x)

    run, report = through(door, model, x, "adapters")
    ours, grads = step(run, model, x)
    assert torch.equal(ours, out)
    assert report.kept_bytes == saved_bytes(run, x)
    assert report.dense_bytes == saved_bytes(model, x)
    assert report.ratio <= KINDS[kind][1], str(report)
    assert grads.keys() == dense.keys()
    for end in ENDS:
        pairs = [(n, dense[n], grads[n]) for n in dense if end in n]
        assert not pairs or losses(pairs)[0].relative <= 0.05, end


def test_a_model_with_its_adapters_switched_off_is_its_base() -> None:
    model, x = made("lora")
    packed = dropit_fx.transform(model, preset="adapters", example_args=(x,))
    with model.disable_adapter():
        base = model(x).detach()
        off = torch.compile(model, backend="dropit_eager", options={"preset": "adapters"})
        assert torch.equal(off(x), base)
    packed.eval(), model.eval()
    assert torch.equal(packed(x), model(x)), "a graph has the adapters that were on"
    assert not torch.equal(packed(x), base)
    torch.compiler.reset()
    again = torch.compile(model, backend="dropit_eager", options={"preset": "adapters"})
    assert torch.equal(again(x), model(x))


def test_factors_that_are_merged_into_the_weight_leave_nothing_to_keep() -> None:
    model, x = made("lora")
    model.merge_adapter()
    model.base_model.model.head.requires_grad_(True)
    run, report = through("transform", model, x, "adapters")
    assert torch.equal(run(x), model(x))
    assert report.kept_bytes == saved_bytes(run, x)
    assert {r.module.rpartition(".")[2] for r in report.rows if r.kept_bytes} == {"head"}
