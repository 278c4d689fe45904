"""Matrix products: linear, matmul and what they are made of.

GEMM, ``Y = A B``: ``dA = dY B^T``, ``dB = A^T dY``; linear, ``Y = X W^T + b``: ``dX = dY W``,
``dW = dY^T X``, ``db = sum(dY)``. Where only X is packed, dX and db do not touch it: they are exact
(DropIT, arXiv 2202.13808, section 3).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Formula, Grads, Saved, vjp
from dropit_fx.ops.rule import OpRule, Read, Use
from dropit_fx.private import grouped_mm, grouped_mm_of_torch

aten = torch.ops.aten


ByRow = Callable[[Mapping[str, Any]], bool]  # ``Read.by_row``

# The reads of linear and of convolutions: the weight stays exact, so that dX does.
LAYER = (
    Read(operand="input", use=Use.CONTRACT, needed_by=("weight",)),
    Read(operand="weight", use=Use.CONTRACT, needed_by=("input",), lossy=False),
)


def _of_matrix(right: str) -> ByRow:
    """``by_row`` of the left operand: the gradient of one matrix sums over all its rows."""
    return lambda args: bool(args[right].dim() == 2)


def _product(left: str, right: str, by_row: ByRow | None = None) -> tuple[Read, ...]:
    """The reads of a GEMM: each operand, for the gradient of the other."""
    return (
        Read(operand=left, use=Use.CONTRACT, needed_by=(right,), by_row=by_row),
        Read(operand=right, use=Use.CONTRACT, needed_by=(left,)),
    )


def _column_major(shape: Any, strides: Any) -> bool:
    return bool(strides[0] == 1 and strides[1] == shape[0])


def _contiguous(shape: Any, strides: Any) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def _left(grad: Tensor, b: Tensor, a_is_column_major: bool) -> Tensor:
    """``dA = dY B^T`` of a 2-D product; column-major where A is, as in autograd."""
    return b.mm(grad.t()).t() if a_is_column_major else grad.mm(b.t())


def _right(grad: Tensor, a: Tensor, b_is_column_major: bool) -> Tensor:
    """``dB = A^T dY`` of a 2-D product; column-major where B is."""
    return grad.t().mm(a).t() if b_is_column_major else a.t().mm(grad)


def _batch_by_batch(shape: Any, strides: Any) -> bool:
    """Whether a product of a batch and a matrix without gradient is one ``bmm``, not one ``mm``.

    ATen's ``matmul`` folds the batch into the rows where that is a view, or where the matrix wants
    a gradient; the two round differently on some processors.
    """
    rows = range(len(shape) - 2)
    view = all(strides[d] == strides[d + 1] * shape[d + 1] for d in rows)
    return len(shape) > 2 and not view and 0 not in shape


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _of_rows(grad: Tensor, matrix: Tensor, call: Called, by: str) -> Tensor:
    """``dA = dY B^T`` of ``input: (*, k)`` times ``matrix: (k, n)``, of the argument ``by``."""
    shape, strides = call.shapes["input"], call.strides["input"]
    if by not in call.needs and _batch_by_batch(shape, strides):
        batch = grad.flatten(0, -3)  # (batch, rows, n)
        return batch.bmm(matrix.t().expand(batch.shape[0], -1, -1)).reshape(shape)
    columns = grad.dim() == 2 and _column_major(shape, strides)
    return _left(grad.flatten(0, -2), matrix, columns).reshape(shape)


def _linear_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``input: (*, in)``, ``weight: (out, in)``, ``bias: (out,)``, ``grad: (*, out)``."""
    if grad.dim() < 2 or len(call.shapes["weight"]) != 2:
        return vjp(grad, saved, call)
    out: Grads = {}
    flat = grad.flatten(0, -2)  # (rows, out)
    if "input" in call.needs:
        out["input"] = _of_rows(grad, saved["weight"].t(), call, "weight")
    if "weight" in call.needs:
        rows, x = saved.by_row("input", flat)
        out["weight"] = rows.t().mm(x)  # (out, rows) @ (rows, in)
    if "bias" in call.needs:
        # contiguous inputs go through addmm on the flat view, others through a broadcast add
        whole = _contiguous(call.shapes["input"], call.strides["input"])
        out["bias"] = (flat if whole else grad).sum_to_size(call.shapes["bias"])
    return out


LINEAR = OpRule(
    name="linear",
    targets=(F.linear, aten.linear.default),
    reads=(replace(LAYER[0], by_row=_of_matrix("weight")), LAYER[1]),
    run=F.linear,
    schema=aten.linear.default,
    backward=_linear_backward,
    autocast="lower",
)


