"""What each tensor that autograd keeps for a node is to it: which operand of its row, and how read.

What no row knows is a read too, of an unknown operand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from dropit_fx.capture.fake import sized_by_values
from dropit_fx.capture.provenance import node_module, node_where
from dropit_fx.ops.autocasting import autocast_on
from dropit_fx.ops.rule import INSIDE, Call, OpRule, Read, Use
from dropit_fx.ops.table import CHECKPOINT, bind, derivable_rule_of, is_inplace, reads_of, rule_of
from dropit_fx.passes.ask_autograd import Autograd, Saved
from dropit_fx.passes.match_saved import is_copy_of, match_saved
from dropit_fx.passes.plan import Elements, Keeper, SavedRead
from dropit_fx.passes.storages import FREE, Storages
from dropit_fx.private import storage_id
from dropit_fx.runtime.copies import width_of
from dropit_fx.runtime.decisions import REASON
from dropit_fx.runtime.overrides import is_complex
from dropit_fx.runtime.regions import COMPUTED, DECIDES, EACH_TIME, WRITTEN, name_of
from dropit_fx.runtime.tensor_spec import ascends, memory_order

NUMBER = "a Python number, which autograd keeps as a tensor"
UNKNOWN = "?"  # the operand of a read that no row knows
_CUTS = ("detach", "detach_")


def differentiated(graph: fx.Graph) -> dict[fx.Node, str]:
    """What ``torch.autograd.grad`` inside the graph goes back through, and where that stands.

    Its gradients are values of the forward, which stay exact, and may be differentiated again.
    """
    found: dict[fx.Node, str] = {}
    for grad in graph.nodes:
        if grad.target is not torch.autograd.grad:
            continue
        given = dict(zip(("outputs", "inputs"), grad.args, strict=False)) | grad.kwargs
        ends: list[fx.Node] = []
        map_arg(given["inputs"], ends.append)
        todo: list[fx.Node] = []
        map_arg(given["outputs"], todo.append)
        while todo:
            n = todo.pop()
            if n not in ends and n not in found and name_of(n) not in _CUTS:
                found[n] = node_where(grad)
                todo += n.all_input_nodes
    return found


@dataclass(frozen=True)
class Ran:
    """A node that has run, and what is known of its call."""

    node: fx.Node
    rule: OpRule | None = None
    values: Mapping[fx.Node, Any] = field(default_factory=dict)  # of the nodes that it reads
    needing: Collection[int] = ()  # the operands that needed a gradient before it ran, by id
    fixed: Collection[fx.Node] = ()  # of what it reads and makes: what depends on no input
    # by name, and the result; none where no row knows the call
    operands: Mapping[str, Any] = field(default_factory=dict)
    nodes: Mapping[str, Any] = field(default_factory=dict)  # the same as they stand in the graph


class Explainer:
    """Collects what autograd keeps of one graph, read by read.

    Args:
        module: The graph.
        storages: What is known of its values.
        autograd: What keeps them.
        compiled: As in a plan.

    Attributes:
        kept: All that is kept.
        calls: Of rows, by the names of their nodes.
        lost: Values that the row of their op does not make again, by name.
        whole: The caller's own tensors that only a packed call would hold, and whose that is.
    """

    def __init__(
        self, module: fx.GraphModule, storages: Storages, autograd: Autograd, compiled: bool
    ) -> None:
        self.module, self.storages, self.autograd = module, storages, autograd
        self.compiled = compiled
        self.kept: list[Saved] = []
        self.calls: dict[str, Call] = {}
        self.lost: set[str] = set()
        self.whole: list[tuple[str, Elements]] = []
        self._order = {n: i for i, n in enumerate(module.graph.nodes)}
        self._differentiated = differentiated(module.graph)

    def bound(self, ran: Ran, result: Any) -> Ran:
        """With the row of a node's call and its arguments, bound once for all passes."""
        n = ran.node
        rule = rule_of(n) or derivable_rule_of(n)
        bound = bind(rule, n.args, n.kwargs, n.target) if rule is not None else None
        if rule is None or bound is None:
            return replace(ran, rule=rule)
        self.calls[n.name] = Call(rule=rule, operands=bound)
        values = {name: map_arg(value, ran.values.__getitem__) for name, value in bound.items()}
        values["result"] = result
        # what `derive` makes may differ in its last bits, or cost too much
        free = rule.made_again is None or (self.compiled and rule.made_again(values))
        if rule.obstacle(values) or not free:
            self.lost.add(n.name)
        return replace(ran, rule=rule, operands=values, nodes=bound | {"result": n})

    def holds_packed(self, ran: Ran) -> bool:
        """Whether a packed call of the node keeps one of the graph's own inputs or parameters."""
        return ran.rule is not None and any(
            isinstance(x := ran.operands.get(read.operand), Tensor)
            and read.use is not Use.SHAPE
            and self.storages.is_free(x)
            and _is_wanted(read, ran)
            for read in reads_of(ran.rule, ran.operands)
        )

    def explain(self, ran: Ran, saved: list[Saved]) -> None:
        """Turns what a node keeps into reads: which operand is each tensor?"""
        own = [kept for kept in saved if not self.storages.is_free(kept.tensor)]
        if ran.rule is COMPUTED:
            self._explain_computed(ran, own)
        elif ran.rule is None or not ran.rule.reads:
            for kept in own:
                self.add(Ran(ran.node), kept)
        elif own:
            self._explain(ran, ran.rule, saved, own)

    def _explain_computed(self, ran: Ran, own: list[Saved]) -> None:
        """What a computed weight is made again from, of its layer too."""
        tensors = {n: x for n, x in ran.operands.items() if isinstance(x, Tensor)}
        for kept in own:
            same = (n for n, x in tensors.items() if storage_id(x) == storage_id(kept.tensor))
            name = next(same)
            read = Read(operand=name, use=Use.REDUCE, needed_by=tuple(tensors), lossy=False)
            self.add(ran, kept, read, "a weight is made again of it: it stays exact")

    def _explain(self, ran: Ran, rule: OpRule, saved: list[Saved], own: list[Saved]) -> None:
        n, operands = ran.node, ran.operands
        obstacle = self._obstacle(ran, rule)
        reads = reads_of(rule, operands)
        unwanted = {read.operand for read in reads if not _is_wanted(read, ran)}
        lowered = _lowered_to(rule, own[0].tensor.device.type)
        known = tuple(r for r in reads if not r.beside)
        matched = match_saved([k.tensor for k in own], known, operands, unwanted, lowered)
        taken: set[str] = set()
        for kept, read in zip(own, matched, strict=True):
            copied = read is not None and not obstacle and not is_inplace(n, operands)
            if copied and rule is not CHECKPOINT and is_copy_of(kept.tensor, read, operands):
                # the packed call reads the operand, and makes no such copy
                assert read is not None
                read = replace(read, operand=INSIDE, use=Use.SHAPE, bits=None)
            taken |= {read.operand} - {INSIDE} if read is not None else set()
            why = obstacle or (self._why_exact(ran, kept.tensor) if rule is CHECKPOINT else "")
            self.add(ran, kept, read, why)
        if rule is CHECKPOINT:
            return
        for read in (r for r in reads if (r.instead or r.beside) and not obstacle):
            if _is_wanted(read, ran):
                self.add(ran, Saved(_made(read, operands), self.autograd.mark), read, dense=False)
        for read in reads:
            x = operands.get(read.operand)
            if not isinstance(x, Tensor) or read.operand in taken:
                continue
            also = Saved(x.detach(), self.autograd.mark)
            # autograd may keep one tensor for two reads, or where only the shape is read
            if taken and storage_id(x) in {storage_id(k.tensor) for k in own}:
                self.add(ran, also, read, obstacle)
            elif read.use is Use.SHAPE or obstacle or not _is_wanted(read, ran):
                continue
            elif not self.storages.is_free(x):  # autograd lets it go, and the packed call reads it
                self.add(ran, also, read, dense=False)
            elif (cast := self._cast_of(x, rule)) is not None:
                self.add(ran, Saved(cast, self.autograd.mark), read, dense=False)
            elif storage_id(x) not in {storage_id(k.tensor) for k in saved}:
                self.whole.append((n.name, self.storages.before(x)))

    def _obstacle(self, ran: Ran, rule: OpRule) -> str:
        """Why this very call cannot be packed, or ``""``."""
        if not ran.operands:
            return f"called with arguments that the row of {rule.name} does not know"
        if ran.node in self._differentiated:
            where = self._differentiated[ran.node]
            return f"the forward differentiates it (torch.autograd.grad), in {where}"
        obstacle = rule.obstacle(ran.operands)
        reads_values = any(read.use is not Use.SHAPE for read in rule.reads)
        if not obstacle and reads_values and is_complex(tuple(ran.operands.values())):
            obstacle = f"the row of {rule.name} is for real numbers"
        if not obstacle and is_inplace(ran.node, ran.operands):
            obstacle = self._seen_by_others(ran)
        return obstacle

    def _why_exact(self, ran: Ran, tensor: Tensor) -> str:
        """Why an input of a checkpointed region is not to be packed, or ``""``."""
        n, name = ran.node, region_of(ran.node)
        if [region_of(m) for m in self.module.graph.nodes if is_checkpoint(m)].count(name) > 1:
            return "its region is called more than once"
        body: Any = self.module.get_submodule(name)
        if EACH_TIME in body.meta and body.meta[WRITTEN]:
            return "its region writes into a buffer again when it is made again"
        if any(map(sized_by_values, body.graph.nodes)):  # of rounded inputs they might be others
            return "sizes in its region depend on values"
        if body.meta[DECIDES]:  # others would be another model: the experts of a token
            return REASON
        goes = any(
            storage_id(t) == storage_id(tensor) and t.requires_grad
            for t in (ran.values[m] for m in n.all_input_nodes)
            if isinstance(t, Tensor)
        )
        return "" if goes else "no gradient goes there: it may be a mask or a table"

    def _is_recast(self, tensor: Tensor, rule: OpRule | None, operand: Any) -> bool:
        """Whether autocast made ``tensor`` from a parameter."""
        if rule is None or rule.autocast != "lower" or not isinstance(operand, Tensor):
            return False
        is_parameter = self.storages.keeper(operand) is Keeper.PARAMETER
        return is_parameter and tensor.dtype != operand.dtype

    def _cast_of(self, x: Tensor, rule: OpRule) -> Tensor | None:
        """Autocast's copy of an input of the graph, which a packed call keeps beside it."""
        dtype = _lowered_to(rule, x.device.type)
        if dtype in (None, x.dtype) or not x.is_floating_point():
            return None
        return None if self.storages.keeper(x) is Keeper.PARAMETER else x.detach().to(dtype)

    def _seen_by_others(self, ran: Ran) -> str:
        """Who else sees the tensor that an in-place call writes, so that it cannot be packed."""
        written, value = (next(iter(named.values())) for named in (ran.nodes, ran.operands))
        if not isinstance(value, Tensor):
            return ""
        storage, at = self.storages.of(value), self._order[ran.node]
        if storage.kept_by in FREE or storage.nodes[0].op == "placeholder":
            return f"it writes into {storage.kept_by or 'an input of the graph'}"
        if value.untyped_storage().nbytes() != value.numel() * value.element_size():
            return "it writes into a part of a larger tensor, and a packed call makes its own"
        for other in storage.nodes:
            if other is ran.node or other is written:
                continue
            late = next((u for u in other.users if self._order[u] > at), None)
            if late is not None:
                return f"it writes into a tensor that '{late.name}' sees through '{other.name}'"
        return ""

    def add(
        self,
        ran: Ran,
        kept: Saved,
        read: Read | None = None,
        obstacle: str = "",
        dense: bool = True,
    ) -> None:
        """Notes one read of a node, and of its row where there is one."""
        n, rule, operands = ran.node, ran.rule, ran.operands
        operand, tensor = read.operand if read else UNKNOWN, kept.tensor
        source = ran.nodes.get(operand) if read else None
        x = operands[operand] if isinstance(source, fx.Node) else None
        identity = None
        if isinstance(x, Tensor):
            identity = self.storages.now(x) if source is n else self.storages.before(x)
        kept.owner = self.storages.of(tensor, f"{n.name}.{operand}").owner
        kept.nbytes = read.nbytes(operands) if read and read.nbytes else 0
        kept.read = SavedRead(
            node=n.name,
            op=rule.name if rule and rule.reads else _op_name(self.module, n),
            operand=operand,
            row=rule if rule and rule.reads else None,
            read=read,
            module=node_module(n),
            where=node_where(n),
            numel=tensor.numel(),
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            source=source.name if isinstance(source, fx.Node) else None,
            identity=identity,
            view=() if x is None else tuple(x.shape),
            lossy=read is None
            or (read.lossy if isinstance(read.lossy, bool) else read.lossy(operands)),
            bits=read.bits(operands) if read and read.bits else None,
            between=read.between(operands) if read and read.between else None,
            function=read.function(operands) if read and read.function else "",
            jumps=bool(read and read.jumps and operands and read.jumps(operands)),
            beside=read.beside if read else "",
            width=_width(read, operands),
            obstacle=obstacle,
            recast=self._is_recast(tensor, rule, operands.get(operand)),
            wanted=read is None or not operands or _is_wanted(read, ran),
            dense=dense,
            itself=not isinstance(x, Tensor) or storage_id(x) == storage_id(tensor),
            fixed=source in ran.fixed,
            number=obstacle == NUMBER,
        )
        self.kept.append(kept)


