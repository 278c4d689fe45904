"""Losses of two tensors: what the backward reads of them is kept in the place of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import assert_same
from torch import Tensor, nn

import dropit_fx
from dropit_fx.measure import saved_bytes

DIFFERENCES = ("mse_loss", "smooth_l1_loss", "huber_loss")


class Regresses(nn.Module):
    """A layer, and the loss of what it predicts."""

    def __init__(self, loss: Any, shift: float = 0.0, returns: bool = False) -> None:
        super().__init__()
        self.layer, self.loss, self.shift, self.returns = nn.Linear(64, 512), loss, shift, returns

    def forward(self, x: Tensor, y: Tensor) -> Any:
        predicted = self.layer(x) + self.shift
        loss = self.loss(predicted, y)
        return (loss, predicted) if self.returns else loss


def gradients(model: nn.Module, *given: Tensor) -> list[Tensor]:
    out = model(*given)
    loss = out[0] if isinstance(out, tuple) else out
    return list(torch.autograd.grad(loss, [*model.parameters()]))


X, Y = torch.randn(64, 64), torch.randn(64, 512)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_difference_of_large_numbers_is_not_lost(name: str) -> None:
    torch.manual_seed(0)
    model, target = Regresses(getattr(F, name), shift=1000.0), Y + 1000
    packed = dropit_fx.transform(model, example_args=(X, target))
    assert {"quant"} <= {row.codec.split("(")[0] for row in dropit_fx.report(packed).rows}
    for found, exact in zip(gradients(packed, X, target), gradients(model, X, target), strict=True):
        assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", DIFFERENCES)
def test_one_difference_takes_the_place_of_two_tensors(name: str) -> None:
    class Twice(Regresses):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            loss: Tensor = self.loss(self.layer(x), self.layer(y))
            return loss

    model, given = Twice(getattr(F, name)), (X, torch.randn(64, 64))
    packed = dropit_fx.transform(model, example_args=given)
    told = dropit_fx.report(packed)
    assert told.dense_bytes == saved_bytes(model, *given) >= 2 * 64 * 512 * 4
    assert told.kept_bytes == saved_bytes(packed, *given)
    assert told.ratio < 0.15


def test_the_sign_of_a_difference_takes_two_bits_and_loses_nothing() -> None:
    model, target = Regresses(F.l1_loss, shift=1.0), Y.clone()
    with torch.no_grad():
        target[:2] = model.layer(X[:2]) + 1.0  # where they are equal, the slope is 0
        target[2, :5] = torch.nan
    packed = dropit_fx.transform(model, example_args=(X, target), preset="lossless")
    told = dropit_fx.report(packed)
    assert told.dense_bytes == saved_bytes(model, X, target)
    assert told.kept_bytes == saved_bytes(packed, X, target) == told.dense_bytes // 16
    assert_same(gradients(packed, X, target), gradients(model, X, target))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_prediction_that_stays_anyway_is_kept_as_it_is(name: str) -> None:
    model = Regresses(getattr(F, name), returns=True)
    packed = dropit_fx.transform(model, example_args=(X, Y))
    told = dropit_fx.report(packed)
    assert told.kept_bytes == saved_bytes(packed, X, Y) == saved_bytes(model, X, Y)
    assert any("stays in memory anyway" in row.reason for row in told.rows)
    assert_same(gradients(packed, X, Y), gradients(model, X, Y))


def outcome(model: Any, *given: Tensor) -> Any:
    """The gradients, or the kind of error."""
    try:
        return gradients(model, *given)
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize(
    "name", [*DIFFERENCES, "l1_loss", "kl_div", "binary_cross_entropy_with_logits"]
)
def test_a_target_of_another_dtype_does_what_it_does_dense(name: str, dtype: torch.dtype) -> None:
    model, target = Regresses(getattr(F, name)), Y.to(dtype)
    try:
        model(X, target)
    except RuntimeError:
        pytest.skip("PyTorch refuses it in the forward, before anything is captured")
    packed = dropit_fx.transform(model, example_args=(X, target), preset="balanced")
    found, dense = outcome(packed, X, target), outcome(model, X, target)
    if isinstance(dense, list) and name != "kl_div":  # which packs them, whatever their dtype
        assert_same(found, dense)
    else:
        assert type(found) is type(dense)
