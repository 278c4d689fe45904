"""What a loss reads of logits that are never whole in memory: a few numbers of each row.

The logits are ``z = steps(x W^T + b)``, for ``x: (rows, width)``, ``weight: (classes, width)`` and
``bias: (classes,)``. They are made for a block of classes at a time, once in the forward and once
again in the backward, so that beside operands and gradients there is one block: rows times
:func:`block_of` classes. (Cut Cross-Entropy, arXiv 2411.09009, section 4: tiles of both.)

``linear_rows`` gives for each row: ``picked``, the logit of class ``target``; ``lse``,
``log(sum(exp(z)))``; and ``spread``, the sum of the logits times ``factors: (classes,)``. All are
of float32, of float64 where the logits are. ``linear_rows_backward`` takes a gradient for each of
these numbers; of the forward it reads the operands and ``lse``, one number a row, since
``dz = exp(z - lse) d(lse) + onehot(target) d(picked) + factors d(spread)``.

Where ``target`` is of floats, ``(rows, classes)``, it says how much each class counts (soft
targets): ``picked`` is ``sum(z * target * factors)``, and ``mass`` is ``sum(target * factors)``,
which is empty for class numbers. Such a target has a gradient.

``steps`` are done one after the other to each logit: ``mul`` and ``div`` with the number of the
same place in ``numbers``, ``tanh``, or the name of the dtype that it is cast to. ``dtype`` is that
of the product, to which blocks of weight and bias are cast: under autocast it is not theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.kernels.dispatch import define

LEAST = 2048  # classes of a block: with fewer, its products are too narrow to be fast
CASTS = ("float64", "float32", "bfloat16", "float16")
STEPS = ("mul", "div", "tanh", *CASTS)


def block_of(width: int) -> int:
    """How many classes a block has: it then takes about as much memory as ``x``, or as 2048."""
    return max(width, LEAST)


class _Logits(NamedTuple):
    """How logits are made from a block of classes."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: Sequence[str]
    numbers: Sequence[float]
    dtype: torch.dtype

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """First class and last (not included) of each block, and its weights as multiplied."""
        classes, size = self.weight.shape[0], block_of(self.x.shape[1])
        for first, last in pairwise([*range(0, classes, size), classes]):
            yield first, last, self.weight[first:last].to(self.dtype)

    def of(self, first: int, last: int, weight: Tensor) -> list[Tensor]:
        """The product, and what each step made of it."""
        bias = None if self.bias is None else self.bias[first:last].to(self.dtype)
        made = [F.linear(self.x, weight, bias)]
        for step, number in zip(self.steps, self.numbers, strict=True):
            made.append(take_step(made[-1], step, number))
        return made

    def back(self, grad: Tensor, made: list[Tensor]) -> Tensor:
        """From the gradient of the logits to that of the product; ``grad`` may be overwritten."""
        grad = grad.to(made[-1].dtype)
        for i in reversed(range(len(self.steps))):
            grad = _step_back(grad, self.steps[i], self.numbers[i], made[i], made[i + 1])
        return grad


def take_step(z: Tensor, step: str, number: float) -> Tensor:
    """What one of ``STEPS`` makes of ``z``, as the ops of that name do."""
    if step == "tanh":
        return z.tanh()
    if step in CASTS:
        return z.to(getattr(torch, step))
    return z * number if step == "mul" else z / number


def _step_back(grad: Tensor, step: str, number: float, before: Tensor, after: Tensor) -> Tensor:
    if step == "tanh":
        sloped: Tensor = torch.ops.aten.tanh_backward(grad, after)
        return sloped
    if step in CASTS:
        return grad.to(before.dtype)
    return grad * number if step == "mul" else grad / number


