"""What a row of the op table says: an op's spellings, and what its backward reads and how.

An :class:`OpRule` is one row, a :class:`Read` one tensor that its backward reads. :class:`Use` says
how, and is what joins the table of ops and the list of codecs. A :class:`Call` is one node's call.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx.operator_schemas import get_signature_for_torch_op

from dropit_fx.private import STACKLEVEL, OpOverload


class Use(enum.StrEnum):
    """How the backward of an op uses a tensor that it reads."""

    CONTRACT = "contract"  # the gradient is linear in it: an operand of a GEMM or a convolution
    SLOPE = "slope"  # the gradient is multiplied element by element by a function of it
    REDUCE = "reduce"  # it enters sums over a dimension, or anything else
    SHAPE = "shape"  # only its sizes are read: it need not be kept at all


INSIDE = "inside"


@dataclass(frozen=True, kw_only=True)
class Read:
    """One tensor that the backward of an op reads.

    Attributes:
        operand: An argument of the row's ``run``, ``"result"``, a name that ``run_saving``
            returns, or ``INSIDE``: whatever else autograd keeps inside the op, which the row's
            backward makes again.
        use: How it is read.
        needed_by: The arguments whose gradients need it; nothing is saved where none requires grad.
        lossy: False where an approximation would reach a gradient that the house keeps exact, or a
            function of the call's arguments that says so.
        like: For what the op makes itself: the argument of its shape, or ``"result"``.
        exact: For statistics, which the op makes itself: they are kept as they are.
        bits: For reads stored as small integers (masks, indices): from the call's arguments to
            the fewest bits that lose nothing. ``run_saving`` returns the codes, where the operand
            is not itself what is kept.
        between: For a slope that is 1 where the operand lies strictly between two bounds and 0
            elsewhere: from the call's arguments to the bounds (None: no bound).
        function: For the input of a pointwise function f: from the call's arguments to the name of
            f in ``step_tables``, ``""`` where there is no table for these arguments.
        jumps: For a slope that jumps where the operand is 0, as selu's does: from the call's
            arguments to whether it does. A 0 must then be read as 0, not as a number beside it.
        by_row: For an operand of which the gradient is one product that sums over its rows (all
            its dimensions but the last): from the call's arguments to whether this call is such.
        by_sample: The same where the sum is over the first dimension alone, as of convolutions: a
            row is a sample with all that it has. Of ``by_row`` and this, a read says one.
        by_channel: The backward divides by the deviation of each channel (dimension 1): what rounds
            it must round each channel around its own mean and in units of that deviation.
        nbytes: For what the op makes itself in a size that fake tensors do not tell: from the
            call's arguments to its bytes.
        shape: For what the op makes itself, contiguous and in the shape of no argument: from the
            call's arguments to its shape.
        when: For what some calls alone read: from the call's arguments to whether this one does. An
            argument that is not known yet may be anything.
        instead: The op makes it in the place of operands that autograd keeps, and that are then
            read for their shape alone: a difference in the place of two tensors. It is laid out as
            ``like``, in the dtype of the result.
        beside: For what the op makes itself: the operand beside which it is kept where that is read
            back rounded, whatever rule there is; else nothing is kept of it (``sides.py``).
        why_exact: Where it is not ``lossy``: the reason, as reports say it.
    """

    operand: str
    use: Use
    needed_by: tuple[str, ...]
    lossy: bool | Callable[[Mapping[str, Any]], bool] = True
    like: str = "result"
    exact: bool = False
    bits: Callable[[Mapping[str, Any]], int] | None = None
    between: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None
    function: Callable[[Mapping[str, Any]], str] | None = None
    jumps: Callable[[Mapping[str, Any]], bool] | None = None
    by_row: Callable[[Mapping[str, Any]], bool] | None = None
    by_sample: Callable[[Mapping[str, Any]], bool] | None = None
    by_channel: bool = False
    nbytes: Callable[[Mapping[str, Any]], int] | None = None
    shape: Callable[[Mapping[str, Any]], tuple[Any, ...]] | None = None
    when: Callable[[Mapping[str, Any]], bool] | None = None
    instead: bool = False
    beside: str = ""
    why_exact: str = ""

    def is_of(self, args: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments reads it."""
        return self.when is None or self.when(args)


def one_bit(args: Mapping[str, Any]) -> int:
    """The ``bits`` of a mask."""
    return 1


