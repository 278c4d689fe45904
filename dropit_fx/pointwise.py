"""A nonlinearity of one's own as an op of the table, its slope in 1 to 4 bits."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use
from dropit_fx.ops.step_tables import Pointwise, TableError, register
from dropit_fx.ops.table import RULES, add_row
from dropit_fx.runtime import packed_call

_DECLARED: dict[str, Pointwise] = {}
_ANYWHERE = torch.linspace(-8, 8, 4097, dtype=torch.float64)  # where two functions are compared


def pointwise(name: str) -> Callable[[Pointwise], Pointwise]:
    """Decorates a pointwise function, which is then one op wherever a graph calls it.

    Without it, a graph has the ops that the function is made of, each with its own saved tensors.
    With it, the function's input alone is kept, by any codec that serves a slope: ``quant``, or
    ``few_bit`` with tables solved here (Few-Bit Backward, arXiv 2202.00441), in about a second.
    Where its slope jumps at 0, as that of ``torch.where(x > 0, x, 2 * x)`` does, a 0 stays a 0.
    ``torch.export`` looks inside all the same: for models that it captures, nothing changes.
    Declaring the same function again, as a notebook does that runs a cell twice, gives the op that
    it is already.

    Args:
        name: The word for it in configs and reports; not that of another op.

    Raises:
        TableError: The name is taken, or the function is not pointwise, or has no finite
            derivative, or does not work in float64.
    """

    def decorate(f: Pointwise) -> Pointwise:
        if name in RULES and name not in _DECLARED:
            raise TableError(f"{name!r} is an op already: choose another name.")
        register(name, f)
        if name in _DECLARED:
            if not torch.equal(f(_ANYWHERE), _DECLARED[name](_ANYWHERE)):
                raise TableError(f"{name!r} is another function already: choose another name.")
            return _DECLARED[name]

        @functools.wraps(f)
        def op(input: Tensor) -> Tensor:
            if has_torch_function((input,)):  # a tracer's proxy: one node for all of it
                out: Tensor = handle_torch_function(op, (input,), input)
                return out
            return f(input)

        def run(input: Tensor) -> Tensor:
            return f(input)

        jumps = _jumps_at_zero(f)
        reads = (
            Read(
                operand="input",
                use=Use.SLOPE,
                needed_by=("input",),
                function=lambda args: name,
                jumps=lambda args: jumps,
            ),
            Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
        )
        rule = OpRule(name=name, targets=(op,), reads=reads, run=run, derive=run)
        add_row(rule)
        packed_call.add_row(rule, _version(f))
        torch.compiler.allow_in_graph(op)  # type: ignore[no-untyped-call]
        _DECLARED[name] = op
        return op

    return decorate


def _jumps_at_zero(f: Pointwise) -> bool:
    """Whether the slope right below 0, that at 0 and that right above are not the same."""
    near = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(f(near).sum(), near)
    return bool((slopes - slopes[1]).abs().max() > 1e-3)


def _version(f: Any) -> str:
    """Changes with the function's code: compile caches do not look into it."""
    code = getattr(f, "__code__", None)
    text = repr(f) if code is None else repr((code.co_code, code.co_consts, code.co_names))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
