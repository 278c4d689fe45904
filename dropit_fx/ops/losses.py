"""Softmax, its sum, and the losses of classifiers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Formula, Grads, Saved, optional
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use, called_as
from dropit_fx.private import (
    STACKLEVEL,
    OpOverload,
    log_softmax_backward_data,
    softmax_backward_data,
)

aten = torch.ops.aten


def _softmax_backward(log: bool) -> Formula:
    """``dX = y (dY - sum(dY y))``, and ``dY - exp(y) sum(dY)`` of the logarithm."""
    op = log_softmax_backward_data if log else softmax_backward_data

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        dtype = call.dtypes["input"]
        # CUDA goes from half to float32 inside the op; any other dtype is a cast before it
        inside = grad.is_cuda and (dtype, grad.dtype) == (torch.float16, torch.float32)
        own = dtype if inside else grad.dtype
        return {"input": op(grad, saved["result"], call.args["dim"], own).to(dtype)}

    return backward


SOFTMAX = tuple(
    OpRule(
        name=name,
        targets=(
            getattr(F, name),
            getattr(torch, name),
            name,
            getattr(aten, name).int,
        ),
        orders={getattr(F, name): ("input", "dim", STACKLEVEL, "dtype")},
        reads=(Read(operand="result", use=Use.REDUCE, needed_by=("input",)),),
        run=getattr(torch, name),
        schema=getattr(aten, name).int,
        backward=_softmax_backward(log=name == "log_softmax"),
    )
    for name in ("softmax", "log_softmax")
)


def _kept_dims(shape: Any, dim: Any) -> list[Any]:
    """The shape of a reduction over ``dim`` that keeps its dimensions; over all where it is ()."""
    dims = [dim] if isinstance(dim, int) else dim or range(len(shape))
    gone = {d % len(shape) for d in dims} if shape else set()
    return [1 if d in gone else size for d, size in enumerate(shape)]


def _logsumexp_saving(input: Tensor, dim: Any, keepdim: bool) -> tuple[Tensor, dict[str, Tensor]]:
    out = torch.logsumexp(input, dim, keepdim)
    return out, {"probs": (input - out.reshape(_kept_dims(input.shape, dim))).exp()}


def _logsumexp_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY * softmax(x)``; the factor is as PyTorch makes it, ``exp(x - y)``."""
    kept = _kept_dims(call.shapes["input"], call.args["dim"])
    return {"input": grad.reshape(kept) * saved["probs"]}


LOGSUMEXP = OpRule(
    name="logsumexp",
    targets=(
        *(torch.logsumexp, "logsumexp", aten.logsumexp.default),
        *(torch.special.logsumexp, aten.special_logsumexp.default),
    ),
    reads=(
        Read(operand="probs", use=Use.SLOPE, needed_by=("input",), like="input", instead=True),
        Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
        Read(operand="result", use=Use.SHAPE, needed_by=("input",)),
    ),
    run=torch.logsumexp,
    schema=aten.logsumexp.default,
    run_saving=_logsumexp_saving,
    backward=_logsumexp_backward,
)


def reduction_enum(reduction: Any) -> int:
    """``"mean"`` as ATen's number for it."""
    if isinstance(reduction, int):
        return reduction
    return {"none": 0, "mean": 1, "sum": 2}[reduction]


def deprecated_reduction(args: Mapping[str, Any]) -> str:
    """Why a loss with ``size_average`` or ``reduce`` is not covered, or ``""``."""
    if args["size_average"] is not None or args["reduce"] is not None:
        return "it is called with deprecated arguments"
    return ""


