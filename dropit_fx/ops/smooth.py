"""Smooth pointwise functions ``y = f(x)``: ``dX = dY * f'(x)``, from the input or the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved, pointwise
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use, out_of_place
from dropit_fx.ops.sides import BESIDE_INPUT, SIDE, jumps_of, on_its_side, sides

aten = torch.ops.aten


def _smooth(
    name: str,
    targets: tuple[Any, ...],
    run: Callable[..., Tensor],
    *,
    operand: str = "input",
    function: Callable[[Mapping[str, Any]], str] | None = None,
    jumps: Callable[[Mapping[str, Any]], bool] | None = None,
    lossy: bool | Callable[[Mapping[str, Any]], bool] = True,
    why_exact: str = "",
    beside: tuple[Read, ...] = (),
    **row: Any,
) -> OpRule:
    """A row of a smooth pointwise function: what is read gives the slope, element by element.

    ``beside`` are its other reads.
    """
    read = Read(
        operand=operand,
        use=Use.SLOPE,
        needed_by=("input",),
        function=function,
        jumps=jumps,
        lossy=lossy,
        why_exact=why_exact,
    )
    return OpRule(name=name, targets=targets, reads=(read, *beside), run=run, derive=run, **row)


_OF_ITS_OWN = (Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),)


def _table(name: str, **standard: Any) -> Callable[[Mapping[str, Any]], str]:
    """The table of ``name``, where the call has its standard parameters."""
    return lambda args: name if all(args[k] == v for k, v in standard.items()) else ""


def _of_input(op: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(input: Tensor) -> Tensor:
        return op(input)

    return run


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(input, approximate=approximate)


def _gelu_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """As ATen."""
    return {"input": aten.gelu_backward(grad, saved["input"], approximate=call.args["approximate"])}


GELU = _smooth(
    "gelu",
    (F.gelu, aten.gelu.default),
    _gelu,
    function=lambda args: "gelu_tanh" if args["approximate"] == "tanh" else "gelu",
    backward=_gelu_backward,
)

# no parameters, and written in place where the call says so
SILU, MISH = (
    _smooth(
        name,
        (getattr(F, name), getattr(aten, name).default, getattr(aten, f"{name}_").default),
        out_of_place(getattr(F, name)),
        function=_table(name),
        backward=pointwise(getattr(aten, f"{name}_backward")),
    )
    for name in ("silu", "mish")
)

_BOUNDS = jumps_of(F.hardswish, -3.0, 3.0)


def _hardswish_saving(input: Tensor, inplace: bool) -> tuple[Tensor, dict[str, Tensor]]:
    return F.hardswish(input), {SIDE: sides(input, _BOUNDS)}


def _hardswish_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """As ATen."""
    return {"input": aten.hardswish_backward(grad, on_its_side(saved, _BOUNDS))}


HARDSWISH = _smooth(
    "hardswish",
    (F.hardswish, aten.hardswish.default, aten.hardswish_.default),
    out_of_place(F.hardswish),
    function=_table("hardswish"),
    beside=(BESIDE_INPUT,),
    run_saving=_hardswish_saving,
    backward=_hardswish_backward,
)


def _elu_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """As ATen, from the input."""
    alpha = call.args["alpha"]
    return {"input": aten.elu_backward(grad, alpha, 1.0, 1.0, False, saved["input"])}


ELU = _smooth(
    "elu",
    (F.elu, F.elu_, aten.elu.default, aten.elu_.default),
    out_of_place(F.elu),
    function=_table("elu", alpha=1.0),
    jumps=lambda args: args["alpha"] != 1,
    backward=_elu_backward,
)

SELU = _smooth(
    "selu",
    (F.selu, torch.selu, torch.selu_, aten.selu.default, aten.selu_.default),
    out_of_place(F.selu),
    function=_table("selu"),
    jumps=lambda args: True,
)

CELU = _smooth(
    "celu",
    (F.celu, torch.celu, torch.celu_, aten.celu.default, aten.celu_.default),
    out_of_place(F.celu),
    function=_table("celu", alpha=1.0),
)


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return F.softplus(input, beta, threshold)


_SMOOTH = -math.log(0.01)  # from here on, by less than a hundredth

SOFTPLUS = _smooth(
    "softplus",
    (F.softplus, aten.softplus.default),
    _softplus,
    function=_table("softplus", beta=1, threshold=20),
    # there it jumps from sigmoid(threshold) to 1: what is rounded may come to the other side
    lossy=lambda args: args["threshold"] > _SMOOTH,
    why_exact="its slope jumps at a threshold as low as this: it stays exact",
    backward=pointwise(aten.softplus_backward, "beta", "threshold"),
)

LOGSIGMOID = _smooth(
    "logsigmoid",
    (F.logsigmoid, aten.log_sigmoid.default),
    _of_input(F.logsigmoid),
    function=_table("logsigmoid"),
    beside=_OF_ITS_OWN,
)

SOFTSIGN = _smooth(
    "softsign",
    (F.softsign,),
    _of_input(F.softsign),
    function=_table("softsign"),
    beside=_OF_ITS_OWN,
)

SIGMOID, TANH = (
    _smooth(
        name,
        (getattr(torch, name), getattr(F, name), name, getattr(aten, name).default),
        _of_input(getattr(torch, name)),
        operand="result",
        function=_table(f"{name} of result"),
        backward=pointwise(getattr(aten, f"{name}_backward"), operand="result"),
    )
    for name in ("sigmoid", "tanh")
)


def _exp_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY * y``."""
    return {"input": grad * saved["result"]}


EXP = _smooth(
    "exp",
    (torch.exp, "exp", aten.exp.default),
    _of_input(torch.exp),
    operand="result",
    backward=_exp_backward,
)

SIN, COS, ERF = (
    _smooth(
        name,
        (getattr(torch, name), name, getattr(aten, name).default),
        _of_input(getattr(torch, name)),
    )
    for name in ("sin", "cos", "erf")
)

ROWS = (
    *(GELU, SILU, MISH, ELU, SELU, CELU, SOFTPLUS, HARDSWISH, LOGSIGMOID, SOFTSIGN),
    *(SIGMOID, TANH, EXP, SIN, COS, ERF),
)
