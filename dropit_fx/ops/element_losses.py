"""Losses that compare two tensors element by element.

Autograd keeps both of them. The gradient reads less: their difference, cut where the slope stays
what it is, or its sign alone. That is what these rows keep, in the place of the two; rounding each
of the two would round the small difference of large numbers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved, optional
from dropit_fx.ops.losses import deprecated_reduction, loss_row, reduction_enum
from dropit_fx.ops.rule import OpRule, Read, Use

aten = torch.ops.aten

_BOTH = ("input", "target")


def _fits(y: Tensor, x: Tensor) -> bool:
    """Whether ``y`` is broadcast to the shape of ``x``, and ``x`` to none."""
    pairs = zip(reversed(x.shape), reversed(y.shape), strict=False)
    return y.dim() <= x.dim() and all(a == b or b == 1 for a, b in pairs)


def _one_kind(args: Mapping[str, Any]) -> str:
    """Why a comparison is not one of each element of the input with one of the target."""
    x, y = args["input"], args["target"]
    if not _fits(y, x):
        return "its target is larger than its input"
    device = x.device.type
    if x.dtype != y.dtype and (device == "meta" or not torch.is_autocast_enabled(device)):
        return "it joins two dtypes"
    return ""


def _plain(args: Mapping[str, Any]) -> str:
    """Why a call is not of two tensors of one dtype and a reduction."""
    if args.get("weight") is not None:
        return "it has a weight for each element"
    if "size_average" in args and (why := deprecated_reduction(args)):
        return why
    return _one_kind(args)


def _each(grad: Tensor, reduction: Any, shape: tuple[Any, ...]) -> Tensor:
    """The gradient of every element before the reduction, as autograd makes it."""
    size = reduction_enum(reduction)
    if size == 0:
        return grad
    whole = grad.expand(shape)
    return whole / math.prod(shape) if size == 1 else whole


def _reduced(each: Tensor, reduction: Any) -> Tensor:
    size = reduction_enum(reduction)
    return each if size == 0 else each.mean() if size == 1 else each.sum()


def _of_both(grad: Tensor, call: Called) -> Grads:
    """From the gradient of ``input - target`` those of the two."""
    found: Grads = {"input": grad} if "input" in call.needs else {}
    if "target" in call.needs:
        found["target"] = (-grad).sum_to_size(call.shapes["target"])
    return found


def _of_difference(
    name: str, bound: str = "", obstacle: Callable[[Mapping[str, Any]], str] = _plain
) -> OpRule:
    """A row of a loss whose gradient is a function of the difference.

    Args:
        name: Of the loss.
        bound: The argument from which on the slope stays what it is: the difference is cut there.
        obstacle: Of the row.
    """
    op, again = getattr(aten, name).default, getattr(aten, f"{name}_backward")
    row = loss_row(name, op, *_BOTH, "reduction", *([bound] if bound else []))
    run, names = row["run"], tuple(inspect.signature(row["run"]).parameters)

    def run_saving(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        difference = args[0] - args[1]
        if bound:
            far = min(args[names.index(bound)], torch.finfo(difference.dtype).max)
            difference = difference.clamp(-far, far)
        return run(*args), {"difference": difference}

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        """As ATen, of the difference and 0.

        For rows with a ``bound``, PyTorch rounds in another order in vectors than one by one, and
        which it does the strides of both tensors say.
        """
        kept, more = saved["difference"], [call.args[bound]] if bound else []
        size = reduction_enum(call.args["reduction"])
        return _of_both(again(grad, kept, kept.new_zeros(()), size, *more), call)

    return OpRule(
        **row,
        reads=(
            Read(operand="difference", use=Use.SLOPE, needed_by=_BOTH, like="input", instead=True),
            *[Read(operand=n, use=Use.SHAPE, needed_by=_BOTH) for n in _BOTH],
        ),
        run_saving=run_saving,
        backward=backward,
        obstacle=obstacle,
    )


MSE_LOSS = _of_difference("mse_loss")
SMOOTH_L1_LOSS = _of_difference(
    "smooth_l1_loss",
    "beta",
    lambda args: _plain(args) if args["beta"] > 0 else "with this beta it is no smooth_l1_loss",
)
HUBER_LOSS = _of_difference("huber_loss", "delta")


def _l1_saving(
    input: Tensor,
    target: Tensor,
    size_average: Any,
    reduce: Any,
    reduction: Any,
    weight: None,
) -> tuple[Tensor, dict[str, Tensor]]:
    difference = input - target
    codes = (difference > 0).to(torch.uint8) + 2 * (difference < 0).to(torch.uint8)
    return _reduced(difference.abs(), reduction), {"sign": codes}


def _l1_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY * sign(x - t)``, ``dT = -dX``."""
    codes = saved["sign"]
    sign = (codes == 1).to(grad.dtype) - (codes == 2).to(grad.dtype)
    return _of_both(_each(grad, call.args["reduction"], tuple(sign.shape)) * sign, call)


L1_LOSS = OpRule(
    **loss_row("l1_loss", aten.l1_loss.default, *_BOTH, "reduction"),
    reads=(
        Read(
            operand="sign",
            use=Use.SLOPE,
            needed_by=_BOTH,
            bits=lambda args: 2,  # it may be 0
            like="input",
        ),
    ),
    run_saving=_l1_saving,
    backward=_l1_backward,
    obstacle=_plain,
)