def _is_wanted(read: Read, ran: Ran) -> bool:
    """Whether a gradient needs what is read: what is written in place may need one only now."""
    needed = (ran.operands.get(a) for a in read.needed_by)
    return any(isinstance(v, Tensor) and id(v) in ran.needing for v in needed)


def _width(read: Read | None, operands: Mapping[str, Any]) -> Any:
    """``SavedRead.width``."""
    x = operands.get(read.operand) if read is not None else None
    if x is None or read is None or x.dim() < 2:
        return 0
    order = memory_order(x)
    if read.by_sample is not None and read.by_sample(operands):
        return width_of(x.shape, order) if order[0] == 0 else 0
    if read.by_row is not None and read.by_row(operands):
        return x.shape[-1] if ascends(order) else 0
    return 0


def _made(read: Read, operands: Mapping[str, Any]) -> Tensor:
    """What a packed call makes in the place of operands, on fake tensors."""
    x = operands[read.like]
    return torch.empty_like(x, dtype=operands["result"].dtype, requires_grad=False)


def _lowered_to(rule: OpRule, device: str) -> torch.dtype | None:
    """The dtype in which autocast hands its operands to an op, where it is on."""
    is_lowered = rule.autocast == "lower" and autocast_on(device)
    return torch.get_autocast_dtype(device) if is_lowered else None


def is_checkpoint(n: fx.Node) -> bool:
    """Whether a node calls a checkpointed region."""
    return rule_of(n) is CHECKPOINT


def region_of(n: fx.Node) -> str:
    """The name of the region that it calls."""
    return str(n.args[0].target)  # type: ignore[union-attr]


def _op_name(module: fx.GraphModule, n: fx.Node) -> str:
    if n.op == "call_module":
        return type(module.get_submodule(str(n.target))).__name__
    return name_of(n)
