"""Piecewise-linear functions: one bit for each element says which slope holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved, masked, vjp
from dropit_fx.ops.rule import OpRule, Read, Use, one_bit, out_of_place
from dropit_fx.ops.sides import BESIDE_INPUT, SIDE, Jump, on_its_side, sides

aten = torch.ops.aten


def _piecewise(
    name: str,
    operand: str,
    targets: tuple[Any, ...],
    between: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None,
    **row: Any,
) -> OpRule:
    """A row of a piecewise-linear function: one bit says which of its two slopes holds."""
    read = Read(operand=operand, use=Use.SLOPE, needed_by=("input",), bits=one_bit, between=between)
    run = out_of_place(getattr(F, name))
    return OpRule(name=name, targets=targets, reads=(read,), run=run, derive=run, **row)


RELU = _piecewise(
    "relu",
    "result",
    (F.relu, torch.relu, torch.relu_, "relu", "relu_", aten.relu.default, aten.relu_.default),
    between=lambda args: (0.0, None),
    backward=masked("result"),
)


RELU6 = _piecewise(
    "relu6",
    "result",
    (F.relu6, aten.relu6.default, aten.relu6_.default),
    between=lambda args: (0.0, 6.0),
    backward=masked("result"),
)


def _hardtanh_saving(
    input: Tensor, min_val: float, max_val: float, inplace: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result says where it was cut, unless a bound is none of the numbers of its dtype."""
    out = F.hardtanh(input, min_val, max_val)
    if _holds(input.dtype, min_val) and _holds(input.dtype, max_val):
        return out, {}
    slope = torch.ops.aten.hardtanh_backward(torch.ones_like(input), input, min_val, max_val)
    return out, {"result": slope != 0}


def _holds(dtype: torch.dtype, bound: float) -> bool:
    """Whether a short dtype has this very number; longer ones round it in one way everywhere."""
    if dtype not in (torch.bfloat16, torch.float16) or bound in (0.0, math.inf, -math.inf):
        return True
    info = torch.finfo(dtype)
    if not info.smallest_normal <= abs(bound) <= info.max:
        return False
    # rounded to its significand (Dekker): arithmetic that a compiler can do as it traces
    far = bound * (2.0**52 * info.eps + 1)
    return far - (far - bound) == bound


HARDTANH = _piecewise(
    "hardtanh",
    "result",
    (F.hardtanh, F.hardtanh_, aten.hardtanh.default, aten.hardtanh_.default),
    between=lambda args: (args["min_val"], args["max_val"]),
    run_saving=_hardtanh_saving,
    backward=masked("result"),
)


