"""The op table: one row for each op that can be packed, from the files of the families.

What autograd saves for *every other* op is asked of autograd itself (``passes/find_saved.py``), so
an op without a row is counted exactly and kept whole. To add an op, add a row to the file of its
family: its spellings, what its backward reads, how to run it, and a formula (or none: the generic
``torch.func.vjp`` then serves).
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from dropit_fx.ops import (
    arithmetic,
    attention,
    convolution,
    element_losses,
    fourier,
    indexing,
    losses,
    masks,
    matmul,
    norms,
    piecewise,
    pooling,
    smooth,
)
from dropit_fx.ops.arithmetic import SAVES_NOTHING
from dropit_fx.ops.checkpoint import CHECKPOINT as CHECKPOINT
from dropit_fx.ops.rule import OpRule, Read
from dropit_fx.private import OpOverload, schema

FAMILIES = (
    *(matmul, convolution, piecewise, smooth, masks, arithmetic, norms, attention, losses),
    *(element_losses, indexing, pooling, fourier),
)
OP_RULES: tuple[OpRule, ...] = tuple(row for family in FAMILIES for row in family.ROWS)

RULES: dict[str, OpRule] = {}
DERIVABLE: dict[str, OpRule] = {}
_BY_TARGET: dict[Any, OpRule] = {}
_DERIVABLE_BY_TARGET: dict[Any, OpRule] = {}


def add_row(rule: OpRule) -> None:
    """Makes a row known, under its name and under its targets."""
    if rule.reads:
        RULES[rule.name] = rule
        _BY_TARGET.update(dict.fromkeys(rule.targets, rule))
    if rule.derive:
        DERIVABLE[rule.name] = rule
        _DERIVABLE_BY_TARGET.update(dict.fromkeys(rule.targets, rule))


for _rule in (*OP_RULES, *SAVES_NOTHING, CHECKPOINT):
    add_row(_rule)

# Some spellings call an argument otherwise.
_ALIASES = {"self": "input", "train": "training", "mat1": "input", "batch1": "input"}
_ALIASES |= {"mat_a": "input", "mat_b": "mat2"}  # of F.grouped_mm
_ALIASES |= {"x": "input", "p": "ord"}  # of norms of vectors
_ALIASES |= {"interpolation_mode": "mode"}  # of torch.grid_sampler


def rule_of(node: fx.Node) -> OpRule | None:
    """The row for a ``call_function`` or ``call_method`` node, or None."""
    return _row(_BY_TARGET, node)


def derivable_rule_of(node: fx.Node) -> OpRule | None:
    """The row by which the result of a node can be made again, or None."""
    return _row(_DERIVABLE_BY_TARGET, node)


def _row(rows: dict[Any, OpRule], node: fx.Node) -> OpRule | None:
    calls = node.op in ("call_function", "call_method")
    return rows.get(node.target) if calls and isinstance(node.target, Hashable) else None


def bind(
    rule: OpRule, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any = None
) -> dict[str, Any] | None:
    """Argument name -> value, defaults included, in the order of the row's signature.

    Arguments of a variadic ``*inputs`` are ``inputs.0``, ``inputs.1`` and so on.

    None where the call has arguments that the row does not know (``out=``), which keeps it dense.
    """
    if target is None and rule.defaults is not None:
        named = _bound_by_name(rule.inputs, rule.defaults, args, kwargs)
        if named is not None:
            return named
    signature = rule.signature
    known = {(k if k in signature.parameters else _ALIASES.get(k, k)): v for k, v in kwargs.items()}
    order = rule.orders.get(target) if isinstance(target, Hashable) else None
    if order is not None:
        known |= dict(zip(order, args, strict=False))
        known |= {name: None for name, none in rule.nones.items() if known.get(name) == none}
        args = ()
    for name in rule.ignored - set(signature.parameters):
        known.pop(name, None)
    try:
        bound = signature.bind(*args, **known)
    except TypeError:
        return None
    bound.apply_defaults()
    named = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}.{i}": v for i, v in enumerate(value)}
        else:
            named[name] = value
    if "inplace" in named and _writes(target):
        named["inplace"] = True
    return named


def _bound_by_name(
    inputs: tuple[str, ...],
    defaults: tuple[Any, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any] | None:
    """As :func:`bind`, where each argument has the name of ``inputs``; None where one has not.

    To bind by a signature takes longer than many an op.
    """
    required, unused = len(inputs) - len(defaults), len(kwargs)
    named = dict(zip(inputs, args, strict=False))
    for at in range(len(args), len(inputs)):
        name = inputs[at]
        if name in kwargs:
            named[name] = kwargs[name]
            unused -= 1
        elif at >= required:
            named[name] = defaults[at - required]
        else:
            return None
    return None if unused or len(args) > len(inputs) else named


def operands_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node's call by name; none where no row knows the call."""
    rule = rule_of(node)
    return (bind(rule, node.args, node.kwargs, node.target) if rule is not None else None) or {}


def reads_of(rule: OpRule, operands: Mapping[str, Any]) -> tuple[Read, ...]:
    """The reads of one call; a read of variadic arguments becomes one of each tensor."""
    found: list[Read] = []
    tensors = [n for n, value in operands.items() if isinstance(value, Tensor)]
    for read in (r for r in rule.reads if r.is_of(operands)):
        each = tuple(n for n in tensors if n.startswith(f"{read.operand}."))
        found += [replace(read, operand=n, needed_by=each) for n in each] or [read]
    return tuple(found)


def is_inplace(node: fx.Node, args: Mapping[str, Any]) -> bool:
    """Whether the call writes into its input."""
    return bool(args.get("inplace")) or _writes(node.target)


# Ops that draw a random number for each element of a tensor, in the order of memory, by name: of
# functions and methods, without the last underscore
DRAWING_EACH = frozenset(
    (
        *("dropout", "native_dropout", "alpha_dropout", "rrelu", "bernoulli", "poisson", "normal"),
        *("rand_like", "randn_like", "randint_like", "uniform", "exponential", "geometric"),
        *("cauchy", "log_normal", "random", "binomial"),
    )
)
# Or for each channel, or a few for each row: noise that is a small tensor of its own
DRAWING = DRAWING_EACH | {"feature_dropout", "feature_alpha_dropout", "multinomial"}
# `h *= 2` and its like: the function of the operator and the method behind it
AUGMENTED = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)


def _writes(target: Any) -> bool:
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if isinstance(target, OpOverload):
        name = schema(target).name
    if name.endswith("__") or getattr(target, "__module__", "") == "_operator":
        return name.strip("_") in AUGMENTED
    return name.endswith("_")