def _at(target: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in a block, and where: ``(rows, 1)``, 0 for the others."""
    inside = (target >= first) & (target < last)
    return inside[:, None], (target - first).where(inside, 0)[:, None]


def _in_range(target: Tensor, classes: int, ignored: int) -> None:
    """Raises IndexError as PyTorch's losses do; on a GPU, asserts without waiting for it."""
    target = target.masked_fill(target == ignored, 0)
    if target.is_cpu:
        wrong = target[(target < 0) | (target >= classes)]
        if wrong.numel():
            raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
    else:
        target.new_empty(1).expand(classes).index_select(0, target)


def linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    factors: Tensor | None,
    ignored: int,
    steps: Sequence[str],
    numbers: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In PyTorch, for every device.

    ``target`` is int64, or of floats; where it is ``ignored``, ``picked`` is 0. Without ``target``
    or ``factors``, what comes of them is empty.
    """
    logits = _Logits(x, weight, bias, steps, numbers, dtype)
    found = _fake_rows(x, weight, bias, target, factors, ignored, steps, numbers, dtype)
    picked, lse, spread, mass = (t.zero_() for t in found)
    sums: list[Tensor] = []
    soft = _is_soft(target)
    if target is not None and not soft:
        _in_range(target, weight.shape[0], ignored)
    with torch.autocast(x.device.type, enabled=False):
        for first, last, block in logits.blocks():
            z = logits.of(first, last, block)[-1].to(lse.dtype)
            sums.append(z.logsumexp(1))
            if target is not None and soft:
                counted = _counted(target, factors, first, last, z.dtype)
                mass += counted.sum(1)
                picked += counted.mul_(z).sum(1)
            elif target is not None:
                inside, at = _at(target, first, last)
                picked = torch.where(inside, z.gather(1, at), picked[:, None])[:, 0]
            if factors is not None:
                spread += z @ factors[first:last].to(z.dtype)
    lse = torch.stack(sums).logsumexp(0)
    # where a logit is infinite there is no softmax
    return picked, lse.masked_fill_(lse == float("inf"), float("nan")), spread, mass


def _is_soft(target: Tensor | None) -> bool:
    """Whether it says of each class how much it counts, and is no class number."""
    return target is not None and target.is_floating_point()


def _counted(
    target: Tensor, factors: Tensor | None, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """How much each class of a block counts, by soft targets: a tensor that may be overwritten."""
    part = target[:, first:last].to(dtype, copy=True)
    return part if factors is None else part.mul_(factors[first:last].to(dtype))


def _statistics(steps: Sequence[str], dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is told of logits."""
    casts = [getattr(torch, step) for step in steps if step in CASTS]
    return torch.promote_types([dtype, *casts][-1], torch.float32)


def _fake_rows(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, target, factors, _, steps, _, dtype = rest
    rows, kind = x.shape[0], _statistics(steps, dtype)
    given = (target is not None, True, factors is not None, _is_soft(target))
    picked, lse, spread, mass = (x.new_empty(rows if one else 0, dtype=kind) for one in given)
    return picked, lse, spread, mass


def linear_rows_backward(
    picked: Tensor,
    total: Tensor,
    spread: Tensor,
    mass: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    factors: Tensor | None,
    lse: Tensor,
    steps: Sequence[str],
    numbers: Sequence[float],
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and target from those of the rows, ``lse``'s as ``total``.

    Those that are not ``wanted`` are empty. Of the weights, each is one product, as in autograd; of
    x, products of all blocks are summed, in float32 where they are shorter.
    """
    logits = _Logits(x, weight, bias, steps, numbers, dtype)
    given = (picked, total, spread, mass, x, weight, bias, target)
    dx, dw, db, dt = _fake_grads(*given, *[None] * 5, wanted)
    soft = _is_soft(target)
    sums = torch.zeros_like(dx, dtype=torch.promote_types(dx.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        for first, last, block in logits.blocks():
            made = logits.of(first, last, block)
            if wanted[3]:
                by_class = picked[:, None] * made[-1] + mass[:, None]
                dt[:, first:last] = by_class if factors is None else by_class * factors[first:last]
            own = not steps and made[-1].dtype == lse.dtype  # else a step's gradient reads it
            shifted = made[-1].sub_(lse[:, None]) if own else made[-1] - lse[:, None]
            dz = shifted.exp_().mul_(total[:, None])
            if target is not None and soft:
                counted = _counted(target, factors, first, last, dz.dtype)
                dz.addcmul_(counted, picked[:, None])
            elif target is not None:
                inside, at = _at(target, first, last)
                dz.scatter_add_(1, at, picked[:, None].where(inside, 0))
            if factors is not None:
                dz.addr_(spread, factors[first:last].to(dz.dtype))
            dz = logits.back(dz, made)
            if wanted[0] and sums.dtype == dz.dtype:
                sums.addmm_(dz, block)
            elif wanted[0]:
                sums += dz @ block
            if wanted[1]:
                _product_into(dw[first:last], dz.t(), x)
            if wanted[2]:
                db[first:last] = dz.sum(0)
    return sums.to(dx.dtype), dw, db, dt


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Without a temporary where the dtypes are one."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _fake_grads(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, like = args[-1], [args[4] if t is None else t for t in args[4:8]]
    dx, dw, db, dt = (
        torch.empty_like(t) if ask else t.new_empty(0) for t, ask in zip(like, wanted, strict=True)
    )
    return dx, dw, db, dt


_OPERANDS = "Tensor x, Tensor weight, Tensor? bias, Tensor? target, Tensor? factors"
_LOGITS = "str[] steps, float[] numbers, ScalarType dtype"
define(
    f"linear_rows({_OPERANDS}, int ignored, {_LOGITS})"
    " -> (Tensor picked, Tensor lse, Tensor spread, Tensor mass)",
    linear_rows,
    _fake_rows,
    triton=False,
)
define(
    "linear_rows_backward(Tensor picked, Tensor total, Tensor spread, Tensor mass,"
    f" {_OPERANDS}, Tensor lse, {_LOGITS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    linear_rows_backward,
    _fake_grads,
    triton=False,
)
