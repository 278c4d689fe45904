"""Pass 1: which tensors will autograd keep, for whom, and how large are they?

Autograd itself is asked: the graph runs once on fake tensors, with gradients on, and
``saved_tensors_hooks`` notes what each node keeps. That is exact for every op of every dialect,
with a row or without: the bytes found here equal what the same hooks count in a real step. The op
table then says what each kept tensor is to the node that keeps it (its input, its result, a mask
inside it).

An input that is a leaf stays with the caller; one that another op has made is an activation like
those inside (a block that is compiled by itself), kept for the backward alone.

Requires: a graph and fake inputs. Ensures: ``plan.sites`` covers every saved storage that is not a
parameter, a buffer or an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropit_fx.core_types import INSIDE, OpRule, Plan, Read, SavedRead, Site, Use, Values
from dropit_fx.fake import fake_mode_of, fake_state
from dropit_fx.op_table import CHECKPOINT, bind, derivable_rule_of, is_inplace, reads_of, rule_of
from dropit_fx.packed_call import memory_order
from dropit_fx.private import EXAMPLE_VALUE, pytree, set_hooks_tracing, storage_id, version
from dropit_fx.provenance import node_module, node_where

_FREE = ("a parameter", "a buffer", "a model input")
_ALIVE = (*_FREE, "a constant of the graph")


class FakeRunError(RuntimeError):
    """The graph does not run on fake tensors; the message names the node and the user's line."""

    node: fx.Node | None = None


def find_saved(plan: Plan) -> Plan:
    """Fills ``plan.sites`` and, for checkpointed regions, ``plan.bodies``.

    Raises:
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    mode = fake_mode_of(plan.inputs)
    with mode, torch.enable_grad(), fake_state(plan.module, mode) as state:
        probe = _Probe(plan, state)
        probe.run(*plan.inputs)
        return probe.result()


@dataclass
class _Kept:
    """One tensor as the hook saw it. Holding it keeps its storage's id from being used again."""

    node: fx.Node
    tensor: Tensor
    dense: bool = True  # by autograd, not by a packed call
    nbytes: int = 0  # at least, where the fake tensor is too small


@dataclass
class _Story:
    """All that is known of one storage while the graph runs."""

    owner: str
    nodes: list[fx.Node] = field(default_factory=list)  # whose outputs live in it
    alive: str = ""


