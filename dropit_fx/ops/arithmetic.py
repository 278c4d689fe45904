"""Products, quotients and powers; sums and casts, which save nothing.

Those have rows for the values that are derived through them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved
from dropit_fx.ops.rule import OpRule, Read, Use
from dropit_fx.private import to_copy

aten = torch.ops.aten


def _arithmetic(op: Callable[..., Tensor], input: Any, other: Any, inplace: bool) -> Tensor:
    """What is written in place keeps its dtype; autocast has no say in it."""
    if not inplace or not isinstance(input, Tensor):
        return op(input, other)
    device = input.device.type
    lowered = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if lowered else nullcontext():
        return op(input, other).to(input.dtype)


def _full_size(operand: str) -> Callable[[Mapping[str, Any]], bool]:
    """False for an operand that is broadcast: a scale of many elements, and small."""
    return lambda args: bool(args[operand].numel() == args["result"].numel())


def _mul(input: Any, other: Any, inplace: bool = False) -> Tensor:
    return _arithmetic(torch.mul, input, other, inplace)


def _mul_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dA = dY * B``, ``dB = dY * A``, summed over what was broadcast."""
    out: Grads = {}
    for name, factor in (("input", "other"), ("other", "input")):
        if name in call.needs:
            by = saved[factor] if factor in call.shapes else call.args[factor]
            out[name] = (grad * by).sum_to_size(call.shapes[name])
    return out


MUL = OpRule(
    name="mul",
    targets=(
        *(operator.mul, torch.mul, "mul", "__mul__", aten.mul.Tensor),
        *(operator.imul, "mul_", "__imul__", aten.mul_.Tensor),
    ),
    reads=(
        Read(operand="input", use=Use.REDUCE, needed_by=("other",), lossy=_full_size("input")),
        Read(operand="other", use=Use.REDUCE, needed_by=("input",), lossy=_full_size("other")),
    ),
    run=_mul,
    backward=_mul_backward,
    derive=_mul,
)


def _div(input: Any, other: Any, inplace: bool = False) -> Tensor:
    return _arithmetic(torch.div, input, other, inplace)


def _number_over_tensor(args: Mapping[str, Any]) -> str:
    if isinstance(args["input"], Tensor):
        return ""
    return "a number over a tensor is computed, and saved, through the reciprocal"


DIV = OpRule(
    name="div",
    targets=(
        *(operator.truediv, torch.div, "div", "__truediv__", aten.div.Tensor),
        *(operator.itruediv, "div_", "__itruediv__", aten.div_.Tensor),
    ),
    reads=(
        Read(operand="input", use=Use.REDUCE, needed_by=("other",), lossy=_full_size("input")),
        # near zero, a small change of the divisor is a large one of the gradient
        Read(operand="other", use=Use.REDUCE, needed_by=("input", "other"), lossy=False),
    ),
    run=_div,
    derive=_div,
    obstacle=_number_over_tensor,
)


def _pow(input: Any, exponent: Any, inplace: bool = False) -> Tensor:
    return _arithmetic(torch.pow, input, exponent, inplace)


POW = OpRule(
    name="pow",
    targets=(
        *(operator.pow, torch.pow, "pow", "__pow__", aten.pow.Tensor_Scalar),
        *(operator.ipow, "pow_", "__ipow__", aten.pow_.Scalar),
    ),
    reads=(
        Read(
            operand="input",
            use=Use.REDUCE,
            needed_by=("input",),
            lossy=lambda args: args["exponent"] >= 1,  # below, the slope at 0 has no bound
        ),
    ),
    run=_pow,
    derive=_pow,
    obstacle=lambda args: (
        "" if isinstance(args["exponent"], int | float) else "its exponent is a tensor"
    ),
)


def _square(input: Tensor) -> Tensor:
    return torch.square(input)


SQUARE = OpRule(
    name="square",
    targets=(torch.square, "square", aten.square.default),
    reads=(Read(operand="input", use=Use.REDUCE, needed_by=("input",)),),
    run=_square,
    derive=_square,
)


def _scaled(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(input: Any, other: Any, alpha: Any = 1) -> Tensor:
        return op(input, other, alpha=alpha)

    return run


ADD_SUB = tuple(
    OpRule(
        name=name,
        targets=(
            getattr(operator, name),
            getattr(operator, f"i{name}"),
            getattr(torch, name),
            name,
            f"{name}_",
            f"__{name}__",
            f"__i{name}__",
            getattr(aten, name).Tensor,
            getattr(aten, f"{name}_").Tensor,
        ),
        reads=(),
        run=run,
        derive=run,
    )
    for name, run in (("add", _scaled(torch.add)), ("sub", _scaled(torch.sub)))
)


def _to(input: Tensor) -> Tensor:
    """``input`` itself: a value that is made again takes the dtype of the one it stands for."""
    return input


def _no_cast(args: Mapping[str, Any]) -> str:
    x, out = args["input"], args["result"]
    floats = x.is_floating_point() and out.is_floating_point()
    if not floats or x.dtype == out.dtype or x.device != out.device:
        return "it is no cast from one floating-point dtype to another"
    return ""


_CASTS = (
    *("to", "type", "type_as", "float", "double", "half", "bfloat16"),
    *(getattr(aten.to, overload) for overload in ("dtype", "dtype_layout", "device", "other")),
    aten.type_as.default,
    to_copy.default,
)


_OF_CASTS = (
    *("dtype", "dst_type", "tensor", "other", "device", "layout", "pin_memory"),
    *("non_blocking", "copy", "memory_format"),
)


TO = OpRule(
    name="to",
    targets=_CASTS,
    # to what it is cast, the result says
    orders=dict.fromkeys(_CASTS, ("input",)),
    ignored=frozenset(_OF_CASTS),
    reads=(),
    run=_to,
    derive=_to,
    obstacle=_no_cast,
)

ROWS = (MUL, DIV, POW, SQUARE)

SAVES_NOTHING = (*ADD_SUB, TO)
