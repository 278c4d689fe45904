"""The op table: one row for each op that can be packed.

What autograd saves for *every other* op is asked of autograd itself (``passes/find_saved.py``), so
an op without a row is counted exactly and kept whole. To add an op, add a row: its spellings, what
its backward reads, how to run it, and a formula from ``backwards.py`` (or none: the generic
``torch.func.vjp`` then serves).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dropit_fx import backwards as bw
from dropit_fx.core_types import OpRule, Read, Use
from dropit_fx.pooling import max_pool_backward, max_pool_saving, packable, window_bits

aten = torch.ops.aten


# Builtins have no signature to bind to: these name their arguments.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(input, other)


def _mm(input: Tensor, mat2: Tensor) -> Tensor:
    return torch.mm(input, mat2)


def _bmm(input: Tensor, mat2: Tensor) -> Tensor:
    return torch.bmm(input, mat2)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)


def _baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    return torch.baddbmm(input, batch1, batch2, beta=beta, alpha=alpha)


def _conv(dims: int) -> Callable[..., Tensor]:
    op = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        return op(input, weight, bias, stride, padding, dilation, groups)

    return conv


def _conv_transpose(dims: int) -> Callable[..., Tensor]:
    op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]

    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        return op(input, weight, bias, stride, padding, output_padding, groups, dilation)

    return conv_transpose


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu(input)


def _relu_saving(input: Tensor, inplace: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    out = F.relu(input)
    return out, {"result": ~(out <= 0)}  # NaN passes its gradient on, as in aten.threshold_backward


def _relu6(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input)


def _relu6_saving(input: Tensor, inplace: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    return _hardtanh_saving(input, 0.0, 6.0)


def _hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    return F.hardtanh(input, min_val, max_val)


def _hardtanh_saving(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    inside = ~((input <= min_val) | (input >= max_val))
    return F.hardtanh(input, min_val, max_val), {"result": inside}


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return F.leaky_relu(input, negative_slope)


def _leaky_relu_saving(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    return F.leaky_relu(input, negative_slope), {"input": input > 0}


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return F.dropout(input, p, training)


def _dropout_saving(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    # draws the same random numbers as F.dropout, whose own saved tensor is a mask of floats
    out, mask = torch.native_dropout(input, p, True)
    return out, {"mask": mask}


def _max_pool(dims: int) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]

    def max_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        return op(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    return max_pool


def _one_bit(args: Mapping[str, Any]) -> int:
    return 1


def _product(left: str, right: str) -> tuple[Read, ...]:
    """The reads of a GEMM: each operand, for the gradient of the other."""
    return (
        Read(operand=left, use=Use.CONTRACT, needed_by=(right,)),
        Read(operand=right, use=Use.CONTRACT, needed_by=(left,)),
    )


def _layer() -> tuple[Read, ...]:
    """The reads of linear and convolution: the weight stays exact, so that dX does."""
    return (
        Read(operand="input", use=Use.CONTRACT, needed_by=("weight",)),
        Read(operand="weight", use=Use.CONTRACT, needed_by=("input",), lossy=False),
    )


def _piecewise(name: str, operand: str, targets: tuple[Any, ...], **row: Any) -> OpRule:
    """A row of a piecewise-linear function: one bit says which of its two slopes holds."""
    read = Read(operand=operand, use=Use.SLOPE, needed_by=("input",), bits=_one_bit)
    return OpRule(name=name, targets=targets, reads=(read,), **row)


OP_RULES: tuple[OpRule, ...] = (
    OpRule(
        name="linear",
        targets=(F.linear, aten.linear.default),
        reads=_layer(),
        run=_linear,
        backward=bw.linear,
        autocast=True,
    ),
    *(
        OpRule(
            name=f"conv{d}d",
            targets=(
                getattr(torch, f"conv{d}d"),
                getattr(aten, f"conv{d}d").default,
                getattr(aten, f"conv{d}d").padding,
            ),
            reads=_layer(),
            run=_conv(d),
            backward=bw.convolution(d, transposed=False),
            autocast=True,
        )
        for d in (1, 2, 3)
    ),
    *(
        OpRule(
            name=f"conv_transpose{d}d",
            targets=(
                getattr(torch, f"conv_transpose{d}d"),
                getattr(aten, f"conv_transpose{d}d").default
                if d == 1
                else getattr(aten, f"conv_transpose{d}d").input,
            ),
            reads=_layer(),
            run=_conv_transpose(d),
            backward=bw.convolution(d, transposed=True),
            autocast=True,
        )
        for d in (1, 2, 3)
    ),
    OpRule(
        name="matmul",
        targets=(
            torch.matmul,
            operator.matmul,
            "matmul",
            "__matmul__",
            aten.matmul.default,
        ),
        reads=_product("input", "other"),
        run=_matmul,
        backward=bw.matmul,
        autocast=True,
    ),
    OpRule(
        name="mm",
        targets=(torch.mm, "mm", aten.mm.default),
        reads=_product("input", "mat2"),
        run=_mm,
        backward=bw.mm,
        autocast=True,
    ),
    OpRule(
        name="bmm",
        targets=(torch.bmm, "bmm", aten.bmm.default),
        reads=_product("input", "mat2"),
        run=_bmm,
        backward=bw.bmm,
        autocast=True,
    ),
    OpRule(  # also Hugging Face's Conv1D
        name="addmm",
        targets=(torch.addmm, "addmm", aten.addmm.default),
        reads=_product("mat1", "mat2"),
        run=_addmm,
        backward=bw.addmm,
        autocast=True,
    ),
    OpRule(
        name="baddbmm",
        targets=(torch.baddbmm, "baddbmm", aten.baddbmm.default),
        reads=_product("batch1", "batch2"),
        run=_baddbmm,
        backward=bw.baddbmm,
        autocast=True,
    ),
    _piecewise(
        "relu",
        "result",
        (F.relu, torch.relu, torch.relu_, "relu", "relu_", aten.relu.default, aten.relu_.default),
        run=_relu,
        run_saving=_relu_saving,
        backward=bw.masked,
    ),
    _piecewise(
        "relu6",
        "result",
        (F.relu6, aten.relu6.default, aten.relu6_.default),
        run=_relu6,
        run_saving=_relu6_saving,
        backward=bw.masked,
    ),
    _piecewise(
        "hardtanh",
        "result",
        (F.hardtanh, F.hardtanh_, aten.hardtanh.default, aten.hardtanh_.default),
        run=_hardtanh,
        run_saving=_hardtanh_saving,
        backward=bw.masked,
    ),
    _piecewise(
        "leaky_relu",
        "input",
        (F.leaky_relu, F.leaky_relu_, aten.leaky_relu.default, aten.leaky_relu_.default),
        run=_leaky_relu,
        run_saving=_leaky_relu_saving,
        backward=bw.leaky_relu,
    ),
    OpRule(
        name="dropout",
        targets=(
            F.dropout,
            torch.dropout,
            torch.dropout_,
            aten.dropout.default,
            aten.dropout_.default,
        ),
        reads=(Read(operand="mask", use=Use.SLOPE, needed_by=("input",), bits=_one_bit),),
        run=_dropout,
        run_saving=_dropout_saving,
        backward=bw.dropout,
        applies=lambda args: bool(args["training"]) and 0 < args["p"] < 1,
    ),
    *(
        OpRule(
            name=f"max_pool{d}d",
            targets=(
                getattr(F, f"max_pool{d}d"),
                getattr(torch, f"max_pool{d}d"),
                getattr(aten, f"max_pool{d}d").default,
            ),
            reads=(
                Read(operand="indices", use=Use.SLOPE, needed_by=("input",), bits=window_bits(d)),
                Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
            ),
            run=_max_pool(d),
            run_saving=max_pool_saving(d),
            backward=max_pool_backward(d),
            applies=packable(d),
        )
        for d in (1, 2, 3)
    ),
)

RULES: dict[str, OpRule] = {rule.name: rule for rule in OP_RULES}
_BY_TARGET: dict[Any, OpRule] = {t: rule for rule in OP_RULES for t in rule.targets}

# Some spellings call an argument otherwise.
_ALIASES = {"self": "input", "train": "training", "mat1": "input", "batch1": "input"}


def rule_of(node: fx.Node) -> OpRule | None:
    """The row for a ``call_function`` or ``call_method`` node, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    try:
        return _BY_TARGET.get(node.target)
    except TypeError:  # an unhashable target
        return None


def bind(rule: OpRule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Argument name -> value, defaults included, in the order of the row's signature.

    None where the call has arguments that the row does not know (``out=``), which keeps it dense.
    """
    signature = inspect.signature(rule.run)
    known = {(k if k in signature.parameters else _ALIASES.get(k, k)): v for k, v in kwargs.items()}
    try:
        bound = signature.bind(*args, **known)
    except TypeError:
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def is_inplace(node: fx.Node, args: Mapping[str, Any]) -> bool:
    """Whether the call writes into its input."""
    if args.get("inplace"):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
    return name.endswith("_") and not name.endswith("__")