@contextmanager
def _hooks(note: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Hands over what autograd keeps, also where the caller traces with hooks switched off.

    ``torch.compile`` does so while it splits a DistributedDataParallel model by its buckets.
    """
    tracing = set_hooks_tracing(False)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
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
        self.stories: dict[int, _Story] = {
            storage: _Story(owner=kind, alive=kind) for storage, kind in state.items()
        }
        self.reads: dict[int, list[SavedRead]] = {}
        self.bodies: dict[str, Plan] = {}
        self._versions: dict[int, int] = {}  # of a node's operands, before it runs
        self._made: dict[str, int] = {}  # the version of each node's result, when it was made
        self._alive: dict[str, str] = {}
        self._views: dict[str, str] = {}
        self._lost: set[str] = set()
        self._stale: set[tuple[str, str]] = set()
        self._order = {n: i for i, n in enumerate(plan.module.graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        mine: list[_Kept] = []

        def note(tensor: Tensor) -> Tensor:
            mine.append(_Kept(n, tensor))
            return tensor

        args, kwargs = self.fetch_args_kwargs_from_env(n)
        self._versions = {
            id(t): version(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for operand in n.all_input_nodes:
            value = self.env[operand]
            if isinstance(value, Tensor) and version(value) != self._made[operand.name]:
                self._stale.add((n.name, operand.name))
        try:
            with _hooks(note):
                if _is_checkpoint(n):
                    result = self._run_body(n, args)
                    # recomputed: between forward and backward only the inputs stay
                    mine[:] = [_Kept(n, t) for t in args[1:] if isinstance(t, Tensor)]
                    if not pytree.tree_any(_requires_grad, result):
                        mine.clear()
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
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                story = self.stories.setdefault(storage_id(tensor), _Story(owner=n.name))
                story.nodes.append(n)
                if n.op == "placeholder" and not story.alive and tensor.is_leaf:
                    story.alive = "a parameter" if _is_parameter(n, tensor) else "a model input"
                if n.op == "get_attr" and not story.alive:
                    story.alive = "a constant of the graph"
        if n.op == "output":
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and not self.stories[storage_id(tensor)].alive:
                    self.stories[storage_id(tensor)].alive = "a model output"
        self._describe(n, args, kwargs, result)
        self._explain(n, args, kwargs, result, mine)
        return result

    def _describe(self, n: fx.Node, args: Any, kwargs: Any, result: Any) -> None:
        """What later passes ask of a value: does it stay, is it a view, can it be made again?"""
        if not isinstance(result, Tensor):
            if not pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), result):
                self._alive[n.name] = "a number"
            return
        self._made[n.name] = version(result)
        story = self.stories[storage_id(result)]
        if story.alive in _ALIVE:
            self._alive[n.name] = story.alive
        for operand in n.all_input_nodes:
            x = self.env[operand]
            if (
                isinstance(x, Tensor)
                and storage_id(x) == storage_id(result)
                and x.numel() == result.numel()
                and version(result) == self._versions.get(id(x))
                and memory_order(x) is not None
                and memory_order(result) is not None
            ):
                self._views[n.name] = operand.name

        rule = derivable_rule_of(n)
        if rule is not None and not rule.reads:
            values = bind(rule, args, kwargs, n.target)
            if values is not None and rule.obstacle(values | {"result": result}):
                self._lost.add(n.name)

    def result(self) -> Plan:
        """The plan with all that was found."""
        values = Values(
            alive=self._alive,
            views=self._views,
            lost=frozenset(self._lost),
            stale=frozenset(self._stale),
        )
        return replace(self.plan, sites=tuple(self.sites()), values=values, bodies=self.bodies)

    def _run_body(self, n: fx.Node, args: tuple[Any, ...]) -> Any:
        body = args[0]
        plan = Plan(module=body, inputs=tuple(args[1:]), config=self.plan.config)
        with fake_state(body, fake_mode_of(args)) as state:
            probe = _Probe(plan, state)
            result = probe.run(*args[1:])
        self.bodies[str(n.args[0].target)] = probe.result()  # type: ignore[union-attr]
        return result

    def _explain(self, n: fx.Node, args: Any, kwargs: Any, result: Any, mine: list[_Kept]) -> None:
        """Turns what a node keeps into reads: which operand is each tensor?"""
        mine = [k for k in mine if not self._is_free(k.tensor)]
        if not mine:
            return
        rule, obstacle = rule_of(n), ""
        values = bind(rule, args, kwargs, n.target) if rule is not None else None
        nodes = bind(rule, n.args, n.kwargs, n.target) if rule is not None else None
        if rule is not None and values is None:
            obstacle = f"called with arguments that the row of {rule.name} does not know"
        elif rule is not None and values is not None:
            obstacle = rule.obstacle(values)
        if values is not None and is_inplace(n, values):
            obstacle = obstacle or self._seen_by_others(n, args)
        operands = {} if rule is None or values is None else dict(values) | {"result": result}
        reads = reads_of(rule, operands) if rule is not None else ()
        matched = _match([k.tensor for k in mine], reads, operands)
        taken = {read.operand for read in matched if read is not None} - {INSIDE}
        for kept, read in zip(mine, matched, strict=True):
            why = obstacle or (self._why_exact(n, kept.tensor) if rule is CHECKPOINT else "")
            self._add(n, kept.tensor, rule, read, operands, nodes or {}, why)
        if rule is not None and not obstacle and rule.read(INSIDE) is not None:
            self._add_what_is_run_again(n, rule, operands, nodes or {}, taken)
        if rule is not None and values is not None and taken:
            # autograd may keep one tensor for two reads, or where only the shape is read
            for read in reads:
                operand = operands.get(read.operand)
                if (
                    read.operand not in taken
                    and isinstance(operand, Tensor)
                    and any(storage_id(k.tensor) == storage_id(operand) for k in mine)
                ):
                    self._add(n, operand, rule, read, operands, nodes or {}, obstacle)

    def _add_what_is_run_again(
        self,
        n: fx.Node,
        rule: OpRule,
        operands: dict[str, Any],
        nodes: dict[str, Any],
        taken: set[str],
    ) -> None:
        """Operands that autograd does not keep, and that the op's packed call reads again."""
        for read in rule.reads:
            x = operands.get(read.operand)
            if not isinstance(x, Tensor) or read.use is Use.SHAPE or read.operand in taken:
                continue
            if not self._is_free(x) and any(
                _requires_grad(operands.get(a)) for a in read.needed_by
            ):
                self._add(n, x, rule, read, operands, nodes, "", dense=False)

    def _is_free(self, tensor: Tensor) -> bool:
        story = self.stories.get(storage_id(tensor))
        return story is not None and story.alive in _FREE

    def _why_exact(self, n: fx.Node, tensor: Tensor) -> str:
        """Why an input of a checkpointed region is not to be packed, or ``""``."""
        regions = [m.args[0] for m in self.module.graph.nodes if _is_checkpoint(m)]  # type: ignore[union-attr]
        if [r.target for r in regions].count(n.args[0].target) > 1:  # type: ignore[union-attr]
            return "its region is called more than once"
        return "" if tensor.requires_grad else "no gradient goes there: it may be a mask or a table"

    def _is_recast(self, tensor: Tensor, rule: OpRule | None, operand: Any) -> bool:
        """Whether autocast made ``tensor`` from a parameter."""
        if rule is None or rule.autocast != "lower" or not isinstance(operand, Tensor):
            return False
        story = self.stories.get(storage_id(operand))
        kept_alive = story is not None and story.alive == "a parameter"
        return kept_alive and tensor.dtype != operand.dtype

    def _seen_by_others(self, n: fx.Node, args: Any) -> str:
        """Who else sees the tensor that an in-place call writes, so that it cannot be packed."""
        story = self.stories[storage_id(args[0])]
        if story.alive in _FREE or story.nodes[0].op == "placeholder":
            return f"it writes into {story.alive or 'an input of the graph'}"
        at = self._order[n]
        for other in story.nodes:
            if other is n or other is n.args[0]:
                continue
            late = next((u for u in other.users if self._order[u] > at), None)
            if late is not None:
                return f"it writes into a tensor that '{late.name}' sees through '{other.name}'"
        return ""

    def _add(
        self,
        n: fx.Node,
        tensor: Tensor,
        rule: OpRule | None,
        read: Read | None,
        operands: dict[str, Any],
        nodes: dict[str, Any],
        obstacle: str,
        dense: bool = True,
    ) -> None:
        operand = read.operand if read else "?"
        source = (nodes | {"result": n}).get(operand) if read else None
        identity: tuple[Any, ...] = ()
        if isinstance(source, fx.Node):
            x = operands[operand]
            layout = None if memory_order(x) is not None else tuple(x.stride())
            written = version(x) if source is n else self._versions.get(id(x), version(x))
            identity = (storage_id(x), int(x.storage_offset()), x.numel(), layout, written)
        storage = storage_id(tensor)
        if storage not in self.stories:
            self.stories[storage] = _Story(owner=f"{n.name}.{operand}")
        self.kept.append(
            _Kept(n, tensor, dense, read.nbytes(operands) if read and read.nbytes else 0)
        )
        known = self.reads.setdefault(storage, [])
        if any(r.node == n.name and r.operand == operand for r in known):
            return
        known.append(
            SavedRead(
                node=n.name,
                op=rule.name if rule else _target_name(self.module, n),
                operand=operand,
                rule=rule,
                read=read,
                module=node_module(n),
                where=node_where(n),
                numel=tensor.numel(),
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                source=source.name if isinstance(source, fx.Node) else None,
                identity=identity,
                lossy=read is None
                or (read.lossy if isinstance(read.lossy, bool) else read.lossy(operands)),
                bits=read.bits(operands) if read and read.bits else None,
                between=read.between(operands) if read and read.between else None,
                function=read.function(operands) if read and read.function else "",
                obstacle=obstacle,
                recast=self._is_recast(tensor, rule, operands.get(operand)),
                wanted=read is None or any(_requires_grad(operands.get(a)) for a in read.needed_by),
            )
        )

    def sites(self) -> Iterator[Site]:
        """Every storage that stays, in the order in which it was first kept."""
        done: set[int] = set()
        dense = {storage_id(kept.tensor) for kept in self.kept if kept.dense}
        for kept in self.kept:
            storage = storage_id(kept.tensor)
            if storage in done:
                continue
            done.add(storage)
            story = self.stories[storage]
            yield Site(
                name=story.owner,
                nbytes=max(kept.nbytes, kept.tensor.untyped_storage().nbytes()),
                reads=tuple(self.reads[storage]),
                alive=story.alive,
                dense=storage in dense,
            )


def _is_number(n: fx.Node) -> bool:
    """A float of the model that Dynamo made an input of its graph: fake tensors hold no values."""
    return n.target == "item" and isinstance(n.meta.get(EXAMPLE_VALUE), float | torch.SymFloat)


def _is_checkpoint(n: fx.Node) -> bool:
    return rule_of(n) is CHECKPOINT


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


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
