"""Parts of a model rewritten by themselves: what flows into them is an activation like any other.

Only the backward keeps it, so that packing it frees it. The model's own inputs stay where they are.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dropit_fx
from dropit_fx.compile import backend
from dropit_fx.measure import saved_bytes

INNERS = ("eager", "aot_eager", "aot_eager_decomp_partition")
Rewrite = Callable[[Any, Tensor, dict[str, Any]], Any]


def compile_blocks(inner: str) -> Rewrite:
    def rewrite(model: Any, x: Tensor, config: dict[str, Any]) -> Any:
        for block in model.blocks:
            block.compile(backend="dropit", options={"config": config, "inner": inner})
        return model

    return rewrite


def transform_blocks(model: Any, x: Tensor, config: dict[str, Any]) -> Any:
    return dropit_fx.transform(model, config, modules="blocks.*", example_args=(x,))


WAYS: dict[str, Rewrite] = {i: compile_blocks(i) for i in INNERS} | {"modules": transform_blocks}


def vit() -> tuple[Any, Tensor]:
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4, num_classes=10)
    return model, torch.randn(8, 3, 64, 64)


def gradients(run: Any, x: Tensor) -> Tensor:
    run.zero_grad()
    run(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in run.parameters()])


@pytest.fixture(scope="module")
def bound() -> tuple[Any, Tensor, int, Tensor]:
    """A model and its input, what its blocks one by one may keep of it, and its gradients."""
    torch.manual_seed(0)
    model, x = vit()
    whole = dropit_fx.transform(copy.deepcopy(model), preset="balanced", example_args=(x,))
    # what is left outside the blocks: two norms of a class token, the head and a copy of the pixels
    blocks = sum(saved_bytes(b, torch.randn(8, 17, 192)) for b in model.blocks)
    between = 4 * 8 * 17 * 192 * 4
    outside = saved_bytes(model, x) - blocks - between
    return model, x, saved_bytes(whole, x) + outside, gradients(model, x)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_one_by_one_keep_little_more_than_the_model_as_a_whole(
    way: str, bound: tuple[Any, Tensor, int, Tensor]
) -> None:
    torch._dynamo.reset()
    model, x, most, expected = bound
    parts = WAYS[way](copy.deepcopy(model), x, {"preset": "balanced"})
    assert saved_bytes(parts, x) < most
    assert torch.nn.functional.cosine_similarity(gradients(parts, x), expected, dim=0) > 0.98


class Inner(nn.Module):  # a class of its own: older PyTorch leaves a Linear itself uncompiled
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner()])
        self.first = nn.Linear(64, 64)

    def forward(self, x: Tensor, direct: bool) -> Tensor:
        h = x if direct else self.first(x)
        out: Tensor = self.blocks[0](h)
        return out


DROP = {"preset": "dropit"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("leaf", [True, False])
def test_what_the_caller_gave_is_kept_and_what_an_op_made_is_packed(way: str, leaf: bool) -> None:
    torch._dynamo.reset()
    model, x = Block(), torch.randn(512, 64, requires_grad=True)
    if way == "modules":
        model = dropit_fx.transform(model, DROP, modules="blocks.*", example_args=(x, leaf))
        (row,) = dropit_fx.report(model.get_submodule("blocks.0")).rows or (None,)
    else:
        before = len(backend.compiled_graphs())
        WAYS[way](model, x, DROP)(x, leaf)
        (graph,) = backend.compiled_graphs()[before:]
        (row,) = graph.report.rows or (None,)
    assert (row is None) == leaf
    kept = saved_bytes(model, x, leaf)
    assert kept == 0 if leaf else 0 < kept < x.numel() * 4 / 4


class Writes(nn.Module):
    """Writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.relu_(h))
        return out


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(64, 64), nn.ModuleList([Writes()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.blocks[0](h)
        return out + h  # sees what was written


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", ["balanced", "lossless"])
def test_an_input_that_is_written_to_is_written_to(way: str, preset: str) -> None:
    torch._dynamo.reset()
    model, x = Outer(), torch.randn(256, 64)
    expected = model(x)
    expected.sum().backward()
    dense = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    rewritten = WAYS[way](model, x, {"preset": preset})
    found = rewritten(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    for ours, theirs in zip(rewritten.parameters(), dense, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=0.2, atol=0.1 * theirs.abs().max())
        if preset == "lossless":
            torch.testing.assert_close(ours.grad, theirs)