_WITH_LOGITS = loss_row(
    "binary_cross_entropy_with_logits",
    aten.binary_cross_entropy_with_logits.default,
    *(*_BOTH, "weight", "pos_weight", "reduction"),
)


def _bce_with_logits_saving(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """With the slope, op by op as PyTorch's backward makes it: ``sigmoid(x) - t``."""
    out, pos_weight = _WITH_LOGITS["run"](input, target, weight, *settings), settings[-1]
    if pos_weight is None:
        return out, {"slope": input.sigmoid().sub_(target)}
    positive = pos_weight * target
    return out, {"slope": (positive + 1).sub_(target).mul_(input.sigmoid()).sub_(positive)}


def _bce_with_logits_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = slope * dY * weight``; of the mean, divided by the number of elements."""
    slope, weight = saved["slope"], optional(saved, call, "weight")
    found = slope * grad
    found = found if weight is None else found * weight
    is_mean = reduction_enum(call.args["reduction"]) == 1
    return {"input": found / slope.numel() if is_mean else found}


def _beside_logits(args: Mapping[str, Any]) -> str:
    x, every = args["input"], [args[n] for n in ("target", "weight", "pos_weight")]
    given = [t for t in every if t is not None]
    if any(t.requires_grad for t in given):
        return "its target or weights require grad"
    if args["target"].shape != x.shape or not all(_fits(t, x) for t in given):
        return "its target or weights are not in the shape of its input"
    return deprecated_reduction(args) or _one_kind(args)


BCE_WITH_LOGITS = OpRule(
    **_WITH_LOGITS,
    reads=(
        Read(operand="slope", use=Use.SLOPE, needed_by=("input",), like="input", instead=True),
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
        *[
            Read(operand=n, use=Use.SHAPE, needed_by=("input",))
            for n in ("input", "target", "pos_weight")
        ],
    ),
    run_saving=_bce_with_logits_saving,
    backward=_bce_with_logits_backward,
    obstacle=_beside_logits,
)


def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Any = "mean",
    log_target: bool = False,
) -> Tensor:
    size, rows = _size_and_rows(reduction, input.shape)
    out = torch.kl_div(input, target, size, log_target=log_target)
    return out if rows is None else out / rows


def _size_and_rows(reduction: Any, shape: Any) -> tuple[int, Any]:
    """ATen's number for a reduction, and by how many rows its result is divided, or None."""
    if reduction != "batchmean":
        return reduction_enum(reduction), None
    return reduction_enum("sum"), shape[0] if len(shape) else None


def _kl_div_saving(
    input: Tensor,
    target: Tensor,
    size_average: Any,
    reduce: Any,
    reduction: Any,
    log_target: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of logarithms, op by op as PyTorch does it; of probabilities, nothing is made."""
    if not log_target:
        return _kl_div(input, target, None, None, reduction), {}
    size, rows = _size_and_rows(reduction, input.shape)
    beyond, probs = target - input, target.exp()
    out = _reduced(probs * beyond, size)
    return (out if rows is None else out / rows), {"probs": probs}


def _kl_div_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = -dY * p``, of the probabilities ``p`` of the target alone."""
    shape = call.shapes["input"]
    probs = saved["probs" if call.args["log_target"] else "target"]
    size, rows = _size_and_rows(call.args["reduction"], shape)
    grad = grad if rows is None else grad / rows
    every: Any = torch.broadcast_shapes(shape, probs.shape)  # type: ignore[no-untyped-call]
    found = -_each(grad, size, every) * probs
    return {"input": found.sum_to_size(shape)}


KL_DIV = OpRule(
    name="kl_div",
    targets=(F.kl_div, aten.kl_div.default),
    orders={aten.kl_div.default: (*_BOTH, "reduction")},
    reads=(
        Read(
            operand="target",
            use=Use.SLOPE,
            needed_by=("input",),
            when=lambda args: not args["log_target"],
        ),
        Read(
            operand="probs",
            use=Use.SLOPE,
            needed_by=("input",),
            like="target",
            when=lambda args: bool(args["log_target"]),
        ),
    ),
    run=_kl_div,
    run_saving=_kl_div_saving,
    backward=_kl_div_backward,
    obstacle=lambda args: (
        "its target requires grad" if args["target"].requires_grad else deprecated_reduction(args)
    ),
)

_STEEP = "near 0 and 1 a small change of it is a large one of the gradient: it stays exact"


def _of_one_shape(args: Mapping[str, Any]) -> str:
    x, target, weight = args["input"], args["target"], args["weight"]
    if weight is not None and weight.requires_grad:
        return "its weights require grad"
    if any(t is not None and t.shape != x.shape for t in (target, weight)):
        return "its target or weights are not in the shape of its input"
    return deprecated_reduction(args)


BCE = OpRule(
    **loss_row(
        "binary_cross_entropy",
        aten.binary_cross_entropy.default,
        *(*_BOTH, "weight", "reduction"),
    ),
    reads=tuple(
        Read(operand=n, use=Use.REDUCE, needed_by=_BOTH, lossy=False, why_exact=_STEEP)
        for n in (*_BOTH, "weight")
    ),
    obstacle=_of_one_shape,
)

ROWS = (MSE_LOSS, L1_LOSS, SMOOTH_L1_LOSS, HUBER_LOSS, BCE_WITH_LOGITS, BCE, KL_DIV)
