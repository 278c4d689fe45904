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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from dropit_fx.private import STACKLEVEL

if TYPE_CHECKING:
    from dropit_fx.config import Config


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
        like: For what the op makes itself: the argument of its shape, or ``"result"``; ``""`` for
            statistics, which are kept as they are.
        bits: For reads stored as small integers (masks, indices): from the call's arguments to
            the fewest bits that lose nothing. ``run_saving`` returns the codes, where the operand
            is not itself what is kept.
        between: For a slope that is 1 where the operand lies strictly between two bounds and 0
            elsewhere: from the call's arguments to the bounds (None: no bound).
        function: For the input of a pointwise function f: from the call's arguments to the name of
            f in ``step_tables``, ``""`` where there is no table for these arguments.
        by_channel: The backward divides by the deviation of each channel (dimension 1): what rounds
            it must round each channel around its own mean and in units of that deviation.
        nbytes: For what the op makes itself in a size that fake tensors do not tell: from the
            call's arguments to its bytes.
    """

    operand: str
    use: Use
    needed_by: tuple[str, ...]
    lossy: bool | Callable[[Mapping[str, Any]], bool] = True
    like: str = "result"
    bits: Callable[[Mapping[str, Any]], int] | None = None
    between: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None
    function: Callable[[Mapping[str, Any]], str] | None = None
    by_channel: bool = False
    nbytes: Callable[[Mapping[str, Any]], int] | None = None


@dataclass(frozen=True, kw_only=True)
class OpRule:
    """One row of the op table: everything the passes know about an op.

    Attributes:
        name: The word in config files and reports.
        targets: All spellings of the op in fx graphs: functions, ``OpOverload`` s, and for methods
            their name.
        orders: The names of the positional arguments, for spellings that order them otherwise.
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
        obstacle: From the arguments of a call, and its ``result`` where the row reads nothing, to
            why the row does not cover it (dropout in eval mode), or ``""``.
    """

    name: str
    targets: tuple[Any, ...]
    reads: tuple[Read, ...]
    run: Callable[..., Any]
    run_saving: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None
    backward: Callable[..., dict[str, Tensor | None]] | None = None
    orders: Mapping[Any, tuple[str, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset({STACKLEVEL, "cudnn_enabled", "cudnn_enable"})
    autocast: str = ""
    derive: Callable[..., Tensor] | None = None
    obstacle: Callable[[Mapping[str, Any]], str] = lambda args: ""

    def read(self, operand: str) -> Read | None:
        """The row's read of ``operand`` (``inputs`` for ``inputs.0``), or None."""
        name = operand.partition(".")[0]
        return next((r for r in self.reads if r.operand == name), None)


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
        pack_channels: ``(flat, mean, inverse, inner, options) -> parts``: as ``pack`` of
            ``(flat - mean) * inverse``, where run r of ``inner`` elements is of channel r % C; None
            where that takes a pass of its own.
        unpack_channels: ``(parts, mean, deviation, inner, options, numel, dtype) -> flat``.
        buffers: How many tensors ``parts`` are.
        nbytes: ``(numel, dtype, options) -> int``: exactly the bytes of ``parts``.
        lossless: Whether these options give back every bit.
        faithful: Whether other values may be made from what these options give back.
        slope: ``unpack`` gives the derivative at the packed values, not the values.
    """

    name: str
    serves: frozenset[Use]
    options: tuple[Option, ...] = ()
    pack: Callable[[Tensor, Options], tuple[Tensor, ...]]
    unpack: Callable[[tuple[Tensor, ...], Options, Any, torch.dtype], Tensor]
    nbytes: Callable[[int, torch.dtype, Options], int]
    pack_channels: Callable[[Tensor, Tensor, Tensor, Any, Options], tuple[Tensor, ...]] | None = (
        None
    )
    unpack_channels: (
        Callable[[tuple[Tensor, ...], Tensor, Tensor, Any, Options, Any, torch.dtype], Tensor]
        | None
    ) = None
    buffers: int = 1
    lossless: Callable[[Options], bool] = lambda options: False
    faithful: Callable[[Options], bool] = lambda options: False
    slope: bool = False

    def defaults(self) -> Options:
        """Every option at its default."""
        return {o.name: o.default for o in self.options}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One node's call of a row: its arguments by name, nodes among them."""

    rule: OpRule
    operands: Mapping[str, Any]


