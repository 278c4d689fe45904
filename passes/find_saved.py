"""Pass 1: which tensors will autograd keep, for whom, and how large are they?

Autograd itself is asked: the graph runs once on fake tensors, with gradients on, and
``saved_tensors_hooks`` notes what each node keeps. That is exact for every op of every dialect,
with a row or without: the bytes found here equal what the same hooks count in a real step. The op
table then says what each kept tensor is to the node that keeps it (its input, its result, a mask
inside it). Counted is what still lives when the graph has run: a branch that ends without a
gradient takes what it has saved with it, as it does in a real step, but for what a checkpointed
region holds behind an input that gets no gradient.

An input that is a leaf stays with the caller; one that another op has made is an activation like
those inside (a block that is compiled by itself), kept for the backward alone.

Requires: a graph and fake inputs. Ensures: ``plan.sites`` covers every saved storage that is not a
parameter, a buffer or an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dropit_fx.capture.fake import RealStorages, fake_mode_of, fake_state
from dropit_fx.capture.provenance import node_module, node_where
from dropit_fx.ops.autocasting import autocast_on
from dropit_fx.ops.rule import INSIDE, Call, OpRule, Read, Use
from dropit_fx.ops.table import CHECKPOINT, bind, derivable_rule_of, is_inplace, reads_of, rule_of
from dropit_fx.passes.ask_autograd import Autograd, Behind, Saved
from dropit_fx.passes.match_saved import is_copy_of, match_saved
from dropit_fx.passes.plan import Elements, Keeper, Plan, SavedRead, Site
from dropit_fx.passes.storages import FREE, Chance, Storages, elements, is_state
from dropit_fx.private import EXAMPLE_VALUE, pytree, storage_id, version
from dropit_fx.runtime.overrides import is_complex
from dropit_fx.runtime.regions import WRITTEN, name_of, written_unseen
from dropit_fx.runtime.tensor_spec import ascends, memory_order

NUMBER = "a Python number, which autograd keeps as a tensor"
UNKNOWN = "?"  # the operand of a read that no row knows


class FakeRunError(RuntimeError):
    """The graph does not run on fake tensors; the message names the node and the user's line."""

    node: fx.Node | None = None


