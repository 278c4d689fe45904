"""Codecs random and quant: draws have the exact gradient in the mean, and the theory's variance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import T, case, cotangent, graph_of, pack_graph, packed_and_back
from sampled_rows import skewed, weight_gradient
from torch import Tensor

from dropit_fx.codecs import CODEC

ROWS, WIDTH, OUT, DRAWS, BLOCK = 48, 8, 5, 2000, 32


def away_of(x: Tensor, **rule: Any) -> Tensor:
    """How far the weight gradient of each draw is from the exact one: (draws, out, width)."""
    w = torch.randn(OUT, WIDTH)
    call = case("linear", T((ROWS, WIDTH)), T((OUT, WIDTH)))
    config = {"preset": None, "force": True, "rules": [{"block": BLOCK} | rule]}
    layer, _ = pack_graph(graph_of(F.linear, call), [x, w.requires_grad_()], config)
    exact = weight_gradient(F.linear, x, w)
    return torch.stack([weight_gradient(layer, x, w, seed) - exact for seed in range(DRAWS)])


def unbiased_variance(away: Tensor) -> float:
    """The variance of draws, summed over all entries; their mean has to be no further off."""
    variance = float(away.square().sum((1, 2)).mean())
    assert away.mean(0).norm() < 3 * math.sqrt(variance / DRAWS)
    assert (away.mean(0).abs() < 4 * away.std(0) / math.sqrt(DRAWS)).all()
    return variance


def test_random_elements() -> None:
    """Of each block so many without repetition: Cochran, Sampling Techniques, theorem 2.2."""
    x, dy = skewed(ROWS, WIDTH), cotangent(torch.empty(ROWS, OUT))
    gamma = 0.75
    kept = round((1 - gamma) * BLOCK)
    expected = 0.0
    for at in torch.arange(ROWS * WIDTH).split(BLOCK):
        adds = torch.zeros(BLOCK, OUT, WIDTH, dtype=torch.float64)  # of each element, to the sum
        adds[torch.arange(BLOCK), :, at % WIDTH] = (x.view(-1)[at, None] * dy[at // WIDTH]).double()
        spread = float((adds - adds.mean(0)).square().sum()) / (BLOCK - 1)
        expected += BLOCK**2 / kept * (1 - kept / BLOCK) * spread
    variance = unbiased_variance(away_of(x, codec="random", gamma=gamma))
    assert variance == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("spacing", "bits"), [("symmetric", 2), ("affine", 3), ("uniform", 4)])
def test_stochastic_rounding(spacing: str, bits: int) -> None:
    """To one of the levels around a value, by the distance to both: (x - low) (high - x)."""
    x, dy = skewed(ROWS, WIDTH), cotangent(torch.empty(ROWS, OUT))
    rule = {"bits": bits, "range": spacing, "rounding": "stochastic", "block": BLOCK}
    options = CODEC["quant"].defaults() | rule
    seen = torch.stack([packed_and_back(CODEC["quant"], x, options) for _ in range(400)])
    low, high = seen.amin(0), seen.amax(0)
    assert ((seen == low) | (seen == high)).all()
    of_each = ((x - low) * (high - x)).double()
    expected = float((dy.double().square().sum(1, keepdim=True) * of_each).sum())
    variance = unbiased_variance(away_of(x, codec="quant", **rule))
    assert variance == pytest.approx(expected, rel=0.1)
