"""Losses of a linear layer's logits that are never whole in memory: what rewritten graphs call.

Each function stands for ``F.linear``, the steps between it and the loss, and the loss; see
``kernels/logits.py`` for what is computed. From forward to backward they keep the layer's input and
a few numbers of each row, where autograd keeps the logarithms of all probabilities (rows times
classes). The backward makes the logits again: one product more than the three of dense. On a CPU in
float32, 512 rows of 768 and 50257 classes: 1.07 times the processor time of dense for layer and
loss. To compute the gradients in the forward, in chunks of 256 rows, takes 0.91 times, but keeps
that of the weight (classes times width) until the backward: more than the logits themselves where
there are fewer rows than the layer is wide, and it cannot do without a loss that is one number.

The loss differs from the dense one by the rounding of a sum in float32, and so do its gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dropit_fx.kernels import logits
from dropit_fx.runtime.function import check_grad
from dropit_fx.runtime.overrides import has_own_ops, stays_dense, transformed

Function = TypeVar("Function", bound=Callable[..., Any])
Steps = Sequence[tuple[str, float]]  # (one of logits.STEPS, its number), in order
IGNORED = -100  # the class of which PyTorch's losses take no notice, by default
_NONE = -(2**62)  # no class
_SIZES = ("none", "mean", "sum")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, steps, numbers, dtype = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.how = steps, numbers, dtype


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    check_grad(grads[0], "linear_cross_entropy")
    wanted = [bool(asked) for asked in ctx.needs_input_grad[:4]]
    found = torch.ops.dropit.linear_rows_backward(*grads, *ctx.saved_tensors, *ctx.how, wanted)
    return (*[g if ask else None for g, ask in zip(found, wanted, strict=True)], *[None] * 5)


torch.library.register_autograd("dropit::linear_rows", _backward, setup_context=_setup)


def dense_logits(x: Tensor, weight: Tensor, bias: Tensor | None, steps: Steps = ()) -> Tensor:
    """The logits as the model makes them: ``x: (*, width)`` -> ``(*, classes)``."""
    z = F.linear(x, weight, bias)
    for step, number in steps:
        z = logits.take_step(z, step, number)
    return z


def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    steps: Steps,
    loss: Callable[[Tensor], Tensor],
    target: Tensor | None = None,
    factors: Tensor | None = None,
    ignored: int = _NONE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """The numbers of each row, see ``kernels/logits.py``; the dtype of ``loss`` on dense logits."""
    flat = x.reshape(-1, x.shape[-1])
    if target is not None and target.shape[0] != flat.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({flat.shape[0]}) to match target batch_size"
            f" ({target.shape[0]})."
        )
    if target is not None and target.is_floating_point() and target.shape[1:] != weight.shape[:1]:
        raise ValueError(
            f"Expected probabilities of {weight.shape[0]} classes in each row of the target, not"
            f" of shape {tuple(target.shape)}."
        )
    with torch.no_grad():  # autocast is asked: by no rows of one class
        few = flat[:0], weight[:1], None if bias is None else bias[:1]
        product = F.linear(*few)
        dtype = loss(dense_logits(*few, steps)).dtype
    numbers = torch.ops.dropit.linear_rows(
        flat.to(product.dtype),
        weight,
        bias,
        target,
        factors,
        ignored,
        [step for step, _ in steps],
        [float(number) for _, number in steps],
        product.dtype,
    )
    return (*numbers, dtype)


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether PyTorch's own ops are to run: the op of the rows is not told how else to."""
    return transformed() or has_own_ops(tensors) or stays_dense(tensors)


def _one_call(function: Function) -> Function:
    """Decorates a function of tensors, of which a tracer's proxies, and modes, see one call."""

    @functools.wraps(function)
    def call(*tensors: Any, **how: Any) -> Any:
        given = tuple(t for t in tensors if t is not None)
        if has_torch_function(given) and not (transformed() or has_own_ops(given)):
            return handle_torch_function(call, given, *tensors, **how)
        return function(*tensors, **how)

    return call  # type: ignore[return-value]