def find_saved(plan: Plan) -> Plan:
    """Fills ``plan.sites``, ``plan.values``, ``plan.calls`` and, for regions, ``plan.bodies``.

    Raises:
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    mode = fake_mode_of(plan.inputs)
    with mode, RealStorages(), torch.enable_grad(), fake_state(plan.module, mode) as state:
        probe = _Probe(plan, state)
        return probe.result(probe.run(*plan.inputs))


class _Ran(NamedTuple):
    """A node that has run, and what is known of its call."""

    node: fx.Node
    rule: OpRule | None = None
    operands: Mapping[str, Any] = {}  # by name, and the result; none where no row knows the call
    nodes: Mapping[str, Any] = {}  # the same as they stand in the graph


class _Probe(fx.Interpreter):
    """Runs the graph on fake tensors and notes what autograd keeps at each node."""

    def __init__(
        self, plan: Plan, state: Mapping[int, str], fixed: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(plan.module, garbage_collect_values=False)
        self.plan = plan
        self.extra_traceback = False
        self.autograd = Autograd()
        self.storages = Storages(state)
        self.kept: list[Saved] = []
        self.bodies: dict[str, Plan] = {}
        self.calls: dict[str, Call] = {}
        self._needing: set[int] = set()  # operands of the node that needed a gradient before it ran
        self._lost: set[str] = set()
        self._whole: list[tuple[str, Elements]] = []  # free ones that a packed call would hold
        self._order = {n: i for i, n in enumerate(plan.module.graph.nodes)}
        self.written: set[int] = set()  # storages, where no version tells of it
        self._held: list[tuple[str, bool, Saved]] = []  # free ones: by whom, and packed as well
        self._regions: dict[str, list[Callable[[], object]]] = {}  # their results' marks
        self._behind: list[tuple[Callable[[], object], Tensor | None]] = []  # regions hold
        inputs = [n for n in plan.module.graph.nodes if n.op == "placeholder"]
        self._fixed = {n for at, n in enumerate(inputs) if at in fixed or is_state(n)}
        self._fixed_before: set[fx.Node] = set()  # of the inputs of the node, when it ran

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._needing = {id(t) for t in operands if t.requires_grad}
        self.storages.enter(n, self.env, operands)
        life: Callable[[], object] | None = None  # of a region
        self._fixed_before = self._fixed.intersection(n.all_input_nodes)
        made_of_fixed = len(self._fixed_before) == len(n.all_input_nodes)
        is_fixed = n in self._fixed or (n.op != "placeholder" and made_of_fixed)
        chance = Chance() if is_fixed else nullcontext()
        try:
            with self.autograd.noting() as saved, chance:
                if _is_checkpoint(n):
                    result, life = self._run_body(n, args)
                elif _is_number(n):
                    result = n.meta[EXAMPLE_VALUE]
                else:
                    result = super().run_node(n)
        except Exception as error:
            failed = FakeRunError(
                f"node '{n.name}' ({n.target}) of module '{node_module(n)}' does not run on fake"
                f" tensors of the example's shapes ({node_where(n) or 'no source line'}):"
                f" {type(error).__name__}: {error}"
            )
            failed.node = n
            raise failed from error
        if not _has_tensor(result) or (is_fixed and not getattr(chance, "seen", False)):
            self._fixed.add(n)
        self.storages.leave(n, operands, result)
        unseen = pytree.tree_leaves(map_arg(written_unseen(n), self.env.__getitem__))
        written = {storage_id(t) for t in unseen if isinstance(t, Tensor)}
        self.written |= written
        if n not in self._fixed:
            written |= self.storages.written(operands)
            self._fixed -= {m for m in self._fixed if written & self._storages_of(m)}
        self.autograd.mark_result(n, result)
        if life is not None:
            # recomputed: between forward and backward only the inputs stay
            saved = [Saved(t.detach(), life) for t in args[1:] if isinstance(t, Tensor)]
            self.autograd.lives += [kept.life for kept in saved]
            self._regions.setdefault(str(n.args[0].target), []).append(self.autograd.mark)  # type: ignore[union-attr]
        ran = self._bind(n, result)
        if free := [kept for kept in saved if self.storages.is_free(kept.tensor)]:
            packed = self._holds_packed(ran)
            self._held += [(n.name, packed, kept) for kept in free]
        if ran.rule is not None and ran.rule.reads:
            self._explain(ran, ran.rule, saved)
        else:
            for kept in self._not_free(saved):
                self._add(_Ran(n), kept)
        return result

    def _storages_of(self, n: fx.Node) -> set[int]:
        leaves = pytree.tree_leaves(self.env.get(n))
        return {storage_id(t) for t in leaves if isinstance(t, Tensor)}

    def _not_free(self, saved: list[Saved]) -> list[Saved]:
        return [kept for kept in saved if not self.storages.is_free(kept.tensor)]

    def _holds_packed(self, ran: _Ran) -> bool:
        """Whether a packed call of the node keeps one of the graph's own inputs or parameters."""
        return ran.rule is not None and any(
            isinstance(x := ran.operands.get(read.operand), Tensor)
            and read.use is not Use.SHAPE
            and self.storages.is_free(x)
            and self._is_wanted(read, ran.operands)
            for read in reads_of(ran.rule, ran.operands)
        )

    def _bind(self, n: fx.Node, result: Any) -> _Ran:
        """The row of a node's call and its arguments, bound once for all passes."""
        rule = rule_of(n) or derivable_rule_of(n)
        bound = bind(rule, n.args, n.kwargs, n.target) if rule is not None else None
        if rule is None or bound is None:
            return _Ran(n, rule)
        self.calls[n.name] = Call(rule=rule, operands=bound)
        values = {name: map_arg(value, self.env.__getitem__) for name, value in bound.items()}
        values["result"] = result
        if rule.obstacle(values):  # what `derive` makes may differ in its last bits
            self._lost.add(n.name)
        return _Ran(n, rule, values, bound | {"result": n})

    def result(self, out: Any) -> Plan:
        """The plan with all that was found; ``out`` is what the graph returned."""
        self.env.clear()  # from here on, only what a real step holds is alive
        self._let_go()
        for n, tensor, is_number in self.autograd.unseen(out):
            kept = Saved(tensor, lambda: True)
            if is_number and not _is_checkpoint(n):  # those of a region are in its own plan
                self._add(_Ran(n, rule_of(n) if n.name in self.calls else None), kept, None, NUMBER)
            elif not is_number and not self.storages.is_free(tensor):
                self._add(_Ran(n), kept)
        values = self.storages.values(self._lost)
        late = {node for node, whole in self._whole if not values.stays(whole)}
        for kept in self.kept:
            assert kept.read is not None
            read = kept.read
            if read.node in late and not read.obstacle:
                why = f"{read.op} would keep an input whole that is written to later"
                kept.read = replace(read, obstacle=why)
            elif read.identity is not None and not values.stays(read.identity):
                kept.read = replace(read, written=True)
            where = self.storages.unseen.get(storage_id(kept.tensor))
            if where is not None and not read.obstacle:
                why = f"it is written to where autograd does not see it (.data), in {where}"
                kept.read = replace(kept.read, obstacle=why)
        held = {name: packed for name, packed, kept in self._held if kept.life() is not None}
        for name, marks in self._regions.items():
            if not any(mark() for mark in marks):  # no backward makes it again
                self.bodies[name] = replace(self.bodies[name], sites=())
        return replace(
            self.plan,
            sites=tuple(self.sites()),
            values=values,
            calls=self.calls,
            held=held,
            bodies=self.bodies,
        )

    def _let_go(self) -> None:
        """Forgets what is kept no more, and tells what stays for checkpointed regions alone.

        A region of PyTorch holds the graphs behind all its inputs as long as it is to be made
        again; one of a rewritten graph lets go of those that no gradient comes back to.
        """
        for at in reversed(range(len(self._behind))):  # what is held was there before its region
            if self._behind[at][0]() is None:
                del self._behind[at]
        dense = [k for k in self.kept if k.life() is not None]
        self._behind.clear()
        there = {k.read.node for k in dense if k.read is not None and k.life() is not None}
        self.kept = []
        for kept in dense:
            assert kept.read is not None
            if kept.life() is None and kept.read.node not in there:
                kept.read = replace(kept.read, stranded=True)
            if kept.read.dense or not kept.read.stranded:
                self.kept.append(kept)

    def _run_body(self, n: fx.Node, args: tuple[Any, ...]) -> tuple[Any, Callable[[], object]]:
        """A region's result, and what tells whether it is to be recomputed.

        PyTorch lets its inputs go with the last tensor that it would have saved: at once where its
        backward reads nothing.
        """
        body, given = args[0], args[1:]
        tensors = {at: t for at, t in enumerate(given) if isinstance(t, Tensor)}
        before = {at: version(t) for at, t in tensors.items()}
        behind = Behind.apply(*tensors.values()) if tensors else None
        # without its inputs: they hold the graph behind them, which may go before the region does
        plan = Plan(module=body, inputs=(), config=self.plan.config)
        with fake_state(body, fake_mode_of(args)) as state:
            fixed = {at for at, arg in enumerate(n.args[1:]) if arg in self._fixed}
            probe = _Probe(plan, state, frozenset(fixed))
            result = probe.run(*given)
            self.bodies[str(n.args[0].target)] = probe.result(result)  # type: ignore[union-attr]
        self.written |= probe.written
        written = {
            at
            for at, t in tensors.items()
            if version(t) != before[at] or storage_id(t) in probe.written
        }
        body.meta[WRITTEN] = tuple(sorted(written.union(body.meta.get(WRITTEN, ()))))
        lives = probe.autograd.lives

        def life() -> object:
            return next((one for one in lives if one()), None)

        self._behind.append((life, behind))
        return result, life

    def _explain(self, ran: _Ran, rule: OpRule, saved: list[Saved]) -> None:
        """Turns what a node keeps into reads: which operand is each tensor?"""
        n, _, operands, _ = ran
        own = self._not_free(saved)
        if not own:
            return
        obstacle = self._obstacle(ran, rule)
        reads = reads_of(rule, operands)
        unwanted = {read.operand for read in reads if not self._is_wanted(read, operands)}
        lowered = _lowered_to(rule, own[0].tensor.device.type)
        matched = match_saved([k.tensor for k in own], reads, operands, unwanted, lowered)
        taken: set[str] = set()
        for kept, read in zip(own, matched, strict=True):
            copied = read is not None and not obstacle and not is_inplace(n, operands)
            if copied and rule is not CHECKPOINT and is_copy_of(kept.tensor, read, operands):
                # the packed call reads the operand, and makes no such copy
                assert read is not None
                read = replace(read, operand=INSIDE, use=Use.SHAPE, bits=None)
            taken |= {read.operand} - {INSIDE} if read is not None else set()
            why = obstacle or (self._why_exact(n, kept.tensor) if rule is CHECKPOINT else "")
            self._add(ran, kept, read, why)
        if rule is CHECKPOINT:
            return
        for read in (r for r in reads if r.instead and not obstacle):
            if self._is_wanted(read, operands):
                self._add(ran, Saved(_made(read, operands), self.autograd.mark), read, dense=False)
        for read in reads:
            x = operands.get(read.operand)
            if not isinstance(x, Tensor) or read.operand in taken:
                continue
            also = Saved(x.detach(), self.autograd.mark)
            # autograd may keep one tensor for two reads, or where only the shape is read
            if taken and storage_id(x) in {storage_id(k.tensor) for k in own}:
                self._add(ran, also, read, obstacle)
            elif read.use is Use.SHAPE or obstacle or not self._is_wanted(read, operands):
                continue
            elif not self.storages.is_free(x):  # autograd lets it go, and the packed call reads it
                self._add(ran, also, read, dense=False)
            elif (cast := self._cast_of(x, rule)) is not None:
                self._add(ran, Saved(cast, self.autograd.mark), read, dense=False)
            elif storage_id(x) not in {storage_id(k.tensor) for k in saved}:
                self._whole.append((n.name, self.storages.before(x)))

    def _obstacle(self, ran: _Ran, rule: OpRule) -> str:
        """Why this very call cannot be packed, or ``""``."""
        if not ran.operands:
            return f"called with arguments that the row of {rule.name} does not know"
        obstacle = rule.obstacle(ran.operands)
        if not obstacle and is_complex(tuple(ran.operands.values())):
            obstacle = f"the row of {rule.name} is for real numbers"
        if not obstacle and is_inplace(ran.node, ran.operands):
            obstacle = self._seen_by_others(ran)
        return obstacle

    def _is_wanted(self, read: Read, operands: Mapping[str, Any]) -> bool:
        """Whether a gradient needs what is read: what is written in place may need one only now."""
        needed = (operands.get(a) for a in read.needed_by)
        return any(isinstance(v, Tensor) and id(v) in self._needing for v in needed)

    def _why_exact(self, n: fx.Node, tensor: Tensor) -> str:
        """Why an input of a checkpointed region is not to be packed, or ``""``."""
        regions = [m.args[0] for m in self.module.graph.nodes if _is_checkpoint(m)]  # type: ignore[union-attr]
        if [r.target for r in regions].count(n.args[0].target) > 1:  # type: ignore[union-attr]
            return "its region is called more than once"
        body: Any = self.module.get_submodule(str(n.args[0].target))  # type: ignore[union-attr]
        if not n.kwargs.get("once", True) and body.meta[WRITTEN]:
            return "its region writes into a buffer again when it is made again"
        goes = any(
            storage_id(t) == storage_id(tensor) and t.requires_grad
            for t in (self.env[m] for m in n.all_input_nodes)
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

    def _seen_by_others(self, ran: _Ran) -> str:
        """Who else sees the tensor that an in-place call writes, so that it cannot be packed."""
        written, value = (next(iter(named.values())) for named in (ran.nodes, ran.operands))
        if not isinstance(value, Tensor):
            return ""
        storage, at = self.storages.of(value), self._order[ran.node]
        if storage.kept_by in FREE or storage.nodes[0].op == "placeholder":
            return f"it writes into {storage.kept_by or 'an input of the graph'}"
        for other in storage.nodes:
            if other is ran.node or other is written:
                continue
            late = next((u for u in other.users if self._order[u] > at), None)
            if late is not None:
                return f"it writes into a tensor that '{late.name}' sees through '{other.name}'"
        return ""

    def _add(
        self,
        ran: _Ran,
        kept: Saved,
        read: Read | None = None,
        obstacle: str = "",
        dense: bool = True,
    ) -> None:
        n, rule, operands, nodes = ran
        operand, tensor = read.operand if read else UNKNOWN, kept.tensor
        source = nodes.get(operand) if read else None
        x = operands[operand] if isinstance(source, fx.Node) else None
        identity = None
        if isinstance(x, Tensor):
            identity = elements(x, version(x)) if source is n else self.storages.before(x)
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
            width=_width(read, operands),
            obstacle=obstacle,
            recast=self._is_recast(tensor, rule, operands.get(operand)),
            wanted=read is None or not operands or self._is_wanted(read, operands),
            dense=dense,
            itself=not isinstance(x, Tensor) or storage_id(x) == storage_id(tensor),
            fixed=source in (self._fixed if source is n else self._fixed_before),
            number=obstacle == NUMBER,
        )
        self.kept.append(kept)

    def sites(self) -> Iterator[Site]:
        """Every storage that stays, in the order in which it was first kept."""
        found: dict[int, list[Saved]] = {}
        for kept in self.kept:
            found.setdefault(storage_id(kept.tensor), []).append(kept)
        for all_kept in found.values():
            reads: dict[tuple[str, str], SavedRead] = {}
            for kept in all_kept:
                assert kept.read is not None
                reads.setdefault((kept.read.node, kept.read.operand), kept.read)
            yield Site(
                name=all_kept[0].owner,
                nbytes=max(
                    all_kept[0].tensor.untyped_storage().nbytes(), *(k.nbytes for k in all_kept)
                ),
                reads=tuple(reads.values()),
                kept_by=self.storages.keeper(all_kept[0].tensor),
                dense=any(r.dense for r in reads.values()),
            )


