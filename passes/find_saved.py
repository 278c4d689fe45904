"""Pass 1: which tensors will autograd keep, for whom, and how large are they?

Autograd itself is asked: the graph runs once on fake tensors, with gradients on, and
``saved_tensors_hooks`` notes what each node keeps. That is exact for every op of every dialect,
with a row or without: the bytes found here equal what the same hooks count in a real step. The op
table then says what each kept tensor is to the node that keeps it (``explain_saved.py``). Counted
is what still lives when the graph has run: a branch that ends without a gradient takes what it has
saved with it, as it does in a real step, but for what a checkpointed region holds behind an input
that gets no gradient.

An op that makes or reads something in a size that depends on values (a mask's rows) stays as it is.

What is made of an input whose class has a say in what ops do is of that class, and packed calls run
as PyTorch does there: it stays as it is. So does what an op saves that reads a weight of such a
class (a quantised one): often that weight in full precision.

An input that is a leaf, or a view of one, stays with the caller; one that another op has made is
an activation like those inside (a block that is compiled by itself), kept for the backward alone.
So is what the model's own hooks make of its inputs, around the graph; what they keep themselves is
counted, and stays.

Requires: a graph and fake inputs. Ensures: ``plan.sites`` covers every saved storage that is not a
parameter, a buffer or an input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from dropit_fx.capture.around import called_with, said
from dropit_fx.capture.example_inputs import placeholder_values
from dropit_fx.capture.fake import (
    FakeRun,
    RealStorages,
    fake_mode_of,
    fake_state,
    leaving_blocks,
    sized_by_values,
)
from dropit_fx.capture.provenance import error_line, first_line, node_module, node_where
from dropit_fx.ops.pooling import MAX_POOL
from dropit_fx.ops.table import rule_of
from dropit_fx.passes.ask_autograd import Autograd, Behind, Saved
from dropit_fx.passes.explain_saved import NUMBER, Explainer, Ran, is_checkpoint, region_of
from dropit_fx.passes.plan import Plan, SavedRead, Site
from dropit_fx.passes.storages import Chance, Storages, is_state
from dropit_fx.private import EXAMPLE_VALUE, pytree, storage_id, version
from dropit_fx.runtime.decisions import INDICES
from dropit_fx.runtime.overrides import has_own_ops
from dropit_fx.runtime.regions import DECIDES, WRITTEN, name_of, written_unseen

log = logging.getLogger(__name__)
BY_VALUES = "a size of this call depends on values"
UNCOUNTED = "its size depends on values: it stays, and is not counted"
# of their input they take shape and dtype
_LIKE = "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"
OWN_OPS = "dropit_own_ops"  # metadata of inputs, as ``has_own_ops``: the name of their class


class FakeRunError(RuntimeError):
    """The graph does not run on fake tensors; the message names the node and the user's line."""

    node: fx.Node | None = None


