"""Softmax, and the losses of classifiers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Formula, Grads, Saved
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use
from dropit_fx.private import STACKLEVEL, log_softmax_backward_data, softmax_backward_data

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


def reduction_enum(reduction: Any) -> int:
    """``"mean"`` as ATen's number for it."""
    if isinstance(reduction, int):
        return reduction
    return {"none": 0, "mean": 1, "sum": 2}[reduction]


def _deprecated_reduction(args: Mapping[str, Any]) -> str:
    if args["size_average"] is not None or args["reduce"] is not None:
        return "it is called with deprecated arguments"
    return ""


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Any = "mean",
) -> Tensor:
    out: Tensor = torch.ops.aten.nll_loss_nd(
        input, target, weight, reduction_enum(reduction), ignore_index
    )
    return out


NLL_LOSS = OpRule(
    name="nll_loss",
    targets=(F.nll_loss, aten.nll_loss_nd.default),
    orders={aten.nll_loss_nd.default: ("input", "target", "weight", "reduction", "ignore_index")},
    reads=(
        Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
        Read(operand="target", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
    ),
    run=_nll_loss,
    obstacle=_deprecated_reduction,
)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Any = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    out: Tensor = torch.ops.aten.cross_entropy_loss(
        input, target, weight, reduction_enum(reduction), ignore_index, label_smoothing
    )
    return out


def _class_dim(input: Tensor) -> int:
    """The dimension of the classes: the second, or the only one."""
    return 0 if input.dim() == 1 else 1


def _cross_entropy_saving(
    input: Tensor, target: Tensor, weight: Tensor | None, *settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs = torch.log_softmax(input, _class_dim(input))
    return _nll_loss(log_probs, target, weight, *settings[:-1]), {"log_probs": log_probs}


def _cross_entropy_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = (softmax(x) - onehot(target)) * dY``, from the packed ``log softmax(x)``."""
    # in the layout in which log_softmax makes it, whatever that of its input
    log_probs, target = saved["log_probs"].contiguous(), saved["target"]
    dim = _class_dim(log_probs)
    reduction, ignored = reduction_enum(call.args["reduction"]), call.args["ignore_index"]
    loss = functools.partial(
        aten.nll_loss_nd, target=target, reduction=reduction, ignore_index=ignored
    )
    (inner,) = torch.func.vjp(loss, log_probs)[1](grad)
    out = log_softmax_backward_data(inner, log_probs, dim, call.dtypes["input"])
    return {"input": out}


def _plain_cross_entropy(args: Mapping[str, Any]) -> str:
    if args["target"].is_floating_point():
        return "its targets are probabilities"
    if args["weight"] is not None or args["label_smoothing"]:
        return "class weights and label smoothing read more than the logarithms"
    return _deprecated_reduction(args)


CROSS_ENTROPY = OpRule(
    name="cross_entropy",
    targets=(F.cross_entropy, aten.cross_entropy_loss.default),
    orders={
        aten.cross_entropy_loss.default: (
            "input",
            "target",
            "weight",
            "reduction",
            "ignore_index",
            "label_smoothing",
        )
    },
    reads=(
        Read(operand="log_probs", use=Use.REDUCE, needed_by=("input",), like="input"),
        Read(operand="target", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
    ),
    run=_cross_entropy,
    run_saving=_cross_entropy_saving,
    backward=_cross_entropy_backward,
    obstacle=_plain_cross_entropy,
)

ROWS = (*SOFTMAX, NLL_LOSS, CROSS_ENTROPY)