def _width(read: Read | None, operands: Mapping[str, Any]) -> Any:
    """``SavedRead.width``."""
    x = operands.get(read.operand) if read is not None else None
    if x is None or read is None or read.by_row is None or not read.by_row(operands):
        return 0
    return x.shape[-1] if x.dim() > 1 and ascends(memory_order(x)) else 0


def _made(read: Read, operands: Mapping[str, Any]) -> Tensor:
    """What a packed call makes in the place of operands, on fake tensors."""
    x = operands[read.like]
    return torch.empty_like(x, dtype=operands["result"].dtype, requires_grad=False)


def _lowered_to(rule: OpRule, device: str) -> torch.dtype | None:
    """The dtype in which autocast hands its operands to an op, where it is on."""
    is_lowered = rule.autocast == "lower" and autocast_on(device)
    return torch.get_autocast_dtype(device) if is_lowered else None


def _has_tensor(result: Any) -> bool:
    return pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), result)


def _is_number(n: fx.Node) -> bool:
    """A float of the model that Dynamo made an input of its graph: fake tensors hold no values."""
    return n.target == "item" and isinstance(n.meta.get(EXAMPLE_VALUE), float | torch.SymFloat)


def _is_checkpoint(n: fx.Node) -> bool:
    return rule_of(n) is CHECKPOINT


def _op_name(module: fx.GraphModule | nn.Module, n: fx.Node) -> str:
    if n.op == "call_module":
        return type(module.get_submodule(str(n.target))).__name__
    return name_of(n)
