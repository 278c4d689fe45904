"""A nonlinearity of one's own as an op of the table, its slope in 1 to 4 bits."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dropit_fx.ops.backwards import Called, Grads, Saved, vjp
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use
from dropit_fx.ops.sides import BESIDE_INPUT, SIDE, Jump, jumps_of, on_its_side, sides, slopes
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
    Where its slope jumps at 0, as that of ``torch.where(x > 0, x, 2 * x)`` does, a 0 stays a 0. For
    jumps elsewhere, which are looked for up to 16, a bit an element is kept beside a rounded input:
    on which side it was; where they are many, or lie close together, the input stays exact.
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

        at_zero, elsewhere, why_exact = _jumps_at_zero(f), *_jumps_elsewhere(f)
        reads = (
            Read(
                operand="input",
                use=Use.SLOPE,
                needed_by=("input",),
                function=lambda args: name,
                jumps=lambda args: at_zero,
                lossy=not why_exact,
                why_exact=why_exact,
            ),
            Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
        )

        def run_saving(input: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return f(input), {SIDE: sides(input, elsewhere)}

        def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
            return vjp(grad, {"input": on_its_side(saved, elsewhere)}, call)

        rule = OpRule(
            name=name,
            targets=(op,),
            reads=(*reads, BESIDE_INPUT) if elsewhere else reads,
            run=run,
            run_saving=run_saving if elsewhere else None,
            backward=backward if elsewhere else None,
            # rounded, it might come to the other side of a step
            derive=None if len(_steps(f)) else run,
        )
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


def _jumps_elsewhere(f: Pointwise) -> tuple[tuple[Jump, ...], str]:
    """Where else the slope jumps; or none, and why the input is not to be rounded."""
    found = _steps(partial(slopes, f))
    # as they were written down: `x + 3` may reach 6 a little below 3
    places = [p for x in found[:, 0].tolist() if abs(p := float(f"{x:.12g}")) > _BESIDE]
    jumps = jumps_of(f, *places)
    gaps = [b - a for a, b in itertools.pairwise(places)]
    if len(jumps) > _FEW or min(gaps, default=_APART) < _APART:
        return (), f"its slope jumps at {len(jumps)} places, some close together: it stays exact"
    apart = [j for j in jumps if j.is_apart]
    if apart:
        return (), f"its slope at {apart[0].at:g} is that of neither side: it stays exact"
    return jumps, ""


_GRID = (torch.arange(-4096, 4096, dtype=torch.float64) + 0.5) / 256  # none of it a round number
_HALVINGS = 60
_HUNDREDTH = 0.01  # a smaller jump is none
_BESIDE = 1e-9
_FEW, _APART = 8, 1.0  # jumps; and what lies between two, for what is rounded


def _steps(g: Pointwise) -> Tensor:
    """The places where ``g`` jumps, each between two numbers that no other lies between: (n, 2)."""
    ends = torch.stack((_GRID[:-1], _GRID[1:]), 1)
    for _ in range(_HALVINGS):
        with torch.no_grad():
            middle = ends.mean(1, keepdim=True)
            values = g(torch.cat((ends[:, :1], middle, ends[:, 1:]), 1).flatten()).view(-1, 3)
            rise = values.diff(dim=1).abs()
            later = rise[:, :1] < rise[:, 1:]
            keep = rise.amax(1) > _HUNDREDTH
            ends = torch.where(
                later, torch.cat((middle, ends[:, 1:]), 1), torch.cat((ends[:, :1], middle), 1)
            )[keep]
    return ends


def _version(f: Any) -> str:
    """Changes with the function's code: compile caches do not look into it."""
    code = getattr(f, "__code__", None)
    text = repr(f) if code is None else repr((code.co_code, code.co_consts, code.co_names))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
