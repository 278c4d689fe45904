"""Pass 1: which tensors will autograd keep, for whom, and how large are they?

Autograd itself is asked: the graph runs once on fake tensors, with gradients on, and
``saved_tensors_hooks`` notes what each node keeps. That is exact for every op of every dialect,
with a row or without: the bytes found here equal what the same hooks count in a real step. The op
table then says what each kept tensor is to the node that keeps it (its input, its result, a mask
inside it). Counted is what still lives when the graph has run: a branch that ends without a
gradient takes what it has saved with it, as it does in a real step.

An input that is a leaf stays with the caller; one that another op has made is an activation like
those inside (a block that is compiled by itself), kept for the backward alone.

Requires: a graph and fake inputs. Ensures: ``plan.sites`` covers every saved storage that is not a
parameter, a buffer or an input.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node
from torch.fx.node import map_arg

from dropit_fx.capture.fake import RealStorages, fake_mode_of, fake_state
from dropit_fx.capture.provenance import node_module, node_where
from dropit_fx.ops.rule import INSIDE, Call, OpRule, Read, Use
from dropit_fx.ops.table import CHECKPOINT, bind, derivable_rule_of, is_inplace, reads_of, rule_of
from dropit_fx.passes.plan import Elements, Plan, SavedRead, Site, Values
from dropit_fx.private import (
    EXAMPLE_VALUE,
    closed_over,
    pytree,
    raw_saved,
    sequence_number,
    set_hooks_tracing,
    shows_saved,
    storage_id,
    version,
)
from dropit_fx.runtime.overrides import is_complex
from dropit_fx.runtime.regions import written_inputs
from dropit_fx.runtime.tensor_spec import memory_order

_FREE = ("a parameter", "a buffer", "a model input")
_ALIVE = (*_FREE, "a constant of the graph")
_MARK = "dropit_fx"  # in the metadata of the autograd nodes of each result
NUMBER = "a Python number, which autograd keeps as a tensor"


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


class _Box:
    """What autograd holds in a tensor's place; lives as long as the graph that saved the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself would keep its own graph alive


class _Mark:
    """Tied to the autograd nodes of a result, it lives as long as one of them."""


@dataclass
class _Kept:
    """One tensor as the hook saw it. Holding it keeps its storage's id from being used again."""

    tensor: Tensor
    life: Callable[[], object]  # None when the graph that kept it is gone
    read: SavedRead | None = None
    owner: str = ""  # of its storage
    nbytes: int = 0  # at least, where the fake tensor is too small


@dataclass
class _Story:
    """All that is known of one storage while the graph runs."""

    owner: str
    nodes: list[fx.Node] = field(default_factory=list)  # whose outputs live in it
    alive: str = ""


@contextmanager
def _hooks(note: Callable[[Tensor], _Box]) -> Iterator[None]:
    """Hands over what autograd keeps, also where the caller traces with hooks switched off.

    ``torch.compile`` does so while it splits a DistributedDataParallel model by its buckets.
    """
    tracing = set_hooks_tracing(False)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda box: box.tensor):
            yield
    finally:
        set_hooks_tracing(tracing)


