"""Losses of logits that are never whole: dense values and gradients, in every form and dtype."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dropit_fx.kernels.logits import LEAST, block_of
from dropit_fx.measure import peak_memory, saved_bytes
from dropit_fx.runtime.linear_loss import (
    dense_logits,
    linear_cross_entropy,
    linear_log_probs,
    linear_logsumexp,
    logits_unless_training,
)

ROWS, WIDTH, CLASSES = 24, 12, 2 * LEAST + 100  # two blocks and a part of one
STEPS = {
    "plain": (),
    "scale": (("mul", 0.5),),
    "soft cap": (("div", 5.0), ("tanh", 0.0), ("mul", 5.0)),
    "float": (("float32", 0.0),),
}
NEAR = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}
X, WEIGHT, BIAS = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
TARGET = torch.randint(0, CLASSES, (ROWS,))
TARGET[3], TARGET[5], TARGET[7] = -100, 0, CLASSES - 1
Run = Callable[..., Tensor]


def outcome(run: Run, *tensors: Tensor | None) -> list[Tensor]:
    """The result, and the gradient of each tensor, for one incoming gradient."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    grad = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *[t.grad for t in leaves if t is not None and t.grad is not None]]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert [t.shape for t in found] == [t.shape for t in expected]
    pairs = zip(found, expected, strict=True)
    return max(((a - b).double().norm() / b.double().norm()).item() for a, b in pairs)


