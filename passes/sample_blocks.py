"""Before all: gradients of a block flow through some of its rows (Stochastic Backpropagation).

A rule ``backprop: SHARE`` names a block (arXiv 2203.16755, CVPR'22). It runs on all rows of its
input without saving anything, and once more on the rows that are drawn; the graph behind it reads
the value of the former and sends its gradient through the latter. Rows are the entries of one
dimension: samples or frames (``dim: 0``), tokens (``dim: 1`` of batch, tokens, width). So, with
kept rows S,

    dX_i = (dy/dx)^T dY_i for i in S, else 0,    dW = sum over S,

which are the gradients of dense where dY is 0 in all other rows; nothing is scaled.

That is right only for a block that makes each row of its result of that row alone. It is tried out:
with numbers at random in the place of inputs and parameters, in both modes, the block on some rows
must give those rows of what it gives on all.

Requires: a graph with real parameters, and fake inputs. Ensures: no node of such a block keeps
anything of the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dropit_fx.capture.fake import propagate
from dropit_fx.capture.provenance import first_line, node_modules, node_where
from dropit_fx.config import ConfigError
from dropit_fx.passes.find_saved import find_saved
from dropit_fx.passes.plan import Plan
from dropit_fx.private import EXAMPLE_VALUE
from dropit_fx.rules import BackpropRule
from dropit_fx.runtime.packed_call import by_mode
from dropit_fx.runtime.sampled_blocks import draw_rows, flow_through, kept_count
from dropit_fx.words import matches

# what sums in two orders differ by, of the norm
_CLOSE = {torch.bfloat16: 0.05, torch.float16: 0.01}


def sample_blocks(plan: Plan) -> Plan:
    """Rewrites ``plan.module`` in place; fills ``plan.sampled``, ``plan.blocks``, ``plan.unfused``.

    Raises:
        ConfigError: A block that a rule names mixes rows, draws random numbers, writes into
            something, or is called with more than one tensor.
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    blocks = list(_blocks(plan)) if plan.config.backprop else []
    if not blocks:
        return plan
    dense = find_saved(plan).sites
    values = propagate(plan.module, plan.inputs)
    for block in blocks:
        _try_out(block, plan.module, values[block.x.name])
    given: dict[fx.Node, fx.Node] = {}  # what a block gave, and what is read in its place
    for block in blocks:
        given[block.y] = _sample(plan.module, block._replace(x=given.get(block.x, block.x)))
    plan.module.graph.lint()
    plan.module.recompile()
    left = {site.name for site in find_saved(plan).sites if site.dense}
    gone = frozenset(site.name for site in dense if site.dense and site.name not in left)
    numbers = frozenset(block.rule.number for block in blocks)
    return replace(plan, unfused=dense, sampled=gone, blocks=numbers)


class _Block(NamedTuple):
    """A call of a module that a rule names."""

    rule: BackpropRule
    name: str
    span: tuple[fx.Node, ...]  # its nodes, up to what it gives
    x: fx.Node  # its input
    y: fx.Node  # what it gives: the last of the span
    looked_up: tuple[fx.Node, ...]  # parameters, buffers and modes that it reads

    def wrong(self, why: str, what: str = "") -> ConfigError:
        """The error that says why it cannot be sampled."""
        advice = what or "Name blocks in which each row is by itself, such as an MLP"
        return ConfigError(
            f"rule {self.rule.number} {self.rule}: block '{self.name}' {why}. {advice}."
        )


def _is_lookup(node: fx.Node) -> bool:
    """Whether a node reads an attribute, the mode, or what the mode chooses."""
    is_mode = node.op == "call_module" and not node.all_input_nodes
    return is_mode or node.op == "get_attr" or node.target is by_mode


def _blocks(plan: Plan) -> Iterator[_Block]:
    """Every call of a module that a rule names; the outermost, where one is in another."""
    calls: dict[str, tuple[BackpropRule, str, list[fx.Node]]] = {}
    for node in plan.module.graph.nodes:
        if node.op in ("placeholder", "output") or _is_lookup(node):
            continue
        for call, name in node_modules(node):
            rule = next((r for r in plan.config.backprop if matches(name, r.module)), None)
            if rule is not None:
                calls.setdefault(call, (rule, name, []))[2].append(node)
                break
    for rule, name, nodes in calls.values():
        span = dict.fromkeys(nodes)
        block = _Block(rule, name, tuple(nodes), nodes[0], nodes[-1], ())
        given = [n for n in nodes if any(u not in span for u in n.users)]
        if len(given) != 1:
            raise block.wrong(f"gives {len(given)} values, and a block gives one tensor")
        nodes = nodes[: nodes.index(given[0]) + 1]
        outside = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in span)
        inputs = [n for n in outside if not _is_lookup(n)]
        if len(inputs) != 1:
            names = ", ".join(f"'{n.name}'" for n in inputs) or "none"
            raise block.wrong(
                f"reads {len(inputs)} values from outside ({names}), and may read one"
            )
        looked_up = tuple(n for n in outside if _is_lookup(n))
        yield block._replace(span=tuple(nodes), x=inputs[0], y=given[0], looked_up=looked_up)