class _Probe(fx.Interpreter):
    """Runs the graph on fake tensors and notes what autograd keeps at each node."""

    def __init__(self, plan: Plan, state: dict[int, str]) -> None:
        super().__init__(plan.module, garbage_collect_values=False)
        self.plan = plan
        self.extra_traceback = False
        self.kept: list[_Kept] = []
        self.lives: list[Callable[[], object]] = []  # of all that autograd has kept, inputs too
        self.stories: dict[int, _Story] = {
            storage: _Story(owner=kind, alive=kind) for storage, kind in state.items()
        }
        self.bodies: dict[str, Plan] = {}
        self.calls: dict[str, Call] = {}
        self._mark: Callable[[], object] = lambda: None  # of the node that runs
        self._upto: list[tuple[int, fx.Node]] = []  # the last autograd node that each has made
        self._before: dict[int, int] = {}  # versions of a node's operands, before it runs
        self._needing: set[int] = set()  # those that needed a gradient by then
        self._alive: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._seen: dict[tuple[str, str], Elements] = {}
        self._makers: dict[Elements, str] = {}
        self._versions: dict[int, Tensor] = {}
        self._first: dict[int, tuple[Tensor, list[str]]] = {}  # of each storage, and all its nodes
        self._unseen: dict[int, str] = {}  # storages that are written to unseen, where
        self._lost: set[str] = set()
        self._differentiable: set[str] = set()
        self._whole: list[tuple[str, Elements]] = []  # free ones that a packed call would hold
        self._order = {n: i for i, n in enumerate(plan.module.graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        mine: list[_Kept] = []

        def note(tensor: Tensor) -> _Box:
            box = _Box(tensor)
            mine.append(_Kept(box.tensor, weakref.ref(box)))
            self.lives.append(mine[-1].life)
            return box

        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._before = {id(t): version(t) for t in operands}
        self._needing = {id(t) for t in operands if t.requires_grad}
        for operand in n.all_input_nodes:
            value = self.env[operand]
            if isinstance(value, Tensor):
                self._seen[n.name, operand.name] = _elements(value, version(value))
        seen = self._versions_of(operands)
        life: Callable[[], object] | None = None  # of a region
        try:
            with _hooks(note):
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
        results = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self._look_for_unseen_writes(n, operands, seen)
        self._mark_result(n, results)
        if life is not None:
            # recomputed: between forward and backward only the inputs stay
            mine[:] = [_Kept(t.detach(), life) for t in args[1:] if isinstance(t, Tensor)]
            self.lives += [kept.life for kept in mine]
        for tensor in results:
            story = self.stories.setdefault(storage_id(tensor), _Story(owner=n.name))
            story.nodes.append(n)
            if n.op == "placeholder" and not story.alive and tensor.is_leaf:
                story.alive = "a parameter" if _is_parameter(n, tensor) else "a model input"
            if n.op == "get_attr" and not story.alive:
                story.alive = "a constant of the graph"
            if n.op == "output" and not story.alive:
                story.alive = "a model output"
        self._describe(n, result)
        call = self._bind(n, result)
        if call is not None and call[0].reads:
            self._explain(n, *call, result, mine)
        else:
            for kept in mine:
                if not self._is_free(kept.tensor):
                    self._add(n, kept, None, None, {}, {}, "")
        return result

    def _versions_of(self, tensors: list[Tensor]) -> dict[int, int]:
        """Of the storages of some tensors, as whoever holds what was first seen of them knows."""
        known = {storage_id(t) for t in tensors} & self._first.keys()
        return {storage: version(self._first[storage][0]) for storage in known}

    def _look_for_unseen_writes(
        self, n: fx.Node, operands: list[Tensor], seen: dict[int, int]
    ) -> None:
        """A write through ``.data`` is not counted: autograd reads what it finds."""
        now = self._versions_of(operands)
        for t in operands:
            storage = storage_id(t)
            if version(t) > self._before[id(t)] and now.get(storage) == seen.get(storage, -1):
                self._unseen.setdefault(storage, node_where(n) or n.name)

    def _mark_result(self, n: fx.Node, results: list[Tensor]) -> None:
        """Ties a mark to the autograd nodes of a result: it goes when they go."""
        mark = _Mark()
        self._mark = weakref.ref(mark)
        highest = -1
        for tensor in results:
            if tensor.grad_fn is not None:
                # a node that made nothing here is older: an op that hands on its input
                marks: Any = tensor.grad_fn.metadata
                marks.setdefault(_MARK, []).append(mark)
                highest = max(highest, sequence_number(tensor.grad_fn))
        self._upto.append((max(highest, self._upto[-1][0] if self._upto else -1), n))

    def _describe(self, n: fx.Node, result: Any) -> None:
        """What later passes ask of a value: does it stay, what made it, is it the same value?"""
        if not isinstance(result, Tensor):
            if not pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), result):
                self._alive[n.name] = "a number"
            return
        self._shapes[n.name] = tuple(result.shape)
        self._versions[storage_id(result)] = result.detach()  # counts on with the tensor
        self._first.setdefault(storage_id(result), (result.detach(), []))[1].append(n.name)
        if result.requires_grad:
            self._differentiable.add(n.name)
        story = self.stories[storage_id(result)]
        if story.alive in _ALIVE:
            self._alive[n.name] = story.alive
        made = _elements(result, version(result))
        if not any(self._seen.get((n.name, m.name)) == made for m in n.all_input_nodes):
            self._makers.setdefault(made, n.name)  # else a view of what another has made

    def _bind(self, n: fx.Node, result: Any) -> tuple[OpRule, dict[str, Any] | None] | None:
        """The row of a node's call and its arguments, bound once for all passes."""
        rule = rule_of(n) or derivable_rule_of(n)
        if rule is None:
            return None
        bound = bind(rule, n.args, n.kwargs, n.target)
        if bound is None:
            return rule, None
        self.calls[n.name] = Call(rule=rule, operands=bound)
        values = {name: map_arg(value, self.env.__getitem__) for name, value in bound.items()}
        if not rule.reads and rule.obstacle(values | {"result": result}):
            self._lost.add(n.name)
        return rule, values

    def result(self, out: Any) -> Plan:
        """The plan with all that was found; ``out`` is what the graph returned."""
        self.env.clear()  # from here on, only what a real step holds is alive
        self.kept = [k for k in self.kept if k.life() is not None]
        self._add_unseen(out)
        versions = {storage: version(t) for storage, t in self._versions.items()}
        for storage in self._unseen:  # nothing shows that it is what it was
            versions[storage] = -1
            self._lost |= set(self._first[storage][1])
        values = Values(
            alive=self._alive,
            shapes=self._shapes,
            seen=self._seen,
            makers=self._makers,
            versions=versions,
            lost=frozenset(self._lost),
            differentiable=frozenset(self._differentiable),
        )
        late = {node for node, elements in self._whole if not values.stays(elements)}
        for kept in self.kept:
            assert kept.read is not None
            read = kept.read
            if read.node in late and not read.obstacle:
                why = f"{read.op} would keep an input whole that is written to later"
                kept.read = replace(read, obstacle=why)
            elif read.identity is not None and not values.stays(read.identity):
                kept.read = replace(read, written=True)
            where = self._unseen.get(storage_id(kept.tensor))
            if where is not None and not read.obstacle:
                why = f"it is written to where autograd does not see it (.data), in {where}"
                kept.read = replace(kept.read, obstacle=why)
        sites = tuple(self.sites())
        return replace(self.plan, sites=sites, values=values, calls=self.calls, bodies=self.bodies)

    def _add_unseen(self, out: Any) -> None:
        """What autograd keeps from hooks and holds all the same.

        Numbers that it has wrapped; attributes of a custom function's context, and what the
        backward of one that Dynamo has traced finds in its closure. Read from the autograd nodes
        behind ``out``, which are numbered as they were made.
        """
        ends = [end for end, _ in self._upto]
        start = next((end for end, n in reversed(self._upto) if n.op == "placeholder"), -1)
        for node in _nodes_behind(out, start):
            at = bisect.bisect_left(ends, sequence_number(node))
            if at == len(ends):
                continue
            n = self._upto[at][1]
            # the numbers of a region are in its own plan
            for _, value in raw_saved(node) if shows_saved() and not _is_checkpoint(n) else ():
                if isinstance(value, Tensor) and not value.dim():
                    rule = rule_of(n) if n.name in self.calls else None
                    self._add(n, _Kept(value, lambda: True), rule, None, {}, {}, NUMBER)
            own = [*getattr(node, "__dict__", {}).values(), *closed_over(node)]
            for value in pytree.tree_leaves(own):
                if isinstance(value, Tensor) and not self._is_free(value):
                    self._add(n, _Kept(value, lambda: True), None, None, {}, {}, "")

    def _run_body(self, n: fx.Node, args: tuple[Any, ...]) -> tuple[Any, Callable[[], object]]:
        """A region's result, and what tells whether it is to be recomputed.

        PyTorch lets its inputs go with the last tensor that it would have saved: at once where its
        backward reads nothing.
        """
        body = args[0]
        # without its inputs: they hold the graph behind them, which may go before the region does
        plan = Plan(module=body, inputs=(), config=self.plan.config)
        with fake_state(body, fake_mode_of(args)) as state:
            probe = _Probe(plan, state)
            result = probe.run(*args[1:])
            self.bodies[str(n.args[0].target)] = probe.result(result)  # type: ignore[union-attr]
        lives = probe.lives
        return result, lambda: next((life for life in lives if life()), None)

    def _explain(
        self,
        n: fx.Node,
        rule: OpRule,
        values: dict[str, Any] | None,
        result: Any,
        mine: list[_Kept],
    ) -> None:
        """Turns what a node keeps into reads: which operand is each tensor?"""
        held = {storage_id(k.tensor) for k in mine}
        mine = [k for k in mine if not self._is_free(k.tensor)]
        if not mine:
            return
        nodes = self.calls[n.name].operands if values is not None else {}
        operands = {} if values is None else values | {"result": result}
        obstacle = self._obstacle(n, rule, values, result)
        reads = reads_of(rule, operands)
        matched = _match([k.tensor for k in mine], reads, operands)
        taken: set[str] = set()
        for kept, read in zip(mine, matched, strict=True):
            copied = read is not None and not obstacle and not is_inplace(n, operands)
            if copied and rule is not CHECKPOINT and _is_copy_of(kept.tensor, read, operands):
                # the packed call reads the operand, and makes no such copy
                assert read is not None
                read = replace(read, operand=INSIDE, use=Use.SHAPE, bits=None)
            taken |= {read.operand} - {INSIDE} if read is not None else set()
            why = obstacle or (self._why_exact(n, kept.tensor) if rule is CHECKPOINT else "")
            self._add(n, kept, rule, read, operands, nodes, why)
        if values is None or rule is CHECKPOINT:
            return
        for read in reads:
            x = operands.get(read.operand)
            if not isinstance(x, Tensor) or read.operand in taken:
                continue
            # autograd may keep one tensor for two reads, or where only the shape is read
            if taken and storage_id(x) in {storage_id(k.tensor) for k in mine}:
                self._add(n, self._also(x), rule, read, operands, nodes, obstacle)
            elif read.use is not Use.SHAPE and not obstacle and self._is_wanted(read, operands):
                self._add_what_is_run_again(n, rule, read, operands, nodes, held)

    def _obstacle(
        self, n: fx.Node, rule: OpRule, values: dict[str, Any] | None, result: Any
    ) -> str:
        """Why this very call cannot be packed, or ``""``."""
        if values is None:
            return f"called with arguments that the row of {rule.name} does not know"
        obstacle = rule.obstacle(values)
        if not obstacle and is_complex((*values.values(), result)):
            obstacle = f"the row of {rule.name} is for real numbers"
        if not obstacle and is_inplace(n, values):
            obstacle = self._seen_by_others(n, next(iter(values.values())))
        return obstacle

    def _also(self, x: Tensor) -> _Kept:
        return _Kept(x.detach(), self._mark)

    def _is_wanted(self, read: Read, operands: Mapping[str, Any]) -> bool:
        """Whether a gradient needs what is read: what is written in place may need one only now."""
        needed = (operands.get(a) for a in read.needed_by)
        return any(isinstance(v, Tensor) and id(v) in self._needing for v in needed)

    def _add_what_is_run_again(
        self,
        n: fx.Node,
        rule: OpRule,
        read: Read,
        operands: dict[str, Any],
        nodes: Mapping[str, Any],
        held: set[int],
    ) -> None:
        """An operand that autograd does not keep, and that the op's packed call reads."""
        x = operands[read.operand]
        if not self._is_free(x):
            self._add(n, self._also(x), rule, read, operands, nodes, "", dense=False)
        elif storage_id(x) not in held:
            self._whole.append((n.name, _elements(x, self._before.get(id(x), version(x)))))

    def _is_free(self, tensor: Tensor) -> bool:
        story = self.stories.get(storage_id(tensor))
        return story is not None and story.alive in _FREE

    def _why_exact(self, n: fx.Node, tensor: Tensor) -> str:
        """Why an input of a checkpointed region is not to be packed, or ``""``."""
        regions = [m.args[0] for m in self.module.graph.nodes if _is_checkpoint(m)]  # type: ignore[union-attr]
        if [r.target for r in regions].count(n.args[0].target) > 1:  # type: ignore[union-attr]
            return "its region is called more than once"
        body: Any = self.module.get_submodule(str(n.args[0].target))  # type: ignore[union-attr]
        if not n.kwargs.get("once", True) and written_inputs(body):
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
        story = self.stories.get(storage_id(operand))
        kept_alive = story is not None and story.alive == "a parameter"
        return kept_alive and tensor.dtype != operand.dtype

    def _seen_by_others(self, n: fx.Node, written: Any) -> str:
        """Who else sees the tensor that an in-place call writes, so that it cannot be packed."""
        if not isinstance(written, Tensor):
            return ""
        story = self.stories[storage_id(written)]
        if story.alive in _FREE or story.nodes[0].op == "placeholder":
            return f"it writes into {story.alive or 'an input of the graph'}"
        at = self._order[n]
        for other in story.nodes:
            if other is n or other is next(iter(self.calls[n.name].operands.values())):
                continue
            late = next((u for u in other.users if self._order[u] > at), None)
            if late is not None:
                return f"it writes into a tensor that '{late.name}' sees through '{other.name}'"
        return ""

    def _add(
        self,
        n: fx.Node,
        kept: _Kept,
        rule: OpRule | None,
        read: Read | None,
        operands: dict[str, Any],
        nodes: Mapping[str, Any],
        obstacle: str,
        dense: bool = True,
    ) -> None:
        operand, tensor = read.operand if read else "?", kept.tensor
        source = {**nodes, "result": n}.get(operand) if read else None
        x = operands[operand] if isinstance(source, fx.Node) else None
        identity = None
        if isinstance(x, Tensor):
            written = version(x) if source is n else self._before.get(id(x), version(x))
            identity = _elements(x, written)
        kept.owner = self.stories.setdefault(
            storage_id(tensor), _Story(owner=f"{n.name}.{operand}")
        ).owner
        kept.nbytes = read.nbytes(operands) if read and read.nbytes else 0
        kept.read = SavedRead(
            node=n.name,
            op=rule.name if rule and rule.reads else _target_name(self.module, n),
            operand=operand,
            rule=rule if rule and rule.reads else None,
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
            obstacle=obstacle,
            recast=self._is_recast(tensor, rule, operands.get(operand)),
            wanted=read is None or not operands or self._is_wanted(read, operands),
            dense=dense,
        )
        self.kept.append(kept)

    def sites(self) -> Iterator[Site]:
        """Every storage that stays, in the order in which it was first kept."""
        found: dict[int, list[_Kept]] = {}
        for kept in self.kept:
            found.setdefault(storage_id(kept.tensor), []).append(kept)
        for storage, all_kept in found.items():
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
                alive=self.stories[storage].alive,
                dense=any(r.dense for r in reads.values()),
            )


