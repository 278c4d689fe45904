"""What the backward formulas of the rows have in common.

With ``y = run(*args)`` and ``grad = dL/dy``, each formula has the signature
``(grad, saved, call) -> {argument: dL/dargument}``: ``saved[operand]`` unpacks a saved tensor when
it is first read, ``call`` holds the other arguments and what is asked for. The formulas of the
families follow the products and reductions of PyTorch's own one for one, so that with a lossless
codec every gradient has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dropit_fx.ops.rule import OpRule
from dropit_fx.private import peek_interpreter_stack

Grads = dict[str, Tensor | None]


@dataclass(slots=True)
class Called:
    """The arguments of one call that are not saved tensors, and which gradients are asked for."""

    rule: OpRule
    args: dict[str, Any]  # by name, None in the place of each tensor
    shapes: dict[str, Any]  # of tensor arguments, as the next two
    strides: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    needs: frozenset[str]  # the arguments whose gradients are wanted


class Saved(Mapping[str, Tensor]):
    """What the op kept: operand -> dense tensor, unpacked when it is read."""

    def masked(self, operand: str, grad: Tensor) -> Tensor:
        """``grad`` where the bits kept for ``operand`` are set, 0 elsewhere."""
        raise NotImplementedError

    def by_row(self, operand: str, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What ``grad^T x`` is the product of, a sum over rows: ``grad: (rows, out)`` and ``x``.

        ``x: (rows, width)`` is the operand, all its dimensions but the last in one. Where rows of
        it were dropped, both are without them, and ``grad`` is weighted.
        """
        return grad, self[operand].flatten(0, -2)

    def by_sample(self, operand: str, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """The samples that the gradient of a layer's weight is a sum of, where some were dropped.

        Of ``grad: (batch, out, *)``, weighted, and of the operand, ``(batch, in, *)``, both
        without these. None where it is the sum of all.
        """
        return None

    def blank(self, operand: str) -> Tensor:
        """Memory in the shape and the layout of an operand, for what reads these alone."""
        raise NotImplementedError

    def rounded(self, operand: str) -> bool:
        """Whether ``operand`` differs from what the op read in the forward."""
        raise NotImplementedError


Formula = Callable[[Tensor, Saved, Called], Grads]


def vjp(
    grad: Tensor,
    saved: Mapping[str, Tensor],
    call: Called,
    forward: Callable[..., Any] | None = None,
) -> Grads:
    """The generic backward: the vector-Jacobian product of the row's ``run``, which it repeats.

    By autograd itself where plain tensors are computed with: ``torch.func.vjp`` runs the same
    kernels, and takes about ten times the host's time. Tracers and transforms get the latter.
    ``forward`` is in the place of ``run`` where that would draw random numbers again.
    """
    again = forward or call.rule.run
    wanted = tuple(n for n in call.shapes if n in call.needs)
    fixed = {n: call.args[n] for n in call.args if n not in call.shapes}
    fixed |= {n: saved[n] for n in call.shapes if n not in wanted}

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(wanted, tensors, strict=True))
        # positional, in signature order: some builtins take no keywords
        return again(*[given[n] if n in given else fixed[n] for n in call.args])

    given = [saved[n] for n in wanted]
    if not is_plain(grad, *given):
        pull = torch.func.vjp(run, *given)[1]
        return dict(zip(wanted, pull(grad), strict=True))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in given]
        out = run(*leaves)
    if not out.requires_grad:
        return {n: torch.zeros_like(x) for n, x in zip(wanted, given, strict=True)}
    grads = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


def is_plain(*tensors: Tensor) -> bool:
    """Whether autograd may be run on ``tensors`` here: no compiler, no transform, no subclass."""
    return not (
        torch.compiler.is_compiling()
        or any(type(x) is not Tensor and type(x) not in _PLAIN for x in tensors)
        or peek_interpreter_stack() is not None
    )


_PLAIN: list[type[Tensor]] = []  # whose ops run as those of plain ones, too


@contextmanager
def as_plain(kind: type[Tensor]) -> Iterator[None]:
    """For the time of a block, what runs for such tensors is what runs for plain ones.

    They are fake ones, and what is told of them is memory.
    """
    _PLAIN.append(kind)
    try:
        yield
    finally:
        _PLAIN.pop()


def optional(saved: Saved, call: Called, operand: str) -> Tensor | None:
    """A saved tensor, or None where the call was given none."""
    return saved[operand] if operand in call.shapes else None


_OF_LAYER = ("input", "weight", "bias")


def of_layer(op: Callable[..., Any], call: Called, *args: Any) -> Grads:
    """ATen's own backward of a layer, which is told last whose gradients are asked for."""
    grads = op(*args, [n in call.needs for n in _OF_LAYER])
    return dict(zip(_OF_LAYER, grads, strict=True))


def per_dimension(value: Any, dims: int) -> list[int]:
    """``3`` or ``(3,)`` or ``(3, 3)`` as one int for each dimension."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))


def masked(operand: str) -> Formula:
    """The gradient where the bit of ``operand`` is set (relu sets it for NaN), 0 elsewhere."""

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        return {"input": saved.masked(operand, grad)}

    return backward


def slopes(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY * f'(x)`` where what is kept gives ``f'(x)`` itself (codec ``few_bit``)."""
    (operand,) = saved
    return {"input": grad * saved[operand]}


def pointwise(op: Callable[..., Tensor], *names: str, operand: str = "input") -> Formula:
    """``dX = op(grad, x, *args)``: one of ATen's own backward functions."""

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        return {"input": op(grad, saved[operand], *[call.args[n] for n in names])}

    return backward
