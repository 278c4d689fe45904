"""What each level of each group costs: the squared error that it puts into parameter gradients.

One batch runs, forward and backward, in the base graph with every format exact. Where the backward
of an op arrives, its formula runs again with what a level would give back in the place of what it
reads. What differs in the gradient of a parameter is error as it stands: exact and, squared, a sum
over the groups, since a linear layer's input enters the gradient of its weight and nothing else.

What differs in the gradient of an activation (a norm, a GELU, attention) goes on to all parameters
before it. How much of its energy gets there is measured for all ops at once: the backward runs a
second time on what the loss gives with its signs drawn at random in front of each node, as rounding
errors have them, and each node notes what share of the energy comes out of it.

The cost, beside forward and two backwards: for each level that is looked at, the products of the
gradients that read it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd.graph import Node

from dropit_fx.capture.example_inputs import placeholder_values
from dropit_fx.codecs import CODEC, DERIVED
from dropit_fx.holders import nodes_behind
from dropit_fx.loss import SEED
from dropit_fx.ops.table import RULES
from dropit_fx.passes.plan import Plan
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.moves import EXACT, WHOLE, Group, Level, Made, made_by, pack_name
from dropit_fx.planner.step import Step
from dropit_fx.private import storage_id
from dropit_fx.runtime.copies import Kept, Packed, parts_of, read_back, shared_out
from dropit_fx.runtime.function import gradients
from dropit_fx.runtime.packed_call import pack
from dropit_fx.runtime.regions import checkpointed
from dropit_fx.runtime.tensor_spec import TensorSpec

_ALL_BITS = CODEC["quant"].defaults() | {"bits": None}
Progress = Callable[[str, float], object]  # what is done, and how much of it: 0 to 1


class _Error(NamedTuple):
    """What one level changes in one gradient."""

    made: Made
    level: Level
    energy: float
    goes_to: Node


class Sensitivity(NamedTuple):
    """Squared errors of parameter gradients.

    Attributes:
        errors: Of each group, one for each of its levels.
        gradient: The squared norm of the gradient itself.
    """

    errors: tuple[tuple[float, ...], ...]
    gradient: float


def measure_errors(
    step: Step, base: Plan, groups: Sequence[Group], progress: Progress
) -> Sensitivity:
    """Measures the errors of all levels; those of groups that cannot be measured are infinite.

    Args:
        step: Inputs and loss: one batch.
        base: The rewritten graph that the groups are of; its formats are exact afterwards.
        groups: Their levels are measured.
        progress: Called as the backward goes on.

    Raises:
        PlanError: The gradient of this batch is 0, or not finite.
    """
    _make_exact(base.module)
    with step.real() as (args, kwargs):
        run = _Probe(base, groups, progress)
        inputs = placeholder_values(base.module, args, kwargs)
        loss = step.loss_of(run.run(*inputs))
        parameters = step.trained((args, kwargs))
        for p in step.model.parameters():
            p.grad = None
        nodes = nodes_behind(loss, 0)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        run.forget_hooks()
        squares = [_energy(p.grad) for p in parameters if p.grad is not None]
        gradient = sum(squares)
        if not 0 < gradient < float("inf"):
            raise PlanError(
                f"the gradient of this batch has the squared norm {gradient}: plan with a batch,"
                " and a loss, whose gradient is finite and not 0"
            )
        for trained in parameters:
            trained.grad = None
        progress("how errors go on", 0.0)
        gains = _gains(loss, nodes, {id(p) for p in parameters})
        progress("how errors go on", 1.0)
        found: dict[tuple[Made, Level], float] = defaultdict(float)
        for e in run.errors:
            found[e.made, e.level] += e.energy * gains[e.goes_to]
    return Sensitivity(tuple(_of_group(g, found, run.observed) for g in groups), gradient)


def _of_group(
    group: Group, found: dict[tuple[Made, Level], float], observed: set[str]
) -> tuple[float, ...]:
    """The errors of a group's levels; infinite where a reader's backward was not seen."""
    readers = {d.read.node for d in group.decisions if d.read.wanted and d.read.read is not None}
    seen = readers <= observed
    lossy = {made_by(d) for d in group.lossy}

    def error(level: Level) -> float:
        if level in (WHOLE, EXACT):
            return 0.0
        total = sum(found.get((made, level), 0.0) for made in lossy if made is not None)
        return total if seen and total == total else float("inf")

    return tuple(map(error, group.levels))


def _energy(x: Tensor) -> float:
    return (
        float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float64))) ** 2
    )


def _make_exact(module: fx.GraphModule) -> None:
    """Gives every lossy format of a rewritten graph all its bits."""

    def lossy(codec: str, options: Any) -> bool:
        return codec in CODEC and not CODEC[codec].lossless(dict(options))

    for node in module.graph.nodes:
        if node.target is pack and lossy(*node.args[2:4]):
            node.args = (*node.args[:2], "quant", dict(_ALL_BITS))
        packed = node.kwargs.get("packed")
        if isinstance(packed, dict):
            node.kwargs = node.kwargs | {
                "packed": {
                    k: ("quant", dict(_ALL_BITS))
                    if isinstance(how, tuple) and how[0] != "keep" and lossy(*how)
                    else how
                    for k, how in packed.items()
                }
            }
    module.recompile()


class _Probe(fx.Interpreter):
    """Runs the graph, and looks at the backward of each packed call."""

    def __init__(self, base: Plan, groups: Sequence[Group], progress: Progress) -> None:
        super().__init__(base.module)
        self.extra_traceback = False
        self.progress = progress
        self.errors: list[_Error] = []
        self.observed: set[str] = set()
        self._levels: dict[Made, tuple[Group, Any]] = {}
        self._of_pack: dict[str, Made] = {}
        self._of_own: dict[tuple[str, str], Made] = {}
        self._copies: dict[int, Made] = {}  # storage -> which copy
        self._hooks: list[Any] = []
        self._done = 0
        nodes = {n.name: n for n in base.module.graph.nodes}
        for group in groups:
            for d in group.lossy:
                made = made_by(d)
                assert made is not None
                self._levels.setdefault(made, (group, d))
                name = pack_name(d, nodes)
                if name is None:
                    self._of_own[d.read.node, d.read.operand] = made
                else:
                    self._of_pack[name] = made

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Packed) and n.name in self._of_pack:
            self._copies[storage_id(result.parts[0])] = self._of_pack[n.name]
        out = result[0] if isinstance(result, tuple) and result else result
        ctx: Any = out.grad_fn if isinstance(out, Tensor) else None
        # what a checkpointed region returns comes from a call in it, which runs again
        own = "packed" in n.kwargs and n.target is not checkpointed
        if own and hasattr(ctx, "rule_name"):
            for kept, parts in shared_out(ctx.kept, ctx.saved_tensors):
                made = self._of_own.get((n.name, kept.operand))
                if made is not None and parts:
                    self._copies.setdefault(storage_id(parts[0]), made)
            self.observed.add(n.name)
            self._hooks.append(ctx.register_hook(self._watch(ctx)))
        return result

    def forget_hooks(self) -> None:
        """The backward is over."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, ctx: Any) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: Any, grad_outputs: Any) -> None:
            self._done += 1
            self.progress("errors of levels", self._done / len(self._hooks))
            if grad_outputs[0] is not None:
                with torch.no_grad():
                    self._look(ctx, grad_inputs, grad_outputs[0])

        return hook

    def _look(self, ctx: Any, grad_inputs: Any, grad: Tensor) -> None:
        """Every level of every copy that the backward of one node reads."""
        slots = shared_out(ctx.kept, ctx.saved_tensors)
        edges = [n for n in ctx.plain if n in ctx.specs]  # tensors, in the order of the arguments
        read_by: dict[Made, list[str]] = defaultdict(list)
        for kept, parts in slots:
            for made in self._read(kept, parts):
                read_by[made].append(kept.operand)
        for made, operands in read_by.items():
            reads = [RULES[ctx.rule_name].read(o) for o in operands]
            wanted = {name for r in reads if r is not None for name in r.needed_by}
            needs = tuple(n for n in ctx.needs if n in wanted)
            group, decision = self._levels[made]
            for level in group.levels if needs else ():
                if level in (WHOLE, EXACT):
                    continue
                options = group.options(decision, level)

                def changed(kept: Kept, parts: Any, spec: TensorSpec) -> Any:
                    return self._at(kept, parts, spec, made, level.codec, options)  # noqa: B023

                rounded = [(*changed(k, p, ctx.specs[k.operand]),) for k, p in slots]
                found = gradients(ctx, grad, rounded, needs)
                for name in needs:
                    exact, other = grad_inputs[edges.index(name)], found.get(name)
                    goes_to = ctx.next_functions[edges.index(name)][0]
                    if exact is not None and other is not None and goes_to is not None:
                        energy = _energy(other.reshape(exact.shape) - exact)
                        self.errors.append(_Error(made, level, energy, goes_to))

    def _read(self, kept: Kept, parts: tuple[Tensor, ...]) -> list[Made]:
        """The copies that an operand is read from."""
        if kept.codec == DERIVED:
            recipe = dict(kept.options)["recipe"]
            inner = shared_out(recipe.kept, parts)
            return list(dict.fromkeys(m for k, p in inner for m in self._read(k, p)))
        made = self._copies.get(storage_id(parts[0])) if parts else None
        return [made] if made is not None and kept.codec == "quant" else []

    def _at(
        self,
        kept: Kept,
        parts: tuple[Tensor, ...],
        spec: TensorSpec,
        made: Made,
        codec: str,
        options: dict[str, Any],
    ) -> tuple[Kept, tuple[Tensor, ...]]:
        """How an operand is kept with one copy, of all that it is made from, in another format."""
        if made not in self._read(kept, parts):
            return kept, parts
        if kept.codec == DERIVED:
            recipe = dict(kept.options)["recipe"]
            pairs = zip(shared_out(recipe.kept, parts), recipe.specs, strict=True)
            inner = [self._at(k, p, s, made, codec, options) for (k, p), s in pairs]
            again = recipe._replace(kept=tuple(k for k, _ in inner))
            found = tuple(t for _, own in inner for t in own)
            return kept._replace(options=(("recipe", again),), tensors=len(found)), found
        new = parts_of(read_back(kept, parts, spec), spec.order, codec, options)
        settings = tuple(options.items())
        return kept._replace(codec=codec, options=settings, tensors=len(new)), new