@_one_call
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None = None,
    *,
    steps: Steps = (),
    reduction: int = 1,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    log_softmax: bool = False,
) -> Tensor:
    """``F.cross_entropy(steps(F.linear(x, weight, bias)), target, class_weight, ...)``.

    Args:
        x: (rows, width), as ``weight`` (classes, width) of float32, bfloat16, float16 or float64.
        weight: Of the layer.
        bias: (classes,).
        target: (rows,), int64; or (rows, classes), probabilities, which may want a gradient.
        class_weight: (classes,).
        steps: What is done to the logits: see ``kernels/logits.py``.
        reduction: 0: none, 1: mean, 2: sum.
        ignore_index: The class of which rows do not count; without a meaning for probabilities.
        label_smoothing: In [0, 1].
        log_softmax: Where the model has ``F.nll_loss(F.log_softmax(...))``, to which autocast may
            give another dtype.

    Returns:
        The loss, a number or (rows,), in the dtype that it has on dense logits.

    Raises:
        IndexError: A target is no class (on a GPU, an assertion there).
        ValueError: There are more or fewer targets than rows, or than probabilities of a row.
    """

    def dense(z: Tensor, target: Tensor, factors: Tensor | None, size: str) -> Tensor:
        if log_softmax:
            rows = F.log_softmax(z, -1)
            return F.nll_loss(rows, target, factors, reduction=size, ignore_index=ignore_index)
        how: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        return F.cross_entropy(z, target, factors, reduction=size, **how)

    own = class_weight is not None and class_weight.requires_grad  # a gradient of its own
    if own or _is_plain(x, weight, bias, target, class_weight):
        z = dense_logits(x, weight, bias, steps)
        return dense(z, target, class_weight, _SIZES[reduction])
    soft, classes = target.is_floating_point(), weight.shape[0]
    factors = class_weight if label_smoothing or soft else None
    if label_smoothing and factors is None:
        factors = x.new_ones(classes)

    def loss_of(z: Tensor) -> Tensor:
        few = target[:0, :1] if soft else target[:0]
        return dense(z, few, None if class_weight is None else class_weight[:1], "sum")

    rows = _rows(x, weight, bias, steps, loss_of, target, factors, ignore_index)
    picked, lse, spread, mass, dtype = rows
    ignored: Tensor | None = None
    counts = torch.ones_like(lse)  # what each row counts in the mean
    if soft:
        each = lse * mass - picked
    else:
        each, ignored = lse - picked, target == ignore_index
        if class_weight is not None:
            counts = class_weight.to(each.dtype)[target.masked_fill(ignored, 0)]
            each = each * counts
        counts = counts.masked_fill(ignored, 0)
    if label_smoothing:
        assert factors is not None
        smooth = lse * factors.to(lse.dtype).sum() - spread
        each = (1 - label_smoothing) * each + (label_smoothing / classes) * smooth
    return _reduced(each, ignored, counts, reduction).to(dtype)


def _reduced(each: Tensor, ignored: Tensor | None, counts: Tensor, reduction: int) -> Tensor:
    """The loss of rows that count: of each, of all, or by their weight. Of none the mean is NaN."""
    if ignored is not None:
        each = each.masked_fill(ignored, 0)
    if reduction == 0:
        return each
    return each.sum() if reduction == 2 else each.sum() / counts.sum()


@_one_call
def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    steps: Steps = (),
) -> Tensor:
    """``log_softmax(steps(F.linear(x, weight, bias)), -1).gather(-1, index)``.

    Args:
        x: (*, width).
        weight: (classes, width).
        bias: (classes,).
        index: (*, 1), int64: one class for each row.
        steps: What is done to the logits: see ``kernels/logits.py``.

    Returns:
        (*, 1), in the dtype that it has on dense logits.

    Raises:
        IndexError, ValueError: As :func:`linear_cross_entropy`.
    """
    if _is_plain(x, weight, bias, index):
        return F.log_softmax(dense_logits(x, weight, bias, steps), -1).gather(-1, index)
    target = index.reshape(-1)
    rows = _rows(x, weight, bias, steps, lambda z: F.log_softmax(z, -1), target)
    picked, lse, *_, dtype = rows
    return (picked - lse).reshape(index.shape).to(dtype)


@_one_call
def linear_logsumexp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    steps: Steps = (),
    keepdim: bool = False,
) -> Tensor:
    """``logsumexp(steps(F.linear(x, weight, bias)), -1, keepdim)``, as ``x: (*, width)`` has rows.

    An infinite logit gives NaN.
    """
    if _is_plain(x, weight, bias):
        return dense_logits(x, weight, bias, steps).logsumexp(-1, keepdim)
    _, lse, *_, dtype = _rows(x, weight, bias, steps, lambda z: z.logsumexp(-1))
    return lse.reshape(*x.shape[:-1], *[1] * keepdim).to(dtype)


@_one_call
def logits_unless_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, steps: Steps = ()
) -> Tensor | None:
    """The logits as a model returns them; None while gradients are wanted (``drop_logits``)."""
    return None if torch.is_grad_enabled() else dense_logits(x, weight, bias, steps)


LOSSES = (linear_cross_entropy, linear_log_probs, linear_logsumexp, logits_unless_training)