def _elements(x: Tensor, written: int) -> Elements:
    """What ``x`` shows, at a version of its storage."""
    layout = None if memory_order(x) is not None else (tuple(x.shape), tuple(x.stride()))
    return Elements(storage_id(x), int(x.storage_offset()), x.numel(), layout, x.dtype, written)


def _nodes_behind(out: Any, start: int) -> list[Node]:
    """The autograd nodes that lead to the tensors in ``out`` and are newer than ``start``."""
    stack = [t.grad_fn for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    found: dict[Node, None] = {}
    while stack:
        node = stack.pop()
        if node is None or node in found or sequence_number(node) <= start:
            continue
        found[node] = None
        stack.extend(following for following, _ in node.next_functions)
    return list(found)


def _is_copy_of(tensor: Tensor, read: Read | None, operands: Mapping[str, Any]) -> bool:
    """Whether the op itself made ``tensor`` from the operand: expanded, or without gaps.

    A copy in another dtype is autocast's, and a packed call makes it too.
    """
    x = operands.get(read.operand) if read is not None else None
    if not isinstance(x, Tensor) or (read is not None and read.use is Use.SHAPE):
        return False
    there = {storage_id(v) for v in operands.values() if isinstance(v, Tensor)}
    return storage_id(tensor) not in there and x.dtype == tensor.dtype


def _is_number(n: fx.Node) -> bool:
    """A float of the model that Dynamo made an input of its graph: fake tensors hold no values."""
    return n.target == "item" and isinstance(n.meta.get(EXAMPLE_VALUE), float | torch.SymFloat)


def _is_checkpoint(n: fx.Node) -> bool:
    return rule_of(n) is CHECKPOINT


def _is_parameter(n: fx.Node, tensor: Tensor) -> bool:
    return isinstance(n.meta.get(EXAMPLE_VALUE, tensor), nn.Parameter)


def _match(
    tensors: list[Tensor], reads: tuple[Read, ...], operands: dict[str, Any]
) -> list[Read | None]:
    """The row's read that each tensor is, or None.

    It may have the operand's storage, be made inside the op, or be a copy of an operand; what is
    certain is settled first, since under autocast a weight may have the shape of an input.
    """
    found: list[Read | None] = [None] * len(tensors)
    taken: set[str] = set()
    ways = [_is_operand, _is_copy, _is_made_inside, _has_its_shape, _has_its_last_dimension]
    if any(r.operand == INSIDE for r in reads):
        ways.remove(_is_copy)  # what is computed inside may look like an operand
    for fits in ways:
        for i, tensor in enumerate(tensors):
            open_reads = [r for r in reads if r.operand not in taken]
            if operands and found[i] is None:
                read = next((r for r in open_reads if fits(tensor, r.operand, operands)), None)
                found[i] = read
                taken |= {read.operand} - {INSIDE} if read is not None else set()
    return found


def _is_operand(tensor: Tensor, operand: str, operands: dict[str, Any]) -> bool:
    value = operands.get(operand)
    return isinstance(value, Tensor) and storage_id(value) == storage_id(tensor)


def _is_copy(tensor: Tensor, operand: str, operands: dict[str, Any]) -> bool:
    """A contiguous one, as cuDNN's batch norm makes of its input."""
    x = operands.get(operand)
    if not isinstance(x, Tensor) or x.is_contiguous():
        return False
    return x.dtype == tensor.dtype and x.shape == tensor.shape


def _is_made_inside(tensor: Tensor, operand: str, operands: dict[str, Any]) -> bool:
    return operand not in operands


def _has_its_shape(tensor: Tensor, operand: str, operands: dict[str, Any]) -> bool:
    value = operands[operand]
    return isinstance(value, Tensor) and sorted(value.shape) == sorted(tensor.shape)


def _has_its_last_dimension(tensor: Tensor, operand: str, operands: dict[str, Any]) -> bool:
    value = operands[operand]
    return (
        isinstance(value, Tensor)
        and value.numel() == tensor.numel()
        and value.shape[-1:] == tensor.shape[-1:]
    )


def _target_name(module: fx.GraphModule | nn.Module, n: fx.Node) -> str:
    if n.op == "call_module":
        return type(module.get_submodule(str(n.target))).__name__
    name: str = getattr(n.target, "__name__", str(n.target))
    return name.split(".")[0]  # without the overload
