"""The data that flows through the passes: what a row says, what a pass knows. No behaviour.

An :class:`OpRule` is one row of the op table, a :class:`Codec` one way of keeping a tensor. What
joins them is :class:`Use`: how a backward formula reads the tensor. A :class:`Site` is one storage
that autograd would keep from forward to backward, with every :class:`SavedRead` of it; a
:class:`Decision` says what becomes of one read; the :class:`Plan` carries them from pass to pass.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from dropit_fx.config import Config


class Use(enum.StrEnum):
    """How the backward of an op uses a tensor that it reads."""

    CONTRACT = "contract"  # the gradient is linear in it: an operand of a GEMM or a convolution
    SLOPE = "slope"  # the gradient is multiplied element by element by a function of it
    REDUCE = "reduce"  # it enters sums over a dimension, or anything else
    SHAPE = "shape"  # only its sizes are read: it need not be kept at all


@dataclass(frozen=True, kw_only=True)
class Read:
    """One tensor that the backward of an op reads.

    Attributes:
        operand: An argument of the row's ``run``, ``"result"``, or a name that ``run_saving``
            returns.
        use: How it is read.
        needed_by: The arguments whose gradients need it; nothing is saved where none requires grad.
        lossy: False where an approximation would reach a gradient that the house keeps exact.
        bits: For reads stored as small integers (masks, indices): from the call's arguments to
            the fewest bits that lose nothing. ``run_saving`` returns these codes.
    """

    operand: str
    use: Use
    needed_by: tuple[str, ...]
    lossy: bool = True
    bits: Callable[[Mapping[str, Any]], int] | None = None


@dataclass(frozen=True, kw_only=True)
class OpRule:
    """One row of the op table: everything the passes know about an op.

    Attributes:
        name: The word in config files and reports.
        targets: All spellings of the op in fx graphs: functions, ``OpOverload`` s, and for methods
            their name.
        reads: What its backward reads.
        run: The op itself, as a function of plain arguments; its signature names the operands.
        run_saving: For ops with reads that are neither argument nor result:
            ``(*args) -> (result, {operand: codes})``, equal to ``run`` bit for bit.
        backward: ``(grad, saved, call) -> {argument: gradient}``; None means the generic one,
            ``torch.func.vjp`` of ``run`` over the saved operands.
        autocast: Autocast runs it in the lower precision, so that is what is packed.
        applies: False for calls that save nothing whatever requires grad (dropout in eval).
    """

    name: str
    targets: tuple[Any, ...]
    reads: tuple[Read, ...]
    run: Callable[..., Any]
    run_saving: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None
    backward: Callable[..., dict[str, Tensor | None]] | None = None
    autocast: bool = False
    applies: Callable[[Mapping[str, Any]], bool] = lambda args: True

    def read(self, operand: str) -> Read | None:
        """The row's read of ``operand``, or None."""
        return next((r for r in self.reads if r.operand == operand), None)


Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a codec: its default, and the check that a config value must pass."""

    name: str
    default: Any
    legal: Callable[[Any], bool]
    meaning: str  # unit and range, as config errors print them


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way of keeping a saved tensor.

    Attributes:
        name: The word in config files, graphs and reports.
        serves: The uses whose backward may read what ``unpack`` returns.
        options: What a config rule may set.
        pack: ``(flat, options) -> parts``: a 1-D contiguous tensor to the tensors that are kept.
        unpack: ``(parts, options, numel, dtype) -> flat``.
        nbytes: ``(numel, dtype, options) -> int``: exactly the bytes of ``parts``.
        lossless: Whether these options give back every bit.
    """

    name: str
    serves: frozenset[Use]
    options: tuple[Option, ...] = ()
    pack: Callable[[Tensor, Options], tuple[Tensor, ...]]
    unpack: Callable[[tuple[Tensor, ...], Options, Any, torch.dtype], Tensor]
    nbytes: Callable[[int, torch.dtype, Options], int]
    lossless: Callable[[Options], bool] = lambda options: False

    def defaults(self) -> Options:
        """Every option at its default."""
        return {o.name: o.default for o in self.options}


@dataclass(frozen=True, kw_only=True)
class SavedRead:
    """One node's read of a saved tensor.

    Attributes:
        node: Name of the fx node that saves it.
        op: The row's name, or the target as printed where no row knows it.
        operand: As in :class:`Read`; ``"?"`` for a tensor inside an op without a row.
        rule: The row, or None.
        read: The row's read, or None.
        module: Qualified name of the module that the node belongs to (``""``: the root).
        where: The user's ``file:line``, or ``""``.
        numel: Elements of the tensor as read (a view may be smaller than its storage).
        dtype: Its dtype as saved (autocast saves the lower precision).
        shape: Its shape as saved.
        source: Name of the node whose output would be packed, None for tensors made inside the op.
        identity: ``(storage, offset, numel, layout, version)`` of the operand; operands with equal
            identity are the same values in memory order, whatever view each reader sees.
        bits: The fewest bits, for reads stored as codes.
        obstacle: Why this very call cannot be packed, or ``""``.
        wanted: Whether a gradient that reads it is asked for. A convolution keeps its input for a
            frozen weight too; its packed call does not.
    """

    node: str
    op: str
    operand: str
    rule: OpRule | None
    read: Read | None
    module: str
    where: str
    numel: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str | None
    identity: tuple[Any, ...] = ()
    bits: int | None = None
    obstacle: str = ""
    wanted: bool = True

    @property
    def label(self) -> str:
        """``relu_1.result``: how reasons and errors name a read."""
        return f"{self.node}.{self.operand}"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One storage that autograd keeps from forward to backward.

    Attributes:
        name: The node that made it (``node.operand`` for tensors made inside an op).
        nbytes: Bytes of the whole storage.
        reads: Every read of it, in graph order.
        alive: Why it stays in memory whatever is packed (``"a model input"``), or ``""``.
    """

    name: str
    nbytes: int
    reads: tuple[SavedRead, ...]
    alive: str = ""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of one read: a codec with its options, or ``keep`` with the reason."""

    read: SavedRead
    codec: str
    options: Options = field(default_factory=dict)
    nbytes: int = 0  # of the packed parts; readers that share one copy count it once
    reason: str = ""  # why it is kept
    pack: str | None = None  # the key of the packed copy that it shares with others

    @property
    def packed(self) -> bool:
        """Whether the dense tensor is let go for this read."""
        return self.codec != "keep"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the passes know so far. Each pass returns a new one.

    Attributes:
        module: The graph under work; ``insert_packing`` returns a rewritten one.
        inputs: Fake tensors (or plain values) for its placeholders, in order.
        config: The rules.
        sites: From ``find_saved``.
        decisions: From ``choose_codecs``: one for each read of each site, in the same order.
        bodies: Plans of nested graphs (checkpointed regions) by attribute name.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    config: Config
    sites: tuple[Site, ...] = ()
    decisions: tuple[Decision, ...] = ()
    bodies: dict[str, Plan] = field(default_factory=dict)

    def everything(self) -> tuple[Plan, ...]:
        """This plan and those of all nested graphs."""
        return (self, *(p for body in self.bodies.values() for p in body.everything()))