def _matmul_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``input: (*, m, k)``, ``other: (*, k, n)`` or ``(k, n)``.

    As ``torch.matmul`` does it: folded into one ``mm`` where ``other`` is a matrix, else one
    ``bmm``. How it folds batches that broadcast depends on more than their shapes: those repeat the
    forward.
    """
    a_shape, b_shape = call.shapes["input"], call.shapes["other"]
    one_batch = a_shape[:-2] == b_shape[:-2]
    if len(a_shape) < 2 or len(b_shape) < 2 or not (one_batch or len(b_shape) == 2):
        return vjp(grad, saved, call)
    out: Grads = {}
    if len(b_shape) == 2:
        if "input" in call.needs:
            out["input"] = _of_rows(grad, saved["other"], call, "other")
        if "other" in call.needs:
            columns = _column_major(b_shape, call.strides["other"])
            out["other"] = _right(*saved.by_row("input", grad.flatten(0, -2)), columns)
        return out
    flat = grad.flatten(0, -3)  # (batch, m, n)
    if "input" in call.needs:
        b = saved["other"].flatten(0, -3)  # (batch, k, n)
        out["input"] = flat.bmm(b.transpose(1, 2)).reshape(a_shape)
    if "other" in call.needs:
        a = saved["input"].flatten(0, -3)  # (batch, m, k)
        out["other"] = a.transpose(1, 2).bmm(flat).reshape(b_shape)
    return out


MATMUL = OpRule(
    name="matmul",
    targets=(torch.matmul, operator.matmul, "matmul", "__matmul__", aten.matmul.default),
    reads=_product("input", "other", _of_matrix("other")),
    run=torch.matmul,
    schema=aten.matmul.default,
    backward=_matmul_backward,
    autocast="lower",
)


def _of_matrices(left: str, right: str) -> Formula:
    """Of ``beta * input + alpha * (left: (m, k)) @ (right: (k, n))``; ``input`` broadcasts."""

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        out, alpha = _of_addend(grad, call, left), call.args.get("alpha", 1)
        if left in call.needs:
            columns = _column_major(call.shapes[left], call.strides[left])
            out[left] = _scaled(_left(grad, saved[right], columns), alpha)
        if right in call.needs:
            columns = _column_major(call.shapes[right], call.strides[right])
            out[right] = _scaled(_right(*saved.by_row(left, grad), columns), alpha)
        return out

    return backward


def _of_batches(left: str, right: str) -> Formula:
    """Of ``beta * input + alpha * (left: (b, m, k)) @ (right: (b, k, n))``."""

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        out, alpha = _of_addend(grad, call, left), call.args.get("alpha", 1)
        if left in call.needs:
            out[left] = _scaled(grad.bmm(saved[right].transpose(1, 2)), alpha)
        if right in call.needs:
            out[right] = _scaled(saved[left].transpose(1, 2).bmm(grad), alpha)
        return out

    return backward


def _of_addend(grad: Tensor, call: Called, left: str) -> Grads:
    """The gradient of what is added to a product, where ``input`` is no factor of it."""
    if left == "input" or "input" not in call.needs:
        return {}
    return {"input": _scaled(grad, call.args["beta"]).sum_to_size(call.shapes["input"])}


MM = OpRule(
    name="mm",
    targets=(torch.mm, "mm", aten.mm.default),
    reads=_product("input", "mat2", _of_matrix("mat2")),
    run=torch.mm,
    schema=aten.mm.default,
    backward=_of_matrices("input", "mat2"),
    autocast="lower",
)


BMM = OpRule(
    name="bmm",
    targets=(torch.bmm, "bmm", aten.bmm.default),
    reads=_product("input", "mat2"),
    run=torch.bmm,
    schema=aten.bmm.default,
    backward=_of_batches("input", "mat2"),
    autocast="lower",
)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)


ADDMM = OpRule(  # also Hugging Face's Conv1D
    name="addmm",
    targets=(torch.addmm, "addmm", aten.addmm.default),
    reads=_product("mat1", "mat2", _of_matrix("mat2")),
    run=_addmm,
    backward=_of_matrices("mat1", "mat2"),
    autocast="lower",
)


def _baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    return torch.baddbmm(input, batch1, batch2, beta=beta, alpha=alpha)


BADDBMM = OpRule(
    name="baddbmm",
    targets=(torch.baddbmm, "baddbmm", aten.baddbmm.default),
    reads=_product("batch1", "batch2"),
    run=_baddbmm,
    backward=_of_batches("batch1", "batch2"),
    autocast="lower",
)


def _grouped_mm(
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out: Tensor = grouped_mm(input, mat2, offs, bias, out_dtype)
    return out


def _grouped_left(grad: Tensor, b: Tensor, call: Called, offs: Tensor | None) -> Tensor:
    """``dA = dY B^T``, group by group; column-major where A is, as in autograd."""
    if _columns(call, "input"):
        return _grouped_mm(b, grad.mT, offs).mT
    return _grouped_mm(grad, b.mT, offs)


def _grouped_right(grad: Tensor, a: Tensor, call: Called, offs: Tensor | None) -> Tensor:
    """``dB = A^T dY``, group by group; column-major where B is."""
    if _columns(call, "mat2"):
        return _grouped_mm(grad.mT, a, offs).mT
    return _grouped_mm(a.mT, grad, offs)


def _columns(call: Called, operand: str) -> bool:
    shape, strides = call.shapes[operand], call.strides[operand]
    return bool(strides[-2] == 1 and strides[-1] == shape[-2])


def _grouped_mm_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """Of products of groups: ``offs`` says where they end along the dimension that they share."""
    out: Grads = {}
    offs = saved["offs"] if "offs" in call.shapes else None
    if "input" in call.needs:
        out["input"] = _grouped_left(grad, saved["mat2"], call, offs)
    if "mat2" in call.needs:
        out["mat2"] = _grouped_right(grad, saved["input"], call, offs)
    return out


# Where the groups end. It is one number for each, and a rounded one would be that of other rows.
_ENDS = Read(operand="offs", use=Use.REDUCE, needed_by=("input", "mat2"), lossy=False)

GROUPED_MM = OpRule(  # experts of a mixture, one product for all
    name="grouped_mm",
    targets=(
        *(grouped_mm_of_torch, grouped_mm.default),
        *([F.grouped_mm] if hasattr(F, "grouped_mm") else ()),
    ),
    reads=(*_product("input", "mat2"), _ENDS),
    run=_grouped_mm,
    backward=_grouped_mm_backward,
    obstacle=lambda args: next(
        (f"has {name}" for name in ("bias", "out_dtype") if args[name] is not None), ""
    ),
)

ROWS = (LINEAR, MATMUL, MM, BMM, ADDMM, BADDBMM, GROUPED_MM)