def cross_entropies(steps: Any, **how: Any) -> tuple[Run, Run]:
    """Fused and dense."""
    target, weight = how.pop("target", TARGET), how.pop("class_weight", None)

    def dense(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        named = how | {"reduction": ("none", "mean", "sum")[how.get("reduction", 1)]}
        return F.cross_entropy(dense_logits(x, w, b, steps), target, weight, **named)

    def fused(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(x, w, b, target, weight, steps=steps, **how)

    return fused, dense


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", NEAR, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_cross_entropy_is_the_dense_one(steps: Any, dtype: torch.dtype, reduction: int) -> None:
    if dtype == torch.float64 and steps == STEPS["float"]:
        pytest.skip("a cast down: its rounding is that of float32")
    loss_dtype = torch.float32 if steps == STEPS["float"] else dtype
    for weighted, smooth, bias in itertools.product([False, True], [0.0, 0.1], [False, True]):
        weight = torch.linspace(0, 2, CLASSES).to(loss_dtype) if weighted else None
        how = {"reduction": reduction, "label_smoothing": smooth, "class_weight": weight}
        fused, dense = cross_entropies(steps, **how)
        operands = [t.to(dtype) for t in (X, WEIGHT, *[BIAS] * bias)]
        assert error(outcome(fused, *operands), outcome(dense, *operands)) < NEAR[dtype]


SOFT = torch.randn(ROWS, CLASSES).softmax(1)
SOFT[2] = F.one_hot(torch.tensor(5), CLASSES)


@pytest.mark.parametrize("steps", [STEPS["plain"], STEPS["soft cap"]], ids=["plain", "soft cap"])
@pytest.mark.parametrize("dtype", NEAR, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_soft_targets_are_those_of_dense(steps: Any, dtype: torch.dtype, reduction: int) -> None:
    """Gradients of the targets too."""
    for weighted, smooth, bias in itertools.product([False, True], [0.0, 0.1], [False, True]):
        weight = torch.linspace(0, 2, CLASSES).to(dtype) if weighted else None
        how = {"reduction": reduction, "label_smoothing": smooth, "class_weight": weight}

        def either(which: int, target: Tensor, *layer: Tensor) -> Tensor:
            return cross_entropies(steps, target=target, **how)[which](*layer)  # noqa: B023

        operands = [t.to(dtype) for t in (SOFT, X, WEIGHT, *[BIAS] * bias)]
        fused, dense = (outcome(functools.partial(either, i), *operands) for i in (0, 1))
        assert error(fused, dense) < 2 * NEAR[dtype]


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_soft_targets_without_rows(reduction: int) -> None:
    fused, dense = cross_entropies((), reduction=reduction, target=SOFT[:0])
    for ours, theirs in zip(
        outcome(fused, X[:0], WEIGHT), outcome(dense, X[:0], WEIGHT), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_soft_targets_of_another_shape_are_refused_and_class_weights_that_learn_run_dense() -> None:
    for target in (SOFT[:, :-1], SOFT[:-1], SOFT[:, 0]):
        with pytest.raises(ValueError, match="Expected"):
            linear_cross_entropy(X, WEIGHT, None, target)
    each = torch.ones(CLASSES, requires_grad=True)
    linear_cross_entropy(X, WEIGHT, None, SOFT, each).backward()
    assert each.grad is not None


def test_nothing_of_rows_times_classes_is_allocated() -> None:
    """Neither for class numbers nor for soft targets, whose own gradient nobody wants."""
    rows, classes = 64, 32 * LEAST
    w = torch.randn(classes, WIDTH).requires_grad_()
    for target in (torch.randint(0, classes, (rows,)), torch.rand(rows, classes)):
        x = torch.randn(rows, WIDTH, requires_grad=True)
        weighted = {"class_weight": torch.rand(classes), "label_smoothing": 0.1}
        fused, dense = cross_entropies((), target=target, **weighted)
        logits, gradients = 4 * rows * classes, 4 * w.numel()
        assert peak_memory(lambda: dense(x, w)) > logits + gradients  # noqa: B023
        assert peak_memory(lambda: fused(x, w)) < logits / 4 + gradients  # noqa: B023


def test_it_is_as_near_to_double_precision_as_the_dense_one() -> None:
    fused, dense = cross_entropies((), label_smoothing=0.1)
    exact = outcome(dense, X.double(), WEIGHT.double())
    ours, theirs = (
        error([t.double() for t in outcome(run, X, WEIGHT)], exact) for run in (fused, dense)
    )
    assert ours < max(4 * theirs, 1e-6)


def log_probs(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return linear_log_probs(x, w, None, index)


def dense_log_probs(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return F.log_softmax(F.linear(x, w), -1).gather(-1, index)


def test_log_probs_and_logsumexp_are_the_dense_ones_whatever_the_shape() -> None:
    x, index = X.view(4, 6, WIDTH), TARGET.clamp(min=0).view(4, 6, 1)
    found = outcome(functools.partial(log_probs, index=index), x, WEIGHT)
    assert error(found, outcome(functools.partial(dense_log_probs, index=index), x, WEIGHT)) < 2e-6
    for keepdim in (False, True):
        found = outcome(lambda x, w: linear_logsumexp(x, w, None, keepdim=keepdim), x, WEIGHT)  # noqa: B023
        dense = outcome(lambda x, w: F.linear(x, w).logsumexp(-1, keepdim), x, WEIGHT)  # noqa: B023
        assert error(found, dense) < 2e-6


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("what", ["all ignored", "no rows", "infinite", "not a number", "masked"])
def test_what_has_no_loss_has_none_as_in_dense(what: str, reduction: int) -> None:
    x, weight, bias, target = X.clone(), WEIGHT, BIAS.clone(), TARGET
    if what == "all ignored":
        target = torch.full_like(TARGET, -100)
    elif what == "no rows":
        x, target = x[:0], target[:0]
    elif what == "masked":
        bias[3000:] = float("-inf")
        target = TARGET.clamp(min=-100, max=2999)
    else:
        x[2, 3] = float("inf" if what == "infinite" else "nan")
    fused, dense = cross_entropies((), reduction=reduction, target=target)
    for ours, theirs in zip(
        outcome(fused, x, weight, bias), outcome(dense, x, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_target_that_is_no_class_raises_as_in_dense(wrong: int) -> None:
    target = TARGET.clone()
    target[1] = wrong
    for run in cross_entropies((), target=target):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            run(X, WEIGHT)
    with pytest.raises(ValueError, match="Expected input batch_size"):
        linear_cross_entropy(X, WEIGHT, None, TARGET[:-1])
    with pytest.raises(IndexError):  # no class of which it takes no notice
        linear_log_probs(X, WEIGHT, None, TARGET[:, None])


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_gives_the_dtypes_and_the_loss_of_dense(enabled: bool) -> None:
    def under(run: Run) -> Run:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return run(*tensors)

        return call

    fused, dense = map(under, cross_entropies(STEPS["scale"]))
    near = 1e-2 if enabled else 2e-6
    assert error(outcome(fused, X, WEIGHT, BIAS), outcome(dense, X, WEIGHT, BIAS)) < near


def test_only_what_is_asked_for_is_computed_and_kept() -> None:
    fused, _ = cross_entropies(())
    frozen, trained = WEIGHT, X.clone().requires_grad_()
    fused(trained, frozen).backward()
    assert trained.grad is not None
    assert frozen.grad is None
    with torch.no_grad():
        assert fused(trained, frozen).grad_fn is None
    # lse, float32, and what the mean and the ignored rows keep: nothing of rows times classes
    x = X.clone().requires_grad_()
    assert saved_bytes(lambda: fused(x * 2, WEIGHT)) < 4 * ROWS * WIDTH + 32 * ROWS


def test_a_graph_goes_backward_twice_and_is_not_differentiated_twice() -> None:
    fused, _ = cross_entropies(())
    x = X.clone().requires_grad_()
    loss = fused(x, WEIGHT)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_transforms_of_torch_func_run_the_dense_ops() -> None:
    fused, dense = cross_entropies(())
    assert torch.equal(torch.func.grad(fused)(X, WEIGHT), torch.func.grad(dense)(X, WEIGHT))


def test_blocks_are_as_wide_as_the_layer_and_no_narrower_than_the_least() -> None:
    assert block_of(WIDTH) == LEAST
    assert block_of(5 * LEAST) == 5 * LEAST


class Loss(nn.Module):
    def forward(self, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, None, target, steps=(("mul", 0.5),))


class Scores(nn.Module):
    def forward(self, x: Tensor, w: Tensor, target: Tensor) -> Tensor | None:
        return logits_unless_training(x, w, None)


@pytest.mark.parametrize("model", [Loss(), Scores()], ids=["loss", "scores"])
def test_a_tracer_sees_one_call_that_copies(model: nn.Module) -> None:
    traced = fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes].count("call_function") == 1
    again = copy.deepcopy(traced)
    with torch.no_grad():
        assert torch.equal(again(X, WEIGHT, TARGET), model(X, WEIGHT, TARGET))
    assert (again(X, WEIGHT, TARGET) is None) == isinstance(model, Scores)


def test_the_ops_follow_pytorchs_rules() -> None:
    tensors = [t.requires_grad_() for t in (X.clone(), WEIGHT.clone(), BIAS.clone())]
    for target in (TARGET, SOFT.clone().requires_grad_()):
        args = (*tensors, target, torch.ones(CLASSES), -100, ["mul"], [0.5], torch.float32)
        torch.library.opcheck(torch.ops.dropit.linear_rows.default, args)