def find_saved(plan: Plan) -> Plan:
    """Fills ``plan.sites``, ``plan.values``, ``plan.calls`` and, for regions, ``plan.bodies``.

    Raises:
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    try:
        return _found(plan)
    except FakeRunError:
        raise
    except Exception as error:  # the user's code ran: anything can be raised
        if plan.given is None:
            raise
        log.warning(
            "what hooks of the model make and keep is not counted: on fake tensors, one of %s"
            " stops at %s: %s",
            said(plan.module),
            error_line(error),
            first_line(error),
        )
        return _found(replace(plan, given=None))


def _found(plan: Plan) -> Plan:
    mode = fake_mode_of(plan.inputs)
    with mode, RealStorages(), torch.enable_grad(), fake_state(plan.module, mode) as state:
        probe = _Probe(plan, state, plan.given or plan.inputs)
        with leaving_blocks(probe):
            return probe.result(probe.called())


class _Probe(FakeRun):
    """Runs the graph on fake tensors and notes what autograd keeps at each node."""

    def __init__(
        self,
        plan: Plan,
        state: Mapping[int, bool],
        given: Any,
        fixed: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(plan.module)
        self.plan = plan
        self.autograd = Autograd()
        self.storages = Storages(state, given)
        self.reads = Explainer(plan.module, self.storages, self.autograd, plan.compiled)
        self.bodies: dict[str, Plan] = {}
        self.written: set[int] = set()  # storages, where no version tells of it
        self._uncounted: set[int] = set()  # storages, where their size depends on values
        self._held: list[tuple[str, bool, Saved]] = []  # free ones: by whom, and packed as well
        self._regions: dict[str, list[Callable[[], object]]] = {}  # their results' marks
        self._behind: list[tuple[Callable[[], object], Tensor | None]] = []  # regions hold
        inputs = [n for n in plan.module.graph.nodes if n.op == "placeholder"]
        self._fixed = {n for at, n in enumerate(inputs) if at in fixed or is_state(n)}
        self._own_ops = {n: n.meta[OWN_OPS] for n in inputs if OWN_OPS in n.meta}

    def called(self) -> Any:
        """What a call of the module gives; its own hooks run around the graph, and keep theirs."""
        module, given = self.plan.module, self.plan.given
        if given is None:
            return self.run(*self.plan.inputs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.run(*placeholder_values(module, args, kwargs))

        with self.autograd.noting() as saved:
            out = called_with(module, forward, given)
        end = module.graph.output_node()
        self.autograd.mark_result(end, out)
        why = f"a hook of the model keeps it: {said(module)}"
        for kept in saved:
            if not self.storages.is_free(kept.tensor):
                self.reads.add(Ran(end), kept, None, why)
        return out

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        needing = {id(t) for t in operands if t.requires_grad}
        self.storages.enter(n, self.env, operands)
        life: Callable[[], object] | None = None  # of a region
        fixed = self._fixed.intersection(n.all_input_nodes)
        made_of_fixed = len(fixed) == len(n.all_input_nodes)
        is_fixed = n in self._fixed or (n.op != "placeholder" and made_of_fixed)
        chance = Chance() if is_fixed else nullcontext()
        try:
            with self.autograd.noting() as saved, chance:
                if is_checkpoint(n):
                    result, life = self._run_body(n, args)
                elif _is_number(n):
                    result = n.meta[EXAMPLE_VALUE]
                else:
                    result = super().run_node(n)
            _require_storages(result)
        except Exception as error:
            failed = FakeRunError(
                f"node '{n.name}' ({n.target}) of module '{node_module(n)}' does not run on fake"
                f" tensors of the example's shapes ({node_where(n) or 'no source line'}):"
                f" {type(error).__name__}: {error}"
            )
            failed.node = n
            raise failed from error
        no_tensor = not pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), result)
        if no_tensor or (is_fixed and not getattr(chance, "seen", False)):
            self._fixed.add(n)
        self.storages.leave(n, operands, result)
        unseen = pytree.tree_leaves(map_arg(written_unseen(n), self.env.__getitem__))
        written = {storage_id(t) for t in unseen if isinstance(t, Tensor)}
        self.written |= written
        if n not in self._fixed:
            written |= self.storages.written(operands)
            if written:
                self._fixed -= {m for m in self._fixed if written & self._storages_of(m)}
        self.autograd.mark_result(n, result)
        if life is not None:
            # recomputed: between forward and backward only the inputs stay
            saved = [Saved(t.detach(), life) for t in args[1:] if isinstance(t, Tensor)]
            self.autograd.lives += [kept.life for kept in saved]
            self._regions.setdefault(region_of(n), []).append(self.autograd.mark)
        fixed |= {n} & self._fixed
        ran = Ran(n, values=self.env, needing=needing, fixed=fixed)
        if n in self.by_values:
            self._add_uncounted(ran, saved, operands, result)
            return result
        own = next(filter(None, map(self._own_ops.get, n.all_input_nodes)), "")
        if own:
            self._own_ops[n] = own
        else:  # a weight, whose class need not be that of the result
            own = next((type(t).__name__ for t in operands if has_own_ops([t])), "")
        if own:
            why = f"an input is a {own}, which has a say in what ops do: it runs as in PyTorch"
            for kept in saved:
                if not self.storages.is_free(kept.tensor):
                    self.reads.add(ran, kept, None, why)
            return result
        ran = self.reads.bound(ran, result)
        if free := [kept for kept in saved if self.storages.is_free(kept.tensor)]:
            packed = self.reads.holds_packed(ran)
            self._held += [(n.name, packed, kept) for kept in free]
        self.reads.explain(ran, saved)
        return result

    def _add_uncounted(
        self, ran: Ran, saved: list[Saved], operands: list[Tensor], result: Any
    ) -> None:
        """Reads of a node in sizes that depend on values: they stay, and not all are counted."""
        known = {storage_id(t) for t in operands}
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if ran.node in self.stood_in:  # what it saves is not known: it may be all
            saved = [Saved(t.detach(), self.autograd.mark) for t in (*operands, *tensors)]
        made = [*tensors, *(kept.tensor for kept in saved)]
        if sized_by_values(ran.node, itself=True):
            self._uncounted |= {storage_id(t) for t in made} - known
        for kept in saved:
            if not self.storages.is_free(kept.tensor):
                uncounted = storage_id(kept.tensor) in self._uncounted
                self.reads.add(ran, kept, None, UNCOUNTED if uncounted else BY_VALUES)

    def _storages_of(self, n: fx.Node) -> set[int]:
        leaves = pytree.tree_leaves(self.env.get(n))
        return {storage_id(t) for t in leaves if isinstance(t, Tensor)}

    def result(self, out: Any) -> Plan:
        """The plan with all that was found; ``out`` is what the graph returned."""
        self.env.clear()  # from here on, only what a real step holds is alive
        self._let_go()
        for n, tensor, is_number in self.autograd.unseen(out):
            kept = Saved(tensor, lambda: True)
            if is_number and not is_checkpoint(n):  # those of a region are in its own plan
                rule = rule_of(n) if n.name in self.reads.calls else None
                self.reads.add(Ran(n, rule), kept, None, NUMBER)
            elif not is_number and not self.storages.is_free(tensor):
                self.reads.add(Ran(n), kept)
        values = self.storages.values(self.reads.lost)
        late = {node for node, whole in self.reads.whole if not values.stays(whole)}
        for kept in self.reads.kept:
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
            calls=self.reads.calls,
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
        dense = [k for k in self.reads.kept if k.life() is not None]
        self._behind.clear()
        there = {k.read.node for k in dense if k.read is not None and k.life() is not None}
        self.reads.kept = []
        for kept in dense:
            assert kept.read is not None
            if kept.life() is None and kept.read.node not in there:
                kept.read = replace(kept.read, stranded=True)
            if kept.read.dense or not kept.read.stranded:
                self.reads.kept.append(kept)

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
            probe = _Probe(plan, state, given, frozenset(fixed))
            with leaving_blocks(probe):
                result = probe.run(*given)
            self.bodies[region_of(n)] = probe.result(result)
        body.meta[DECIDES] = body.meta.get(DECIDES, False) or probe.decides(given)
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

    def decides(self, given: tuple[Any, ...]) -> bool:
        """Whether a region keeps indices that it makes of what may be rounded when it runs again.

        A max-pool's tell which of some values is the largest, as a mask of ReLU would.
        """
        inputs = [n for n in self.plan.module.graph.nodes if n.op == "placeholder"]
        pairs = zip(inputs, given, strict=True)
        rounded = {n for n, x in pairs if isinstance(x, Tensor) and x.requires_grad}
        for kept in self.reads.kept:
            if kept.tensor.dtype not in INDICES or kept.read is None or kept.read.row in MAX_POOL:
                continue
            todo, seen = [*self.storages.of(kept.tensor).nodes], set[fx.Node]()
            while todo:
                n = todo.pop()
                if n in seen or n in self._fixed or name_of(n) in _LIKE:
                    continue
                if n in rounded:
                    return True
                seen.add(n)
                todo += n.all_input_nodes
        return any(plan.module.meta.get(DECIDES, False) for plan in self.bodies.values())

    def sites(self) -> Iterator[Site]:
        """Every storage that stays, in the order in which it was first kept."""
        found: dict[int, list[Saved]] = {}
        for kept in self.reads.kept:
            found.setdefault(storage_id(kept.tensor), []).append(kept)
        for all_kept in found.values():
            reads: dict[tuple[str, str], SavedRead] = {}
            for kept in all_kept:
                assert kept.read is not None
                reads.setdefault((kept.read.node, kept.read.operand), kept.read)
            yield Site(
                name=all_kept[0].owner,
                nbytes=max(self._nbytes(all_kept[0].tensor), *(k.nbytes for k in all_kept)),
                reads=tuple(reads.values()),
                kept_by=self.storages.keeper(all_kept[0].tensor),
                dense=any(r.dense for r in reads.values()),
            )

    def _nbytes(self, tensor: Tensor) -> int:
        uncounted = storage_id(tensor) in self._uncounted
        return 0 if uncounted else tensor.untyped_storage().nbytes()


def _require_storages(result: Any) -> None:
    """Raises TypeError where a node makes a tensor whose memory nothing is known of."""
    for tensor in pytree.tree_leaves(result):
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided and not tensor.is_nested:
            kind = str(tensor.layout).removeprefix("torch.")
            raise TypeError(f"it makes a tensor of layout {kind}, whose bytes are not counted")


def _is_number(n: fx.Node) -> bool:
    """A float of the model that Dynamo made an input of its graph: fake tensors hold no values."""
    return n.target == "item" and isinstance(n.meta.get(EXAMPLE_VALUE), float | torch.SymFloat)
