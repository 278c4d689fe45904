"""The data that flows through the passes.

A :class:`Site` is one storage that autograd would keep from forward to backward, with every
:class:`SavedRead` of it; a :class:`Decision` says what becomes of one read; the :class:`Plan`
carries them from pass to pass.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from dropit_fx.codecs.codec import Options
from dropit_fx.ops.rule import Call, OpRule, Read
from dropit_fx.runtime.copies import spelled

if TYPE_CHECKING:
    from dropit_fx.config import Config


class Keeper(enum.StrEnum):
    """What keeps a value in memory, whatever is packed: as reports print it."""

    PARAMETER = "a parameter"
    BUFFER = "a buffer"
    INPUT = "a model input"
    CONSTANT = "a constant of the graph"
    OUTPUT = "a model output"
    NUMBER = "a number"


class Copy(NamedTuple):
    """A packed form that readers share: of a node's result, or of what its call made inside.

    Attributes:
        node: The node.
        number: Of the copy among those that pack nodes make; None where nothing is packed for it.
        operand: What the call made inside and hands out (a norm's mean), or ``""``: the result,
            which is then made again where there is no number.
    """

    node: str
    number: int | None = None
    operand: str = ""

    def __str__(self) -> str:
        """As plans print it: ``x#3``, ``ln.mean``, ``derived ln``."""
        if self.operand:
            return f"{self.node}.{self.operand}"
        return f"derived {self.node}" if self.number is None else f"{self.node}#{self.number}"


class Elements(NamedTuple):
    """Elements in memory as they were at one time: what makes two values the same.

    Attributes:
        storage: Identifies the storage.
        offset: Of the first element; the symbol of one that depends on values.
        numel: How many elements there are.
        strided: None where they fill memory without gaps (then their order in memory is the same
            for every view of all of them), else strides and sizes, sorted.
        dtype: What a view of other width would read otherwise.
        version: How often the storage had been written to.
    """

    storage: int
    offset: int | str
    numel: int
    strided: tuple[Any, ...] | None
    dtype: torch.dtype
    version: int


@dataclass(frozen=True, kw_only=True)
class SavedRead:
    """One node's read of a saved tensor.

    Attributes:
        node: Name of the fx node that saves it.
        op: The row's name, or the target as printed where no row knows it.
        operand: As in :class:`Read`; ``"?"`` for a tensor inside an op without a row.
        row: The row, or None.
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
        jumps: Whether the slope jumps where it is 0.
        beside: As in :class:`Read`.
        width: Elements of a row, where its gradient sums over its rows and they lie one behind the
            other in memory; 0 where not.
        obstacle: Why this very call cannot be packed, or ``""``.
        recast: Whether it is autocast's copy of a parameter, which a packed call makes again.
        wanted: Whether a gradient that reads it is asked for. A convolution keeps its input for a
            frozen weight too; its packed call does not.
        dense: Whether autograd keeps it. False where only the node's packed call would, which runs
            the op again in its backward.
        itself: Whether that is the operand, and no tensor that the op made from it: a copy without
            gaps, a reciprocal. Only then is the operand there for what is derived from it.
        fixed: Whether it depends on no input of the graph and on no chance, as it is read: a weight
            or a table, or what is made of these alone.
        written: Whether it is written to later in the graph. What autograd lets go must then not be
            kept whole.
        number: Whether it is a number, which autograd keeps where no hook sees it.
        stranded: Whether nothing but a checkpointed region holds it: it is behind an input from
            which no gradient comes back. Regions of a rewritten graph let it go.
    """

    node: str
    op: str
    operand: str
    row: OpRule | None
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
    jumps: bool = False
    beside: str = ""
    width: Any = 0
    obstacle: str = ""
    recast: bool = False
    wanted: bool = True
    dense: bool = True
    itself: bool = True
    fixed: bool = False
    written: bool = False
    number: bool = False
    stranded: bool = False

    @property
    def label(self) -> str:
        """``relu_1.result``: how reasons and errors name a read."""
        return f"{self.node}.{self.operand}"


@dataclass(frozen=True, kw_only=True)
class Values:
    """What ``find_saved`` knows of the values in a graph, by the names of their nodes.

    Attributes:
        alive: Values that stay whatever is packed, and what keeps them; numbers among them.
        shapes: The shape of each.
        seen: ``(reader, value)`` -> the value's elements as they were when the reader ran.
        makers: Elements -> the node that made them: not a view of them, and the writer where they
            were written in place.
        versions: Storage -> its version when the graph has run: what was read at another one has
            been written to since.
        lost: Values that the row of their op does not make again.
        differentiable: ``(reader, value)`` where the value required a gradient when the reader ran:
            ``detach_()`` and writes change that.
    """

    alive: Mapping[str, Keeper] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seen: Mapping[tuple[str, str], Elements] = field(default_factory=dict)
    makers: Mapping[Elements, str] = field(default_factory=dict)
    versions: Mapping[int, int] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    differentiable: frozenset[tuple[str, str]] = frozenset()

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
        kept_by: What keeps it whatever is packed, or None.
        dense: False where autograd would not keep it: a packed call does, that makes more again in
            its backward (the mask of attention).
    """

    name: str
    nbytes: int
    reads: tuple[SavedRead, ...]
    kept_by: Keeper | None = None
    dense: bool = True


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of one read: a codec with its options, or ``keep`` with the reason."""

    read: SavedRead
    codec: str
    options: Options = field(default_factory=dict)
    nbytes: int = 0  # of the packed parts; readers that share one copy count it once
    reason: str = ""  # why it is kept
    copy: Copy | None = None  # which it may share with others
    own: bool = False  # chosen by a rule of the user's own, not by a preset's
    derived: str = ""  # the node whose result is made again from what is packed of its operands
    note: str = ""  # in what it differs from what was asked for, and why

    @property
    def packed(self) -> bool:
        """Whether the dense tensor is let go for this read."""
        return self.codec != "keep"

    @property
    def spelled(self) -> str:
        """The codec as people read it: ``mink(gamma=0.5, bits=4)``."""
        return spelled(self.codec, self.options)


@dataclass(frozen=True, kw_only=True)
class ParameterRead:
    """One node's read of a parameter, in a plan whose config says what is trained.

    Attributes:
        parameter: Qualified name of the parameter.
        node: Name of the node.
        module: Qualified name of the module that the node belongs to.
        op: The row's name, or the target as printed where no row knows it.
        rules: Numbers of the config's rules that speak of it; the first decides.
        trained: Whether it gets a gradient from there.
    """

    parameter: str
    node: str
    module: str
    op: str
    rules: tuple[int, ...] = ()
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the passes know so far. Each pass returns a new one.

    Attributes:
        module: The graph under work; ``insert_packing`` returns a rewritten one.
        inputs: Fake tensors (or plain values) for its placeholders, in order.
        given: Where the module has hooks of its own around its forward: the arguments of a call, of
            which they make these inputs.
        config: The rules.
        sites: From ``find_saved``.
        values: From ``find_saved``.
        calls: From ``find_saved``: the calls of rows, by the name of their node. Nodes among the
            arguments are those of the graph that ``find_saved`` saw.
        held: From ``find_saved``: the nodes for which autograd keeps a parameter or an input of the
            graph, which are no sites, and whether a packed call of the node keeps one as well.
        decisions: From ``choose_codecs``: one for each read of each site, in the same order.
        bodies: Plans of nested graphs (checkpointed regions) by attribute name.
        parameters: From ``detach_parameters``, where a rule says what is trained: who reads them.
        untrained: From ``detach_parameters``: the names of sites that nothing keeps since.
        sampled: From ``sample_blocks``: the names of sites of which some rows alone are kept since.
        blocks: From ``sample_blocks``: the numbers of the rules that named a block.
        repeated: From ``repeat_recurrent`` and ``repeat_weights``: the names of sites that nothing
            keeps since.
        unrepeated: From ``repeat_recurrent``: the modules of layers that stay as they are.
        unfused: From the first of these that changed the graph: the sites of the graph as it was.
        notes: From ``fuse_losses``: what is to be said of a node, by its name.
        compiled: Whether a compiler gets the backward too, and makes equal calls once there.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    config: Config
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    sites: tuple[Site, ...] = ()
    values: Values = Values()
    calls: Mapping[str, Call] = field(default_factory=dict)
    held: Mapping[str, bool] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    bodies: dict[str, Plan] = field(default_factory=dict)
    parameters: tuple[ParameterRead, ...] = ()
    untrained: frozenset[str] = frozenset()
    sampled: frozenset[str] = frozenset()
    blocks: frozenset[int] = frozenset()
    repeated: frozenset[str] = frozenset()
    unrepeated: tuple[str, ...] = ()
    unfused: tuple[Site, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    compiled: bool = False

    @property
    def device(self) -> str:
        """The type of device that it runs on: of its first input, or of its first parameter."""
        tensors = [*self.inputs, *self.module.parameters(), *self.module.buffers()]
        return next((t.device.type for t in tensors if isinstance(t, torch.Tensor)), "cpu")

    def with_bodies(self) -> tuple[Plan, ...]:
        """This plan and those of all nested graphs."""
        return (self, *(p for body in self.bodies.values() for p in body.with_bodies()))

    def __str__(self) -> str:
        """A line for each read: who reads it, how, its codec, its bytes, and why it is kept."""
        decisions = iter(self.decisions)
        lines = [line for site in self.sites for line in _lines(site, decisions)]
        lines = [HEAD, *lines] if lines else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        none = "nothing is saved" if self.values.shapes else "no reads yet: find_saved finds them"
        parts = ["\n".join(padded) or none]
        parts += [f"in {name}:\n{body}" for name, body in self.bodies.items()]
        return "\n\n".join(parts)


HEAD = ("value", "read by", "use", "dense", "kept by", "bytes", "")


def _lines(site: Site, decisions: Iterator[Decision]) -> Iterator[tuple[str, ...]]:
    """The reads of one storage, each with the next decision; its bytes beside the first of them."""
    for number, read in enumerate(site.reads):
        decision = next(decisions, None)
        dense = f"{site.nbytes:,} B" if number == 0 else ""
        if decision is None:
            codec, size, why = "", "", site.kept_by or read.obstacle
        else:
            copy = f"copy {decision.copy}" if decision.copy else ""
            derived = f"from {decision.derived}" if decision.derived else ""
            codec = decision.spelled
            size = f"{decision.nbytes:,} B" if decision.packed else ""
            why = decision.reason or derived or copy
        use = read.read.use if read.read else ""
        yield (site.name if number == 0 else "", read.label, use, dense, codec, size, why)