def loss_row(name: str, op: OpOverload, *order: str) -> dict[str, Any]:
    """What rows of losses have in common: name, spellings and ``run``.

    ``run`` takes what the function of ``torch.nn.functional`` takes, or the number that ATen has
    for a reduction, and is one op.

    Args:
        name: In ``torch.nn.functional``.
        op: Of ATen.
        order: Names of the arguments of ``op``.
    """
    function = getattr(F, name)
    names = tuple(inspect.signature(function).parameters)

    def run(*args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        given["reduction"] = reduction_enum(given["reduction"])
        return op(*[given[n] for n in order])

    targets, run = (function, op), called_as(function, run)
    return {"name": name, "targets": targets, "orders": {op: order}, "run": run}


_OF_CLASSES = ("input", "target", "weight", "reduction", "ignore_index")

NLL_LOSS = OpRule(
    **loss_row("nll_loss", aten.nll_loss_nd.default, *_OF_CLASSES),
    reads=(
        Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
        Read(operand="target", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
    ),
    obstacle=deprecated_reduction,
)


def _class_dim(input: Tensor) -> int:
    """The dimension of the classes: the second, or the only one."""
    return 0 if input.dim() == 1 else 1


def _loss_of(
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: Any,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """The loss from the logarithms, by the very steps of ``cross_entropy_loss``."""
    dim, size = _class_dim(log_probs), reduction_enum(reduction)
    classes = log_probs.shape[dim]
    if target.is_floating_point():
        if smoothing > 0:
            target = target * (1 - smoothing) + smoothing / classes
        by_class = _weighted(log_probs * target, weight)
        if size == 0:
            return -by_class.sum(dim)
        total = by_class.sum()
        if size != 1:
            return -total
        if log_probs.numel() == 0:
            return -total.fill_(torch.nan)
        return -total / (log_probs.numel() // classes)
    out: Tensor = aten.nll_loss_nd(log_probs, target, weight, size, ignore_index)
    if not smoothing > 0:
        return out
    smooth = -_weighted(log_probs, weight).sum(dim)
    ignored = target == ignore_index
    smooth = smooth.masked_fill(ignored, 0.0)
    if size == 1:
        counted = (~ignored).sum()
        smooth = smooth.sum() / counted
    elif size == 2:
        smooth = smooth.sum()
    return (1 - smoothing) * out + smooth * (smoothing / classes)


def _weighted(by_class: Tensor, weight: Tensor | None) -> Tensor:
    """Times the weight of each class."""
    if weight is None:
        return by_class
    return by_class * weight.view([-1] + [1] * (by_class.dim() - 1 - _class_dim(by_class)))


def _cross_entropy_saving(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: Any,
    label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs = torch.log_softmax(input, _class_dim(input))
    out = _loss_of(log_probs, target, weight, reduction, ignore_index, label_smoothing)
    return out, {"log_probs": log_probs}


def _cross_entropy_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = (sum(t) softmax(x) - t) * dY`` of the weighted targets ``t``, from ``log_probs``."""
    # in the layout in which log_softmax makes it, whatever that of its input
    log_probs = saved["log_probs"].contiguous()
    loss = functools.partial(
        _loss_of,
        target=saved["target"],
        weight=optional(saved, call, "weight"),
        reduction=call.args["reduction"],
        ignore_index=call.args["ignore_index"],
        smoothing=call.args["label_smoothing"],
    )
    (inner,) = torch.func.vjp(loss, log_probs)[1](grad)
    dim = _class_dim(log_probs)
    return {"input": log_softmax_backward_data(inner, log_probs, dim, call.dtypes["input"])}


def _beyond_the_logarithms(args: Mapping[str, Any]) -> str:
    input, target, weight = args["input"], args["target"], args["weight"]
    soft, smoothing = target.is_floating_point(), args["label_smoothing"]
    if target.requires_grad or (weight is not None and weight.requires_grad):
        return "its targets or class weights require grad"
    if smoothing > 0 and not soft and weight is not None and reduction_enum(args["reduction"]) == 1:
        return "its mean divides by the weights of the targets that are not ignored"
    classes = input.shape[_class_dim(input)] if input.dim() else 0
    refused = classes == 0 or soft != (target.shape == input.shape)
    refused |= smoothing > 1 or (soft and args["ignore_index"] >= 0)
    if refused or (weight is not None and weight.shape != (classes,)):
        return "PyTorch refuses these arguments"  # in words of its own
    return deprecated_reduction(args)


CROSS_ENTROPY = OpRule(
    **loss_row("cross_entropy", aten.cross_entropy_loss.default, *_OF_CLASSES, "label_smoothing"),
    reads=(
        Read(operand="log_probs", use=Use.REDUCE, needed_by=("input",), like="input"),
        Read(operand="target", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
    ),
    run_saving=_cross_entropy_saving,
    backward=_cross_entropy_backward,
    obstacle=_beyond_the_logarithms,
)

ROWS = (*SOFTMAX, LOGSUMEXP, NLL_LOSS, CROSS_ENTROPY)