def _try_out(block: _Block, module: fx.GraphModule, like: Any) -> None:
    """Runs the block on random numbers, all rows and some, in both modes."""
    dim = block.rule.dim
    if not isinstance(like, Tensor) or not like.is_floating_point() or like.dim() <= dim:
        given = f"shape {tuple(like.shape)}" if isinstance(like, Tensor) else type(like).__name__
        what = "Name another block, or another dim"
        raise block.wrong(f"is given no rows of floats along dim {dim}, but {given}", what)
    sizes = [int(size) for size in like.shape]
    rows = sizes[dim]
    if rows < 2:
        what = "Give larger example inputs"
        raise block.wrong(f"is given {rows} row along dim {dim} by the example inputs", what)
    count = min(kept_count(rows, block.rule.share), rows - 1)
    chance = torch.Generator().manual_seed(0)

    def drawn(shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=chance).to(like.device, like.dtype)

    x = drawn(sizes, like)
    index = torch.randperm(rows, generator=chance)[:count].sort().values.to(like.device)
    for training in (True, False):
        known = {n: _random(module, n, training, drawn) for n in block.looked_up}
        before = {n: t.clone() for n, t in known.items() if isinstance(t, Tensor)}
        seen = x.clone()
        with torch.no_grad():
            whole = _run(block, module, known, seen)
            again = _run(block, module, known, x.clone())
            written = [n for n, t in before.items() if not torch.equal(t, known[n])]
            if written or not torch.equal(seen, x):
                name = written[0].target if written else "its input"
                raise block.wrong(f"writes into {name}", "Norms over a batch mix rows and do so")
            if not all(map(_same, whole, again)):
                node = next(
                    n for n, a, b in zip(block.span, whole, again, strict=True) if not _same(a, b)
                )
                what = "Set its dropout to 0, or name blocks without"
                raise block.wrong(f"draws random numbers ({_about(node)})", what)
            try:
                some = _run(block, module, known, x.index_select(dim, index))
            except Exception as error:
                why = (
                    f"does not run on {count} of {rows} rows along dim {dim} ({first_line(error)})"
                )
                raise block.wrong(why) from error
        if not _rows_of(whole[-1], some[-1], dim, index):
            found = zip(block.span, whole, some, strict=True)
            node = next((n for n, a, b in found if not _fits(a, b, index)), block.y)
            raise block.wrong(f"mixes rows along dim {dim}: see {_about(node)}")


def _random(module: fx.GraphModule, node: fx.Node, training: bool, drawn: Any) -> Any:
    """What is looked up: parameters at random, so that none of them hides what is behind it."""
    if node.op == "call_module":
        return training
    if node.target is by_mode:
        return node.args[1 if training else 2]
    value = attrgetter(str(node.target))(module)
    if not isinstance(value, Tensor):
        return value
    if not isinstance(value, nn.Parameter) or not value.is_floating_point():
        return value.detach().clone()
    scale = max(1, value[0].numel()) ** -0.5 if value.dim() > 1 else 1.0
    return drawn(value.shape, value) * scale


def _run(
    block: _Block, module: fx.GraphModule, known: Mapping[fx.Node, Any], x: Tensor
) -> list[Any]:
    """The values of the block's nodes."""
    run = fx.Interpreter(module, garbage_collect_values=False)
    run.env = {**known, block.x: x}
    found = []
    for node in block.span:
        run.env[node] = run.run_node(node)
        value = run.env[node]
        found.append(value.clone() if isinstance(value, Tensor) else value)
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    return True


def _rows_of(whole: Any, some: Any, dim: int, index: Tensor) -> bool:
    """Whether ``some`` are these rows of ``whole``."""
    if not isinstance(whole, Tensor) or not isinstance(some, Tensor) or whole.dim() <= dim:
        return not isinstance(whole, Tensor)
    if whole.shape[:dim] != some.shape[:dim] or whole.shape[dim + 1 :] != some.shape[dim + 1 :]:
        return False
    if len(index) != some.shape[dim] or int(index[-1]) >= whole.shape[dim]:
        return False
    expected = whole.index_select(dim, index).double()
    away = (some.double() - expected).norm()
    return bool(away <= _CLOSE.get(whole.dtype, 1e-4) * expected.norm())


def _fits(whole: Any, some: Any, index: Tensor) -> bool:
    """Whether ``some`` are such rows of ``whole`` along any dimension, or the same."""
    if not isinstance(whole, Tensor) or not isinstance(some, Tensor):
        return True
    same = whole.shape == some.shape and _same(whole, some)
    return same or any(_rows_of(whole, some, d, index) for d in range(whole.dim()))


def _about(node: fx.Node) -> str:
    where = node_where(node)
    return f"'{node.name}'" + (f", {where}" if where else "")


def _sample(module: fx.GraphModule, block: _Block) -> fx.Node:
    """Writes the block twice: on all rows, detached, and on those that are drawn."""
    graph, x, y, dim = module.graph, block.x, block.y, block.rule.dim
    trained = [n for n in block.looked_up if _wants_gradient(module, n)]
    detached: dict[fx.Node, fx.Node] = {}

    def made(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {k: v for k, v in y.meta.items() if k != EXAMPLE_VALUE}
        return node

    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in trained:  # the draw asks all of them whether they want a gradient
        if order[node] > order[block.span[0]]:
            block.span[0].prepend(node)
    with graph.inserting_before(block.span[0]):
        index = made(draw_rows, x, tuple(trained), block.rule.share, dim)
        some = made(torch.index_select, x, dim, index)
        for node in (x, *trained):
            detached[node] = made(torch.detach, node)
    copies = {x: some}
    behind = y
    for node in block.span:
        with graph.inserting_after(behind):
            copies[node] = behind = graph.node_copy(node, lambda n: copies.get(n, n))
        behind.meta = {k: v for k, v in node.meta.items() if k != EXAMPLE_VALUE}
    with graph.inserting_after(behind):
        out = made(flow_through, y, copies[y], index, dim)
    for node in block.span:
        for before, after in detached.items():
            node.replace_input_with(before, after)
    inside = {*block.span, *copies.values(), out}
    y.replace_all_uses_with(out, delete_user_cb=lambda user: user not in inside)
    return out


def _wants_gradient(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    return isinstance(attrgetter(str(node.target))(module), nn.Parameter)