def _gains(loss: Tensor, nodes: Sequence[Node], parameters: set[int]) -> dict[Node, float]:
    """Of an error that arrives at a node, the share of its energy that comes to parameters."""
    generator = torch.Generator().manual_seed(SEED)
    arrived: dict[Node, float] = {}
    passed: dict[Node, list[float]] = {}
    hooks = []

    def flipped(grad: Tensor | None) -> Tensor | None:
        if grad is None or not grad.is_floating_point() or grad.layout != torch.strided:
            return grad
        signs = torch.randint(0, 2, grad.shape, generator=generator, dtype=torch.int8)
        return grad * (2 * signs - 1).to(grad.device, grad.dtype)

    def before(node: Node) -> Any:
        def hook(grads: Any) -> Any:
            drawn = tuple(map(flipped, grads))
            arrived[node] = sum(_energy(g) for g in drawn if g is not None)
            return drawn

        return hook

    def behind(node: Node) -> Any:
        def hook(grad_inputs: Any, grad_outputs: Any) -> None:
            passed[node] = [0.0 if g is None else _energy(g) for g in grad_inputs]

        return hook

    for node in nodes:
        if not hasattr(node, "variable"):
            hooks += [node.register_prehook(before(node)), node.register_hook(behind(node))]
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    gains: dict[Node, float] = {}
    for node in nodes:
        if hasattr(node, "variable"):
            gains[node] = float(id(node.variable) in parameters)
    todo = [n for n in nodes if n not in gains]
    while todo:
        node = todo[-1]
        edges = [(i, n) for i, (n, _) in enumerate(node.next_functions) if n is not None]
        if missing := [n for _, n in edges if n not in gains]:
            todo += missing
            continue
        todo.pop()
        energies, total = passed.get(node, []), arrived.get(node, 0.0)
        shares = [energies[i] * gains[n] for i, n in edges if i < len(energies)]
        gains[node] = sum(shares) / total if total > 0 else 0.0
    return gains
