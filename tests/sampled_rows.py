"""A sum over rows, estimated from some of them: the layers that do, and the theory's variance."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_calls import T, case, graph_of, pack_graph, run
from torch import Tensor, fx

from dropit_fx.passes.plan import Plan


def config(**options: Any) -> dict[str, Any]:
    return {"preset": None, "force": True, "rules": [{"codec": "rows", **options}]}


def packed_linear(x: Tensor, w: Tensor, **options: Any) -> tuple[fx.GraphModule, Plan]:
    call = case("linear", T(tuple(x.shape)), T(tuple(w.shape)))
    return pack_graph(graph_of(F.linear, call), [x, w.requires_grad_()], config(**options))


def weight_gradient(layer: Any, x: Tensor, w: Tensor, seed: int = 3) -> Tensor:
    """For ``cotangent`` of the result."""
    grad = run(layer, [x, w.requires_grad_()], seed)[1][1]
    assert grad is not None
    return grad


def skewed(rows: int, width: int) -> Tensor:
    """Rows of which some are much larger than others."""
    sizes = torch.logspace(-1.5, 1, rows)[torch.randperm(rows)]
    return torch.randn(rows, width) * sizes[:, None]


def chances(sizes: Tensor, count: int) -> Tensor:
    """The chance of each row, by the fixed point that defines it; not as the kernel finds it."""
    sure = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        rest = sizes.masked_fill(sure, 0)
        found = torch.where(sure, 1.0, rest / rest.sum() * (count - sure.sum()))
        if not (found > 1).any():
            return found
        sure |= found > 1


def hajek(x: Tensor, dy: Tensor, chance: Tensor) -> float:
    """The variance of a sample of fixed size without repetition (Hajek 1964); exact if uniform."""
    return hajek_of(torch.einsum("no,ni->noi", dy, x).flatten(1), chance)


def hajek_of(products: Tensor, chance: Tensor) -> float:
    """As ``hajek``, of what each row adds to the sum: (rows, ...)."""
    drawn = chance < 1
    pi = chance[drawn].double()[:, None]
    expanded = products[drawn].double() / pi
    share = pi * (1 - pi) * len(pi) / (len(pi) - 1)
    centre = (share * expanded).sum(0) / share.sum()
    return float((share * (expanded - centre).square()).sum())


def with_replacement(x: Tensor, dy: Tensor, sizes: Tensor, count: int, winners: bool) -> float:
    """The variance of column-row sampling; with winners, of WTA-CRS as it was published."""
    order = sizes.argsort(descending=True)
    x, dy, p = x[order].double(), dy[order].double(), (sizes[order] / sizes.sum()).double()
    tail = p.flip(0).cumsum(0).flip(0)
    first = int((tail[:count] / torch.arange(count, 0, -1)).argmin()) if winners else 0
    squares = x.square().sum(1) * dy.square().sum(1)
    whole = (dy[first:].t() @ x[first:]).square().sum()
    spread = (squares[first:] * tail[first] / p[first:]).sum() - whole
    return float(spread / (count - first))


def hajek_of_uniform(x: Tensor, dy: Tensor, count: int) -> float:
    """As ``hajek``, without all the products."""
    squares = float((x.square().sum(1) * dy.square().sum(1)).sum())
    around = squares - float((dy.t() @ x).square().sum()) / len(x)
    return (len(x) - count) / count * len(x) / (len(x) - 1) * around
