"""Of tied weights, the gradient of the lookup is added into that of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dropit_fx.compile.lookups import AddLookups
from dropit_fx.measure import peak_memory

aten = torch.ops.aten
CLASSES, WIDTH = 40, 4
ROWS, IDS = torch.randn(6, WIDTH), torch.tensor([[3, 39, 3], [0, 7, 3]])
VALUES = torch.randn(2, 3, WIDTH)


def head(rows: Tensor) -> Tensor:
    """The gradient of the weight of a fused head."""
    weight = torch.ones(CLASSES, WIDTH, dtype=rows.dtype)
    none, lse = rows.new_zeros(0), rows.new_ones(6)
    given = (none, lse, none, none, rows, weight, None, None, None, lse, [], [], rows.dtype)
    return torch.ops.dropit.linear_rows_backward(*given, [False, True, False, False])[1]


def zeros(rows: Tensor) -> Tensor:
    return torch.full((CLASSES, WIDTH), 0, dtype=rows.dtype)


def put(rows: Tensor, ids: Tensor, values: Tensor, accumulate: bool = True) -> Tensor:
    return aten.index_put(zeros(rows), [ids], values, accumulate)


def masked(rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    mask = (ids != 7).unsqueeze(-1)
    return aten._unsafe_masked_index_put_accumulate(zeros(rows), mask, [ids], values)


Gradient = Callable[[Tensor, Tensor, Tensor], Any]
ADDED: dict[str, Gradient] = {
    "put": lambda r, i, v: head(r) + put(r, i, v),
    "other way round": lambda r, i, v: put(r, i, v) + head(r),
    "padding": lambda r, i, v: head(r) + masked(r, i, v),
    "two lookups": lambda r, i, v: head(r) + masked(r, i, v) + put(r, i, 2 * v),
}


def read_twice(rows: Tensor, ids: Tensor, values: Tensor) -> Any:
    grad = head(rows)
    return grad + put(rows, ids, values), grad.sum()


def lookup_read_twice(rows: Tensor, ids: Tensor, values: Tensor) -> Any:
    grad = put(rows, ids, values)
    return head(rows) + grad, grad.sum()


KEPT: dict[str, Gradient] = {
    "the head is read twice": read_twice,
    "the lookup is read twice": lookup_read_twice,
    "bfloat16": lambda r, i, v: head(r.bfloat16()) + put(r.bfloat16(), i, v.bfloat16()),
    "another dtype": lambda r, i, v: head(r) + put(r.double(), i, v.double()),
    "overwriting": lambda r, i, v: head(r) + put(r, i, v, False),
    "no fused head": lambda r, i, v: torch.ones(CLASSES, WIDTH) + put(r, i, v),
    "scaled": lambda r, i, v: torch.add(head(r), put(r, i, v), alpha=2),
    "on ones": lambda r, i, v: head(r) + aten.index_put(zeros(r) + 1, [i], v, True),
}


def traced(gradient: Gradient, rewrite: bool = True) -> fx.GraphModule:
    made = make_fx(gradient, tracing_mode="fake")(ROWS, IDS, VALUES)
    if rewrite:
        AddLookups()(made.graph)
    made.graph.eliminate_dead_code()
    made.graph.lint()
    made.recompile()
    return made


def whole(graph: fx.Graph) -> int:
    """How many tensors of zeros there are, as large as the weight."""
    made = graph.find_nodes(op="call_function", target=aten.full.default)
    return len([n for n in made if list(n.args[0]) == [CLASSES, WIDTH] and n.args[1] == 0])


@pytest.mark.parametrize("name", ADDED)
def test_what_was_looked_up_is_added_into_the_gradient_of_the_head(name: str) -> None:
    made = traced(ADDED[name])
    assert not whole(made.graph)
    assert not made.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    expected = ADDED[name](ROWS, IDS, VALUES)
    torch.testing.assert_close(made(ROWS, IDS, VALUES), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KEPT)
def test_other_sums_are_left_as_they_are(name: str) -> None:
    made, plain = traced(KEPT[name]), traced(KEPT[name], rewrite=False)
    assert [n.target for n in made.graph.nodes] == [n.target for n in plain.graph.nodes]


class Tied(nn.Module):
    """Looked up twice, once with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40_000, 16))
        self.inner = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        h = F.embedding(ids, self.weight) + F.embedding(ids.flip(0), self.weight, padding_idx=3)
        return F.cross_entropy(F.linear(self.inner(h), self.weight), ids)


def test_a_compiled_step_makes_one_gradient_of_a_tied_weight() -> None:
    """Its peak: at the end of the backward there would be two, or with two lookups three."""
    model, ids = Tied(), torch.tensor([3, 3, 3, 5, 39_999, 0, 3, 17])
    model(ids).backward()
    dense = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        run = torch.compile(model, backend="dropit", options={"preset": "lossless"})
        run(ids).backward()
        for p, expected in zip(model.parameters(), dense, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)
        assert peak_memory(run, ids) < 1.6 * model.weight.nbytes
