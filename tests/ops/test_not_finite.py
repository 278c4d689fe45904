"""NaN and infinity that a model leaves out again: the gradient has NaN where dense has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropit_fx

Masked = Callable[[Tensor, Tensor], Tensor]


def softmax(x: Tensor, mask: Tensor) -> Tensor:
    out = torch.softmax(x.masked_fill(~mask, -torch.inf), -1)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    return torch.log_softmax(x.masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0.0)


def softmin(x: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.softmin(x.masked_fill(~mask, torch.inf), -1).masked_fill(~mask, 0.0)


def gelu_of_infinity(x: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.gelu(x.masked_fill(~mask, torch.inf)).masked_fill(~mask, 0.0)


def logarithm(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, (x * mask).abs().log(), 0.0)


class Model(nn.Module):
    def __init__(self, masked: Masked) -> None:
        super().__init__()
        self.first, self.second, self.masked = nn.Linear(64, 64), nn.Linear(64, 64), masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x + self.masked(self.first(x), mask))


def gradients(model: nn.Module, *args: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(*args).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("preset", ["balanced", "fewbit", "mesa", "gact", "max"])
@pytest.mark.parametrize("masked", [softmax, log_softmax, softmin, gelu_of_infinity, logarithm])
def test_it_is_nan_where_dense_is(masked: Masked, preset: str) -> None:
    model, x = Model(masked), torch.randn(64, 64)
    mask = torch.rand(64, 64) > 0.3
    mask[3] = False
    dense = gradients(model, x, mask)
    packed = gradients(dropit_fx.transform(model, preset=preset, example_args=(x, mask)), x, mask)
    for exact, found in zip(dense, packed, strict=True):
        assert torch.equal(found.isfinite(), exact.isfinite())
        if exact.isfinite().all():
            assert (found - exact).norm() < 0.6 * exact.norm()


@pytest.mark.parametrize("preset", ["balanced", "fewbit", "mesa", "gact"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float, preset: str) -> None:
    """As a scaler of losses asks: a gradient in which dense has NaN is not finite."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(64, 64)
    x[5, 7] = value
    dense = gradients(model, x)
    packed = gradients(dropit_fx.transform(model, preset=preset, example_args=(x,)), x)
    for exact, found in zip(dense, packed, strict=True):
        assert torch.equal(found.isfinite(), exact.isfinite())


MINUS, BOTH = [-torch.inf], [-torch.inf, torch.inf]
INFINITE: dict[str, tuple[list[float], Callable[[Tensor], Tensor]]] = {
    "log_softmax": (MINUS, lambda x: torch.log_softmax(x, -1)),
    "logsumexp": (MINUS, lambda x: torch.logsumexp(x, -1)),
    "softplus": (BOTH, nn.functional.softplus),
    "logsigmoid": (BOTH, nn.functional.logsigmoid),
    "erf": (BOTH, torch.erf),
    "exp": (MINUS, torch.exp),
}
CODECS = [
    *({"bits": 5, "range": r} for r in ("symmetric", "affine", "uniform")),
    {"bits": 8, "hadamard": True},
    {"bits": 1},
]


class Infinite(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer, self.name = nn.Linear(64, 64), name

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h, (kinds, function) = self.layer(x), INFINITE[self.name]
        for i, kind in enumerate(kinds):
            h = h.masked_fill(mask == i + 1, kind)
        out = function(h)
        return torch.where(out.isfinite(), out, 0.0).sum()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("name", INFINITE)
def test_beside_infinity_a_finite_gradient_stays_finite(name: str, codec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Infinite(name), torch.randn(32, 64)
    mask = (torch.rand(32, 64) * 8).long()
    dense = gradients(model, x, mask)
    config = {"preset": "lossless", "keep_small": False, "rules": [{"codec": "quant", **codec}]}
    packed = gradients(dropit_fx.transform(model, config, example_args=(x, mask)), x, mask)
    for exact, found in zip(dense, packed, strict=True):
        assert exact.isfinite().all()
        assert found.isfinite().all()
        if codec["bits"] > 1:
            assert (found - exact).norm() < 0.4 * exact.norm()
