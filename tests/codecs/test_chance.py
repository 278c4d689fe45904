"""Formats that draw random numbers: dropout's masks stay those of the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropit_fx
from dropit_fx.kernels.seeds import draw_seed

CHANCE: dict[str, dict[str, Any]] = {
    "stochastic": {"preset": "gact"},
    "random": {"strategy": "random", "gamma": 0.5},
    "rows": {"strategy": "rows", "gamma": 0.5},
    "low_rank": {"config": {"rules": [{"codec": "low_rank", "projection": "random"}]}},
    "by channel": {"config": {"rules": [{"codec": "quant", "rounding": "stochastic"}]}},
}
WAYS = ("transform", "dropit_eager", "aot_eager", "aot_eager_decomp_partition")
chance = pytest.mark.parametrize("options", CHANCE.values(), ids=CHANCE)


def net() -> nn.Module:
    first = nn.Linear(64, 64), nn.Dropout(0.5), nn.GELU(), nn.Unflatten(1, (4, 4, 4))
    then = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 8)
    return nn.Sequential(*first, *then, nn.Dropout(0.1)).train()


def packed(model: nn.Module, way: str, options: dict[str, Any], x: Tensor) -> Any:
    torch._dynamo.reset()
    if way == "transform":
        return dropit_fx.transform(model, example_args=(x,), **options)
    if way == "dropit_eager":
        return torch.compile(model, backend=way, options=options)
    return torch.compile(model, backend="dropit", options=options | {"inner": way})


def dense(model: nn.Module, way: str) -> Any:
    """The same model run the same way; a compiler may draw its masks by other ops."""
    torch._dynamo.reset()
    return torch.compile(model, backend=way) if way.startswith("aot") else model


@chance
@pytest.mark.parametrize("way", WAYS)
def test_dropout_draws_the_masks_of_the_dense_model(way: str, options: dict[str, Any]) -> None:
    model, x = net(), torch.randn(32, 64, requires_grad=True)
    theirs, ours = dense(copy.deepcopy(model), way), packed(model, way, options, x)
    torch.manual_seed(5)
    expected = [theirs(x) for _ in range(2)]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    found = [ours(x) for _ in range(2)]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(found[0], found[1])


@chance
@pytest.mark.parametrize("way", ["transform", "aot_eager"])
def test_gradients_follow_the_seed_and_differ_from_call_to_call(
    way: str, options: dict[str, Any]
) -> None:
    x = torch.randn(64, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))  # draws nothing
    ours = packed(model, way, options, x)

    def gradient() -> Tensor:
        model.zero_grad()
        ours(x).square().sum().backward()
        grad: Tensor = model[2].weight.grad
        return grad.clone()

    torch.manual_seed(1)
    first, second = gradient(), gradient()
    torch.manual_seed(1)
    again = gradient(), gradient()
    torch.manual_seed(2)
    other = gradient()
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_seeds_leave_the_generator_and_never_repeat() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    seeds = {int(draw_seed(torch.device("cpu"))) for _ in range(100)}
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    seeds |= {int(draw_seed(torch.device("cpu"))) for _ in range(100)}
    torch.manual_seed(1)
    seeds |= {int(draw_seed(torch.device("cpu"))) for _ in range(100)}
    assert len(seeds) == 300
    torch.set_rng_state(state)
    assert int(draw_seed(torch.device("cpu"))) in seeds
