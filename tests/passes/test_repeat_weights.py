"""Computed weights: made again in the backward by the same ops, to the bit, under every preset."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_models
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import dropit_fx
from dropit_fx.measure import saved_bytes

Made = tuple[nn.Module, tuple[Tensor, ...]]
LOSSLESS = {"preset": "lossless"}


def _layers(norm: Callable[[nn.Module], nn.Module]) -> Made:
    first, last = norm(nn.Conv2d(4, 32, 3)), norm(nn.Conv2d(32, 32, 3))
    return nn.Sequential(first, nn.ReLU(), last), (torch.randn(2, 4, 8, 8),)


def _standardised(layer: Any) -> nn.Module:
    return zoo_models.StandardisedConv(layer.in_channels, layer.out_channels, 3)


class LowRank(nn.Module):
    """A parametrization: a weight and the product of two thin ones."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(outer, 2))
        self.right = nn.Parameter(torch.randn(2, inner))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def _low_rank() -> Made:
    first, last = nn.Linear(16, 32), nn.Linear(32, 32)
    parametrize.register_parametrization(first, "weight", LowRank(32, 16))
    parametrize.register_parametrization(last, "weight", LowRank(32, 32))
    return nn.Sequential(first, nn.GELU(), last), (torch.randn(8, 16),)


MODELS: dict[str, Callable[[], Made]] = {
    "weight norm": lambda: _layers(parametrizations.weight_norm),
    "weight norm, by a hook": lambda: _layers(weight_norm),
    "spectral norm": lambda: _layers(parametrizations.spectral_norm),
    "spectral norm, by a hook": lambda: _layers(nn.utils.spectral_norm),
    "standardised": lambda: _layers(_standardised),
    "modulated": zoo_models.BUILDERS["computed_weights"],
    "of low rank": _low_rank,
}


def step(run: Any, model: nn.Module, args: tuple[Tensor, ...], dtype: Any = None) -> list[Tensor]:
    """Output and gradients of one training step."""
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = run(*args)
    return [out, *torch.autograd.grad(out.float().square().sum(), list(model.parameters()))]


def made(name: str) -> Made:
    """The same in each call."""
    torch.manual_seed(0)
    return MODELS[name]()


def alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_computed_weight_is_made_again_to_the_bit(name: str, dtype: Any) -> None:
    (model, args), (dense, _) = made(name), made(name)
    packed = dropit_fx.transform(model, LOSSLESS, example_args=args)
    assert alike(step(packed, model, args, dtype), step(dense, dense, args, dtype))
    told = dropit_fx.report(packed)
    weights = [row for row in told.rows if row.codec == "derived"]
    assert weights
    assert all(row.kept_bytes == 0 < row.dense_bytes for row in weights)
    assert told.dense_bytes == saved_bytes(dense, *args)
    assert told.kept_bytes == saved_bytes(packed, *args)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("weight norm", "dropit"), ("spectral norm", "dropit_eager"), ("modulated", "dropit")],
)
def test_so_it_is_by_the_plug_in(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPIT_INNER", "aot_eager")
    (model, args), (dense, _) = made(name), made(name)
    run = torch.compile(model, backend=backend, options=LOSSLESS)
    stock = torch.compile(dense, backend="aot_eager")
    assert alike(step(run, model, args), step(stock, dense, args))
    weight = max(p.numel() for p in model.parameters()) * 4
    assert saved_bytes(run, *args) <= saved_bytes(stock, *args) - weight


def test_copies_and_pickles_train() -> None:
    model, args = made("standardised")
    packed = dropit_fx.transform(model, LOSSLESS, example_args=args)
    assert packed.state_dict().keys() == model.state_dict().keys()
    expected = step(model, model, args)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert alike(step(other, other, args), expected)


def test_several_forwards_before_a_backward_are_each_with_their_own_vectors() -> None:
    # spectral norm moves its vectors in each forward
    (model, args), (dense, _) = made("spectral norm"), made("spectral norm")
    packed = dropit_fx.transform(model, LOSSLESS, example_args=args)
    assert any(row.codec == "derived" for row in dropit_fx.report(packed).rows)
    for run in (packed, dense):
        (run(*args).square().sum() + run(2 * args[0]).sum()).backward()
    assert alike(*([p.grad for p in m.parameters()] for m in (model, dense)))


def test_a_parameter_that_is_written_before_the_backward_is_an_error() -> None:
    model, args = made("weight norm")
    packed = dropit_fx.transform(model, LOSSLESS, example_args=args)
    loss = packed(*args).sum()
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 4).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Shared(nn.Module):
    """Computes a weight from parameters, and lets ``also`` see what is between."""

    def __init__(self, also: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.rand(64, 1)), nn.Parameter(torch.randn(64, 64))
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        between = self.weight.tanh()
        weight = self.scale * between.exp()
        more = self.also(between, weight)
        return nn.functional.linear(nn.functional.linear(x, weight), self.weight) + more


def test_where_a_gradient_would_be_summed_otherwise_a_weight_stays() -> None:
    x = torch.randn(4, 64)
    for also in (lambda between, weight: 0, lambda between, weight: between.sum()):
        torch.manual_seed(0)
        model = Shared(also)
        packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
        assert dropit_fx.report(packed).kept_bytes == saved_bytes(packed, x)
        assert alike(step(packed, model, (x,)), step(model, model, (x,)))


def test_a_weight_that_draws_random_numbers_stays() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight + torch.randn_like(self.weight), self.bias)

    model, x = nn.Sequential(Noisy(32, 32), nn.GELU(), Noisy(32, 32)), torch.randn(4, 32)
    packed = dropit_fx.transform(model, LOSSLESS, example_args=(x,))
    assert not any(row.codec in ("derived", "repeated") for row in dropit_fx.report(packed).rows)


def test_without_derive_a_weight_stays() -> None:
    model, args = made("weight norm")
    config = LOSSLESS | {"derive": False}
    packed = dropit_fx.transform(model, config, example_args=args)
    assert {row.codec for row in dropit_fx.report(packed).rows} == {"keep"}
