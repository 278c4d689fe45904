"""Ops that choose element by element: dropout, where, masked_fill, the larger of two, of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved, is_plain
from dropit_fx.ops.rule import OpRule, Read, Use, one_bit, out_of_place

aten = torch.ops.aten


def _dropout_saving(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    if inplace and input.is_cuda:  # other random numbers there than those of the fused kernel
        scaled = torch.empty_like(input).bernoulli_(1 - p).div_(1 - p)
        return input * scaled, {"mask": scaled != 0}
    out, mask = drop(input, p)
    return out, {"mask": mask}


def drop(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Dropout with its mask: the random numbers and the bits of ``F.dropout``, 0 < p < 1.

    What that keeps is a tensor of floats.
    """
    if not _by_factors(input):
        return torch.native_dropout(input, p, True)
    mask = torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - p)
    return (input * mask).mul_(_factor(input, p)), mask


def dropped_again(input: Tensor, mask: Tensor, p: float) -> Tensor:
    """What :func:`drop` gives for the mask that it drew, to the bit; autograd goes through it."""
    scale = _factor(input, p) if _by_factors(input) else 1 / (1 - p)
    return (input * mask) * scale


def _by_factors(x: Tensor) -> bool:
    """Whether autograd multiplies by a tensor of factors: on CPUs, where nothing is traced."""
    return x.is_cpu and is_plain(x)


def _factor(x: Tensor, p: float) -> float:
    """One of those factors, as the dtype of ``x`` has rounded it."""
    one = torch.ones((), dtype=x.dtype, device=x.device).div_(1 - p)
    return one.item() if type(x) is Tensor else 1 / (1 - p)  # fake ones have no values


def _dropout_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY * mask / (1 - p)``."""
    p = call.args["p"]
    by_factors = _by_factors(grad) or (call.args["inplace"] and type(grad) is Tensor)
    scale = _factor(grad, p) if by_factors else 1 / (1 - p)
    return {"input": aten.native_dropout_backward(grad, saved["mask"], scale)}


def _dropout_again(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """From the mask that is kept: no random number is drawn again."""
    assert mask is not None or not training
    return input if mask is None else dropped_again(input, mask, p)


_DROPOUTS = (
    *(F.dropout, torch.dropout, torch.dropout_),
    *(aten.dropout.default, aten.dropout_.default),
)

DROPOUT = OpRule(
    name="dropout",
    targets=_DROPOUTS,
    orders=dict.fromkeys(_DROPOUTS[1:], ("input", "p", "training")),
    reads=(Read(operand="mask", use=Use.SLOPE, needed_by=("input",), bits=one_bit),),
    run=out_of_place(F.dropout),
    run_saving=_dropout_saving,
    backward=_dropout_backward,
    derive=_dropout_again,
    derive_from=("mask",),
    repeats=True,
    obstacle=lambda args: (
        "" if args["training"] and 0 < args["p"] < 1 else "this dropout draws no mask"
    ),
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

_BOTH = ("input", "other")


def _of_two(name: str) -> OpRule:
    """``maximum`` or ``minimum``: two bits say whose value it is, or that both share the gradient.

    Where one of them is NaN, PyTorch gives both all of it.
    """
    op: Callable[[Tensor, Tensor], Tensor] = getattr(torch, name)

    def run(input: Tensor, other: Tensor) -> Tensor:
        return op(input, other)

    def run_saving(input: Tensor, other: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        wins, loses = (input > other), (input < other)
        if name == "minimum":
            wins, loses = loses, wins
        codes = 3 - loses.to(torch.uint8) * 3 - wins.to(torch.uint8) * 2
        return op(input, other), {"side": codes - (input == other).to(torch.uint8)}

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        side, out = saved["side"], Grads()
        shared = torch.where(side == _SHARED, grad / 2, grad)
        for operand, lost in zip(_BOTH, (_OTHERS, _INPUTS), strict=True):
            if operand in call.needs:
                out[operand] = shared.masked_fill(side == lost, 0).sum_to_size(call.shapes[operand])
        return out

    return OpRule(
        name=name,
        targets=(op, name, getattr(aten, name).default),
        reads=(
            Read(
                operand="side",
                use=Use.SLOPE,
                needed_by=_BOTH,
                bits=lambda args: 2,
                instead=True,
            ),
            *[Read(operand=n, use=Use.SHAPE, needed_by=_BOTH) for n in _BOTH],
        ),
        run=run,
        run_saving=run_saving,
        backward=backward,
        derive=run,
        obstacle=_plain_where,
    )


_OTHERS, _INPUTS, _SHARED = 0, 1, 2  # 3: neither is the larger
MAXIMUM, MINIMUM = map(_of_two, ("maximum", "minimum"))


def _of_a_row(name: str) -> OpRule:
    """``amax`` or ``amin``: a bit says which elements have the value; they share the gradient."""
    op: Callable[..., Tensor] = getattr(torch, name)

    def run(input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        return op(input, dim, keepdim)

    def run_saving(input: Tensor, dim: Any, keepdim: bool) -> tuple[Tensor, dict[str, Tensor]]:
        out = op(input, dim, True)
        return (out if keepdim else op(input, dim)), {"mask": input == out}

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        dims, mask = call.args["dim"], saved["mask"] != 0
        dims = [dims] if isinstance(dims, int) else list(dims)
        dims = dims or list(range(mask.dim()))
        if not call.args["keepdim"]:
            sizes = list(mask.shape)
            for d in dims:
                sizes[d] = 1
            grad = grad.reshape(sizes)
        return {"input": grad * mask / mask.sum(dims, True)}

    return OpRule(
        name=name,
        targets=(op, name, getattr(aten, name).default),
        reads=(
            Read(
                operand="mask",
                use=Use.SLOPE,
                needed_by=("input",),
                bits=one_bit,
                like="input",
                instead=True,
            ),
            *[Read(operand=n, use=Use.SHAPE, needed_by=("input",)) for n in ("input", "result")],
        ),
        run=run,
        run_saving=run_saving,
        backward=backward,
        obstacle=lambda args: "" if args["input"].dim() else "it is of one number",
    )


AMAX, AMIN = map(_of_a_row, ("amax", "amin"))

ROWS = (DROPOUT, WHERE, MASKED_FILL, MAXIMUM, MINIMUM, AMAX, AMIN)
