"""Ops that choose element by element: dropout, where, masked_fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved
from dropit_fx.ops.rule import OpRule, Read, Use, one_bit

aten = torch.ops.aten


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return F.dropout(input, p, training)


def _dropout_saving(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    if inplace and input.is_cuda:  # other random numbers there than those of the fused kernel
        scaled = torch.empty_like(input).bernoulli_(1 - p).div_(1 - p)
        return input * scaled, {"mask": scaled != 0}
    # draws the same random numbers as F.dropout, whose own saved tensor is a mask of floats
    out, mask = torch.native_dropout(input, p, True)
    return out, {"mask": mask}


def _dropout_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY * mask / (1 - p)``."""
    p = call.args["p"]
    scale = 0.0 if p == 1 else 1 / (1 - p)
    if (grad.is_cpu or call.args["inplace"]) and type(grad) is Tensor:
        # there autograd, in eager mode, multiplies by a tensor: its dtype has rounded the scale
        scale = torch.tensor(scale, dtype=grad.dtype).item()
    return {"input": aten.native_dropout_backward(grad, saved["mask"], scale)}


def _dropout_again(input: Tensor, p: float, training: bool, inplace: bool, mask: Tensor) -> Tensor:
    """With the mask that was drawn."""
    out: Tensor = aten.native_dropout_backward(input, mask, 1 / (1 - p))
    return out


def _dropout_draws(args: Mapping[str, Any]) -> str:
    return "" if args["training"] and 0 < args["p"] < 1 else "this dropout draws no mask"


DROPOUT = OpRule(
    name="dropout",
    targets=(
        F.dropout,
        torch.dropout,
        torch.dropout_,
        aten.dropout.default,
        aten.dropout_.default,
    ),
    orders=dict.fromkeys((torch.dropout_, aten.dropout_.default), ("input", "p", "training")),
    reads=(Read(operand="mask", use=Use.SLOPE, needed_by=("input",), bits=one_bit),),
    run=_dropout,
    run_saving=_dropout_saving,
    backward=_dropout_backward,
    derive=_dropout_again,
    obstacle=_dropout_draws,
)


def _where(condition: Tensor, input: Any, other: Any) -> Tensor:
    return torch.where(condition, input, other)


def _where_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """The gradient goes to ``input`` where the condition holds, else to ``other``."""
    holds, out = saved["condition"], Grads()
    if "input" in call.needs:
        out["input"] = grad.where(holds, 0).sum_to_size(call.shapes["input"])
    if "other" in call.needs:
        out["other"] = grad.masked_fill(holds, 0).sum_to_size(call.shapes["other"])
    return out


def _plain_where(args: Mapping[str, Any]) -> str:
    both = [args[n].dtype for n in ("input", "other") if isinstance(args[n], Tensor)]
    return "" if len(set(both)) <= 1 else "it joins two dtypes"


WHERE = OpRule(
    name="where",
    targets=(torch.where, "where", aten.where.self),
    orders={"where": ("input", "condition", "other")},
    reads=(
        Read(
            operand="condition",
            use=Use.SLOPE,
            needed_by=("input", "other"),
            bits=one_bit,
            like="condition",
        ),
    ),
    run=_where,
    backward=_where_backward,
    derive=_where,
    obstacle=_plain_where,
)


def _masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    return torch.masked_fill(input, mask, value)


def _masked_fill_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """No gradient where it was filled."""
    return {"input": grad.masked_fill(saved["mask"], 0).sum_to_size(call.shapes["input"])}


MASKED_FILL = OpRule(
    name="masked_fill",
    targets=(
        torch.masked_fill,
        "masked_fill",
        "masked_fill_",
        aten.masked_fill.Scalar,
        aten.masked_fill_.Scalar,
    ),
    reads=(Read(operand="mask", use=Use.SLOPE, needed_by=("input",), bits=one_bit, like="mask"),),
    run=_masked_fill,
    backward=_masked_fill_backward,
    derive=_masked_fill,
    obstacle=lambda args: "its value is a tensor" if isinstance(args["value"], Tensor) else "",
)

ROWS = (DROPOUT, WHERE, MASKED_FILL)