def _leaky_relu_saving(
    input: Tensor, negative_slope: float, inplace: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    return F.leaky_relu(input, negative_slope), {"input": input > 0}


def _leaky_relu_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """The gradient where the bit is set, ``negative_slope`` times it elsewhere."""
    slope = call.args["negative_slope"]
    return {"input": torch.where(saved["input"], grad, grad * slope)}


LEAKY_RELU = _piecewise(
    "leaky_relu",
    "input",
    (F.leaky_relu, F.leaky_relu_, aten.leaky_relu.default, aten.leaky_relu_.default),
    run_saving=_leaky_relu_saving,
    backward=_leaky_relu_backward,
)


def _hardsigmoid_saving(input: Tensor, inplace: bool) -> tuple[Tensor, dict[str, Tensor]]:
    return F.hardsigmoid(input), {"input": (input > -3) & (input < 3)}


def _hardsigmoid_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """As ATen, at 0 where the bit is set and at the upper bound elsewhere."""
    x = (~saved["input"]).to(grad.dtype) * 3
    return {"input": aten.hardsigmoid_backward(grad, x)}


HARDSIGMOID = _piecewise(
    "hardsigmoid",
    "input",
    (F.hardsigmoid, aten.hardsigmoid.default, aten.hardsigmoid_.default),
    run_saving=_hardsigmoid_saving,
    backward=_hardsigmoid_backward,
)


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return torch.clamp(input, min, max)


def _passes_at_bounds() -> bool:
    """Whether this PyTorch hands on a gradient at the very bound: it has not always been so."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor([-1.0, 1.0], requires_grad=True)
        (slope,) = torch.autograd.grad(torch.clamp(x, -1, 1).sum(), x)
    return bool(slope.all())


_PASSES_AT_BOUNDS = _passes_at_bounds()


def _clamp_saving(input: Tensor, min: Any, max: Any) -> tuple[Tensor, dict[str, Tensor]]:
    passed = torch.ones_like(input, dtype=torch.bool)
    if min is not None:
        passed = input >= min if _PASSES_AT_BOUNDS else input > min
    if max is not None:
        passed = passed & (input <= max if _PASSES_AT_BOUNDS else input < max)
    return torch.clamp(input, min, max), {"input": passed}


_CLAMPS_FROM_BELOW, _CLAMPS_FROM_ABOVE = (
    (
        *(getattr(torch, name), getattr(torch, f"{name}_"), name, f"{name}_"),
        *(getattr(aten, name).default, getattr(aten, f"{name}_").default),
    )
    for name in ("clamp_min", "clamp_max")
)


CLAMP = OpRule(
    name="clamp",
    targets=(
        *(torch.clamp, torch.clip, "clamp", "clip", aten.clamp.default),
        *(torch.clamp_, "clamp_", "clip_", aten.clamp_.default),
        *_CLAMPS_FROM_BELOW,
        *_CLAMPS_FROM_ABOVE,
    ),
    orders=dict.fromkeys(_CLAMPS_FROM_ABOVE, ("input", "max")),
    reads=(Read(operand="input", use=Use.SLOPE, needed_by=("input",), bits=one_bit),),
    run=_clamp,
    run_saving=_clamp_saving,
    backward=masked("input"),
    derive=_clamp,
    obstacle=lambda args: (
        "its bounds are tensors"
        if isinstance(args["min"], Tensor) or isinstance(args["max"], Tensor)
        else ""
    ),
)

_KINK = (Jump(0.0, as_above=False),)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    return torch.prelu(input, weight)


def _prelu_saving(input: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.prelu(input, weight), {SIDE: sides(input, _KINK)}


def _prelu_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """ATen's own, each value of the input on its side of 0."""
    return vjp(grad, {"input": on_its_side(saved, _KINK), "weight": saved["weight"]}, call)


PRELU = OpRule(
    name="prelu",
    targets=(torch.prelu, "prelu", aten.prelu.default),
    reads=(
        # the slope needs its sign alone, the gradient of the weight sums its values
        Read(operand="input", use=Use.REDUCE, needed_by=("input", "weight")),
        BESIDE_INPUT,
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
    ),
    run=_prelu,
    run_saving=_prelu_saving,
    backward=_prelu_backward,
    derive=_prelu,
    autocast="lower",
)


def _abs(input: Tensor) -> Tensor:
    return torch.abs(input)


def _abs_saving(input: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.abs(input), {"input": (input > 0).to(torch.uint8) + 2 * (input < 0).byte()}


def _abs_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY * sign(x)``."""
    sign = (saved["input"] == 1).to(grad.dtype) - (saved["input"] == 2).to(grad.dtype)
    return {"input": grad * sign}


ABS = OpRule(
    name="abs",
    targets=(torch.abs, torch.absolute, "abs", "absolute", aten.abs.default),
    reads=(
        Read(
            operand="input",
            use=Use.SLOPE,
            needed_by=("input",),
            bits=lambda args: 2,  # it may be 0
        ),
    ),
    run=_abs,
    run_saving=_abs_saving,
    backward=_abs_backward,
    derive=_abs,
)

ROWS = (ABS, RELU, RELU6, HARDTANH, LEAKY_RELU, HARDSIGMOID, CLAMP, PRELU)