def called_as(function: Callable[..., Any], run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run``, with the signature of another function, which names the operands of a row."""
    run.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return run


def out_of_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of the values, whose last argument is ``inplace``.

    Whether a call writes in place is read for every row.
    """
    count = len(inspect.signature(function).parameters) - 1

    def run(*args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        return function(*args[:count], **kwargs)

    return called_as(function, run)


@dataclass(frozen=True, kw_only=True)
class OpRule:
    """One row of the op table: everything the passes know about an op.

    Attributes:
        name: The word in config files and reports.
        targets: All spellings of the op in fx graphs: functions, ``OpOverload`` s, and for methods
            their name.
        orders: The names of the positional arguments, for spellings that order them otherwise.
        nones: Argument -> what these spellings say for None.
        ignored: Keyword arguments of some spellings that change nothing.
        reads: What its backward reads.
        run: The op itself, as a function of plain arguments; its signature names the operands.
        run_saving: For ops with reads that are no argument or result as it stands:
            ``(*args) -> (result, {operand: codes})``, equal to ``run`` bit for bit.
        backward: ``(grad, saved, call) -> {argument: gradient}``; None means the generic one,
            ``torch.func.vjp`` of ``run`` over the saved operands.
        autocast: ``"lower"`` where autocast hands it the lower precision, so that is what is
            packed. (In which dtypes it runs is asked of PyTorch: ``autocasting.py``.)
        derive: Makes the result again, from the arguments of ``run`` and without side effects, at
            the cost of a pass over memory. A reader of the result may then live on what is packed
            of the operands. None where that costs more.
        made_again: For ops whose ``derive`` costs more: from the arguments of a call to whether its
            backward makes the result again anyway. A compiler then makes it once for all readers.
        derive_from: What the op makes itself without which ``derive`` cannot do (a mask). Its other
            parameters beside those of ``run`` are given where the call packs anything.
        repeats: Whether ``derive`` gives the very bits of the result, on CPUs.
        obstacle: From the arguments of a call, and its ``result`` where the row reads nothing, to
            why the row does not cover it (dropout in eval mode), or ``""``.
        schema: The ATen op that takes what ``run`` takes, where that is a builtin, which does not
            tell (``self`` of the schema is ``input``).
        signature: Of ``run``.
        inputs: Names of the arguments of ``run``, in order.
        defaults: Of the last of them; None where not all may be given by position.
    """

    name: str
    targets: tuple[Any, ...]
    reads: tuple[Read, ...]
    run: Callable[..., Any]
    run_saving: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None
    backward: Callable[..., dict[str, Tensor | None]] | None = None
    orders: Mapping[Any, tuple[str, ...]] = field(default_factory=dict)
    nones: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset({STACKLEVEL, "cudnn_enabled", "cudnn_enable"})
    autocast: str = ""
    derive: Callable[..., Tensor] | None = None
    made_again: Callable[[Mapping[str, Any]], bool] | None = None
    derive_from: tuple[str, ...] = ()
    repeats: bool = False
    obstacle: Callable[[Mapping[str, Any]], str] = lambda args: ""
    schema: OpOverload | None = None
    signature: inspect.Signature = field(init=False, repr=False)
    inputs: tuple[str, ...] = field(init=False, repr=False)
    defaults: tuple[Any, ...] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        told: Any = get_signature_for_torch_op(self.schema) if self.schema else None
        object.__setattr__(self, "signature", told[0] if told else inspect.signature(self.run))
        object.__setattr__(self, "inputs", tuple(self.signature.parameters))
        found = self.signature.parameters.values()
        if all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found):
            defaults = tuple(p.default for p in found if p.default is not p.empty)
            object.__setattr__(self, "defaults", defaults)

    def names(self, count: int) -> tuple[str, ...]:
        """The names of ``count`` arguments; of a variadic ``*inputs``, ``inputs.0`` and so on."""
        *fixed, last = self.inputs
        if self.signature.parameters[last].kind is not inspect.Parameter.VAR_POSITIONAL:
            return self.inputs
        return (*fixed, *(f"{last}.{i}" for i in range(count - len(fixed))))

    def read(self, operand: str) -> Read | None:
        """The row's read of ``operand`` (``inputs`` for ``inputs.0``), or None."""
        name = operand.partition(".")[0]
        return next((r for r in self.reads if r.operand == name), None)


def shape_only(name: str, run: Callable[..., Any], *targets: Any, **row: Any) -> OpRule:
    """A row of an op whose backward reads nothing but the shape of its input."""
    read = Read(operand="input", use=Use.SHAPE, needed_by=("input",))
    return OpRule(name=name, targets=targets, reads=(read,), run=run, **row)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One node's call of a row: its arguments by name, nodes among them."""

    rule: OpRule
    operands: Mapping[str, Any]
