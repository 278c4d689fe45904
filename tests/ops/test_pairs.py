"""Every op of one tensor behind every other, in all spellings, between two linear layers.

The pairs with one first op are branches of one graph: each has layers and a result of its own, so
that a wrong one is known by its place. Where an op can be written in several ways, the ways take
turns, and each meets many others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import BEFORE_2_14, LOSSLESS, cotangent, pack_graph, writes
from op_cases import BESIDE, RECORDS, complaints
from op_record import Behind, Given, RowTests
from torch import Tensor, fx
from torch.fx.node import map_arg

from dropit_fx.measure import saved_tensors
from dropit_fx.ops.table import OP_RULES, SAVES_NOTHING
from dropit_fx.passes.find_saved import NUMBER
from dropit_fx.report.rows import Report, rows

BALANCED = {"preset": "balanced"}
CONFIGS = (LOSSLESS, BALANCED)
KNOWN: dict[str, RowTests] = RECORDS | BESIDE
COLUMNS = torch.tensor([1, 0, 1])


@dataclass(frozen=True)
class Op:
    """One op in the spellings that write into their input, or in the others."""

    row: str
    behind: Behind
    in_place: bool
    spellings: tuple[tuple[Any, dict[str, Any]], ...]  # targets and settings

    def __str__(self) -> str:
        return self.row + "_" * self.in_place


def ops() -> list[Op]:
    """Of every row with one tensor; in place too, where it can be written so."""
    found = []
    for rule in (*OP_RULES, *SAVES_NOTHING):
        behind = KNOWN[rule.name].behind if rule.name in KNOWN else None
        if not isinstance(behind, Behind):
            continue
        targets = [t for t in rule.targets if not behind.spellings or t in behind.spellings]
        for in_place in (False, True):
            spelled = [(t, {}) for t in targets if writes(t) == in_place]
            first = rule.targets[0]
            if in_place and isinstance(first, FunctionType) and "inplace" in arguments_of(first):
                spelled.append((first, {"inplace": True}))
            if spelled:
                found.append(Op(rule.name, behind, in_place, tuple(spelled)))
    return found


def arguments_of(function: FunctionType) -> tuple[str, ...]:
    code = getattr(function, "__wrapped__", function).__code__
    return code.co_varnames[: code.co_argcount]


class Graph:
    """A graph and the values of its nodes, while it is built."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.leaves: list[Tensor] = []

    def leaf(self, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"t{len(self.leaves)}")
        self.values[node] = tensor
        self.leaves.append(tensor)
        return node

    def run(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = create(target, args, kwargs)
        given = map_arg(args, self.values.__getitem__)
        function = getattr(given[0], target) if isinstance(target, str) else target
        with torch.no_grad():
            value = function(*(given[1:] if isinstance(target, str) else given), **kwargs)
        self.values[node] = value
        return node

    def apply(self, op: Op, turn: int, h: fx.Node) -> fx.Node:
        """``op`` over ``h``, in one of its spellings."""
        target, settings = op.spellings[turn % len(op.spellings)]
        h = self.of_dimensions(op.behind.dims, h)
        makers = {
            Given.X: lambda: h,
            Given.MASK: lambda: self.run(torch.gt, h, 0),
            Given.NUMBER: lambda: self.run(torch.tensor, 0.5),
            Given.INDEX: lambda: self.leaf(COLUMNS),
            Given.INDICES: lambda: self.leaf(self.columns_of_each_row(h)),
            Given.TURNED: lambda: self.run("transpose", h, -1, -2),
            Given.WIDTH: lambda: [self.values[h].shape[-1]],
        }
        known = op.behind.args
        args = known(target) if callable(known) else known
        return self.run(
            target, *[makers[a]() if isinstance(a, Given) else a for a in args], **settings
        )

    def columns_of_each_row(self, h: fx.Node) -> Tensor:
        return COLUMNS.expand(*self.values[h].shape[:-1], 3).contiguous()

    def of_dimensions(self, count: int, h: fx.Node) -> fx.Node:
        dims = self.values[h].dim()
        if dims == count:
            return h
        return self.run("flatten", h, 0, 1) if dims > count else self.run("unsqueeze", h, 0)

    def linear(self, h: fx.Node, generator: torch.Generator) -> fx.Node:
        x = self.values[h]
        shape = (8, x.shape[-1])
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
        bias = torch.rand(8, generator=generator, dtype=torch.float64)
        leaves = [self.leaf(t.to(x.dtype).requires_grad_()) for t in (weight, bias)]
        return self.run(F.linear, h, *leaves)


Pair = tuple[Op, Op, int]  # first, second, whose turn it is

# Its fake kernel returns the logarithms of float64 in float32.
FAKE_IS_WRONG = [["to", "scaled_dot_product_attention"]] if BEFORE_2_14 else []


def pairs(first: int) -> list[Pair]:
    every = ops()
    found = [(every[first], second, first + i) for i, second in enumerate(every)]
    return [p for p in found if [op.row for op in p[:2]] not in FAKE_IS_WRONG]


@dataclass
class Branches:
    """A graph with a branch for each pair."""

    pairs: list[Pair]
    module: fx.GraphModule
    leaves: list[Tensor]


def branches_of(wanted: list[Pair], apart: bool = False) -> Branches:
    """``apart``: the second op gets a copy of what the first has made."""
    build, generator, results = Graph(), torch.Generator().manual_seed(7), []
    x = build.leaf(torch.randn(2, 4, 6, 8, generator=generator))
    for first, second, turn in wanted:
        h = build.apply(first, turn, build.linear(x, generator))
        h = build.run("clone", h) if apart else h
        h = build.apply(second, turn // 3, h)
        results.append(build.linear(h, generator))
    for node in reversed(build.graph.find_nodes(op="placeholder")):
        build.graph._root.append(node)
    build.graph.output(tuple(results))
    return Branches(wanted, fx.GraphModule({}, build.graph), build.leaves)


def step(function: Callable[..., Any], branches: Branches) -> list[Any]:
    """Of each branch the result and its gradients, or the error in their place."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in branches.leaves]
    torch.manual_seed(3)
    found: list[Any] = []
    wanted = [t for t in leaves if t.requires_grad]
    for i, out in enumerate(function(*leaves)):
        try:
            mine = wanted[4 * i : 4 * i + 4]
            found.append([out.detach(), *torch.autograd.grad(out, mine, cotangent(out))])
        except RuntimeError as error:
            found.append([out.detach(), error])
    return found


def name_of(pair: Pair) -> str:
    first, second, turn = pair
    spelled = (
        first.spellings[turn % len(first.spellings)],
        second.spellings[turn // 3 % len(second.spellings)],
    )
    return f"{second} after {first}, as {spelled}"


def packed_of(branches: Branches, config: Any) -> tuple[fx.GraphModule, Report]:
    packed, plan = pack_graph(branches.module, branches.leaves, config)
    return packed, Report(tuple(rows(plan)))


def kept_by(function: Callable[[], Any]) -> int:
    """What is measured, less the Python numbers that autograd has wrapped.

    Where an op writes into a view (what a linear layer returns is one), PyTorch holds them where
    nobody sees them.
    """
    every = saved_tensors(function)
    return sum(t.nbytes for t in every if t.shape or t.dtype != torch.float64)


def said_of(reports: list[Report]) -> tuple[int, int]:
    every = [row for report in reports for row in report.rows if row.reason != NUMBER]
    return sum(r.dense_bytes for r in every), sum(r.kept_bytes for r in every)


def crashes(wanted: list[Pair]) -> list[str]:
    """The pairs that cannot be packed."""
    try:
        for config in CONFIGS:
            packed_of(branches_of(wanted), config)
    except Exception as error:
        if len(wanted) == 1:
            return [f"{name_of(wanted[0])}: {type(error).__name__}: {error}"]
        half = len(wanted) // 2
        return crashes(wanted[:half]) or crashes(wanted[half:])
    return []


def wrong_bytes(wanted: list[Pair], config: Any) -> list[str]:
    """One of the pairs of which the report does not say what is kept."""
    branches = branches_of(wanted)
    packed, told = packed_of(branches, config)
    said = said_of([told])
    measured = tuple(kept_by(partial(f, *branches.leaves)) for f in (branches.module, packed))
    if measured == said:
        return []
    if len(wanted) == 1:
        return [f"{name_of(wanted[0])}: said {said}, kept {measured}"]
    half = len(wanted) // 2
    return wrong_bytes(wanted[:half], config) or wrong_bytes(wanted[half:], config)


def same(a: Any, b: Any, rounds: bool) -> bool:
    if rounds:  # a backward may add large numbers up to small ones
        scale = max(1.0, float(b.nan_to_num(0.0).abs().amax())) if b.numel() else 1.0
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6 * scale, equal_nan=True)
    return torch.equal(a, b) or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def compared(pair: Pair, found: list[Any], dense: list[Any], exact: bool) -> str:
    """What is wrong with a branch, or ``""``."""
    if found[0].dtype != dense[0].dtype or not same(found[0], dense[0], False):
        return "another result"
    if isinstance(dense[1], Exception):  # a gradient would need what the second op has overwritten
        if isinstance(found[1], Exception) or not exact:
            return ""
        apart = branches_of([pair], apart=True)
        (dense,) = step(apart.module, apart)
        (found,) = step(packed_of(branches_of([pair]), LOSSLESS)[0], apart)
    if isinstance(found[1], Exception):
        return f"its backward fails: {found[1]}"
    rounds = any(op.in_place and KNOWN[op.row].rounds_in_place for op in pair[:2])
    # into the memory of a view, dense, goes a copy of what attention hands back: other strides
    rounds |= pair[0].in_place and pair[1].behind.by_strides
    if exact and not all(same(a, b, rounds) for a, b in zip(found[1:], dense[1:], strict=True)):
        return "another gradient"
    return ""


def test_every_row_has_its_arguments_here() -> None:
    found = complaints(["behind"])
    assert not found, "\n".join(found)


CHUNKS = 9
# A quarter of them; `make whole` tries them all.
WHOLE = bool(os.environ.get("DROPIT_WHOLE"))


@pytest.mark.parametrize("number", range(CHUNKS))
def test_every_op_behind_every_other(number: int) -> None:
    firsts = range(number, len(ops()), CHUNKS)
    batches = [[p for p in pairs(i) if WHOLE or p[2] % 4 == 0] for i in firsts]
    built = [branches_of(wanted) for wanted in batches]
    dense = [step(b.module, b) for b in built]
    expected = kept_by(lambda: [b.module(*b.leaves) for b in built])
    wrong: list[str] = []
    for config in CONFIGS:
        try:
            made = [packed_of(b, config) for b in built]
        except Exception:
            pytest.fail("\n".join(w for b in batches for w in crashes(b)))
        for b, exact, (packed, _) in zip(built, dense, made, strict=True):
            for pair, *results in zip(b.pairs, step(packed, b), exact, strict=True):
                what = compared(pair, *results, config is LOSSLESS)
                wrong += [f"{name_of(pair)}: {what}"] if what else []
        said = said_of([report for _, report in made])
        measured = kept_by(
            lambda made=made: [p(*b.leaves) for (p, _), b in zip(made, built, strict=True)]
        )
        if said != (expected, measured):
            wrong += [w for b in batches for w in wrong_bytes(b, config)] or [f"said {said}"]
    assert not wrong, "\n".join(wrong)