class Elements(NamedTuple):
    """Elements in memory as they were at one time: what makes two values the same.

    Attributes:
        storage: Identifies the storage.
        offset: Of the first element.
        numel: How many elements there are.
        layout: None where they fill memory without gaps (then their order in memory is the same for
            every view of all of them), else shape and strides.
        dtype: What a view of other width would read otherwise.
        version: How often the storage had been written to.
    """

    storage: int
    offset: int
    numel: int
    layout: tuple[Any, ...] | None
    dtype: torch.dtype
    version: int


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
        identity: The operand's elements; operands with equal identity are the same values in memory
            order, whatever view each reader sees. None for tensors made inside the op.
        view: Shape of the operand as the node sees it.
        lossy: Whether it may be approximated.
        bits: The fewest bits, for reads stored as codes.
        between: The bounds between which the slope is 1.
        function: The pointwise function that it is the input of, as ``step_tables`` names it.
        obstacle: Why this very call cannot be packed, or ``""``.
        recast: Whether it is autocast's copy of a parameter, which a packed call makes again.
        wanted: Whether a gradient that reads it is asked for. A convolution keeps its input for a
            frozen weight too; its packed call does not.
        dense: Whether autograd keeps it. False where only the node's packed call would, which runs
            the op again in its backward.
        written: Whether it is written to later in the graph. What autograd lets go must then not be
            kept whole.
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
    identity: Elements | None = None
    view: tuple[int, ...] = ()
    lossy: bool = True
    bits: int | None = None
    between: tuple[Any, Any] | None = None
    function: str = ""
    obstacle: str = ""
    recast: bool = False
    wanted: bool = True
    dense: bool = True
    written: bool = False

    @property
    def label(self) -> str:
        """``relu_1.result``: how reasons and errors name a read."""
        return f"{self.node}.{self.operand}"


@dataclass(frozen=True, kw_only=True)
class Values:
    """What ``find_saved`` knows of the values in a graph, by the names of their nodes.

    Attributes:
        alive: Values that stay whatever is packed, each with the reason; numbers among them.
        shapes: The shape of each.
        seen: ``(reader, value)`` -> the value's elements as they were when the reader ran.
        makers: Elements -> the node that made them: not a view of them, and the writer where they
            were written in place.
        versions: Storage -> its version when the graph has run: what was read at another one has
            been written to since.
        lost: Values that the row of their op does not make again.
        differentiable: Values that require a gradient.
    """

    alive: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seen: Mapping[tuple[str, str], Elements] = field(default_factory=dict)
    makers: Mapping[Elements, str] = field(default_factory=dict)
    versions: Mapping[int, int] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    differentiable: frozenset[str] = frozenset()

    def stays(self, elements: Elements) -> bool:
        """Whether nothing writes to them before the backward."""
        return self.versions.get(elements.storage) == elements.version


@dataclass(frozen=True, kw_only=True)
class Site:
    """One storage that autograd keeps from forward to backward.

    Attributes:
        name: The node that made it (``node.operand`` for tensors made inside an op).
        nbytes: Bytes of the whole storage.
        reads: Every read of it, in graph order.
        alive: Why it stays in memory whatever is packed (``"a model input"``), or ``""``.
        dense: False where autograd would not keep it: a packed call does, that makes more again in
            its backward (the mask of attention).
    """

    name: str
    nbytes: int
    reads: tuple[SavedRead, ...]
    alive: str = ""
    dense: bool = True


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of one read: a codec with its options, or ``keep`` with the reason."""

    read: SavedRead
    codec: str
    options: Options = field(default_factory=dict)
    nbytes: int = 0  # of the packed parts; readers that share one copy count it once
    reason: str = ""  # why it is kept
    pack: str | None = None  # the key of the packed copy that it shares with others
    own: bool = False  # chosen by a rule of the user's own, not by a preset's
    derived: str = ""  # the node whose result is made again from what is packed of its operands
    note: str = ""  # in what it differs from what was asked for, and why

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
        values: From ``find_saved``.
        calls: From ``find_saved``: the calls of rows, by the name of their node. Nodes among the
            arguments are those of the graph that ``find_saved`` saw.
        decisions: From ``choose_codecs``: one for each read of each site, in the same order.
        bodies: Plans of nested graphs (checkpointed regions) by attribute name.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    config: Config
    sites: tuple[Site, ...] = ()
    values: Values = Values()
    calls: Mapping[str, Call] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    bodies: dict[str, Plan] = field(default_factory=dict)

    def everything(self) -> tuple[Plan, ...]:
        """This plan and those of all nested graphs."""
        return (self, *(p for body in self.bodies.values() for p in body.everything()))
