"""What a model computes of tensors of its own is computed in each call, as the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropit_fx import transform

Between = Callable[[Any, Tensor], Tensor]
WIDTH = 8
ELSEWHERE = torch.linspace(-1, 1, WIDTH)  # in no module


class Net(nn.Module):
    """Two linears, and tensors that are neither parameters nor buffers."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between
        self.table = torch.linspace(0.1, 1, WIDTH)
        self.several = [torch.ones(WIDTH), torch.full((WIDTH,), 2.0)]
        self.weight = torch.ones(WIDTH, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))

    def own(self) -> list[Tensor]:
        return [self.table, *self.several, self.weight, ELSEWHERE]


def net(between: Between) -> Net:
    torch.manual_seed(0)
    return Net(between)


X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def parts(model: Any, h: Tensor) -> Tensor:
    front, back = model.table.chunk(2)
    return h * torch.cat([back, front])


def rows(model: Any, h: Tensor) -> Tensor:
    return h * sum(row.square() for row in torch.stack(model.several))


def without_gradients(model: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        offset = (ELSEWHERE.exp() * 2).T
        places = torch.arange(WIDTH).float()
        places[2:] = 1.0
    return h + offset * places


def chosen(model: Any, h: Tensor) -> Tensor:
    return torch.where(ELSEWHERE > 0.5, h, 1 - model.table)


def copy_written_to(model: Any, h: Tensor) -> Tensor:
    table = model.table.clone()
    table += h.mean()
    table[0] = 3.0
    table[2:4].mul_(2)
    return h * table


def sized(model: Any, h: Tensor) -> Tensor:
    table = model.table.sin()
    largest = table.max(0)
    return h / len(table) * largest.values + largest.indices * table.shape[0]


def products(model: Any, h: Tensor) -> Tensor:
    table = model.table
    return h * (table @ table) + torch.einsum("i,i->", table, model.several[1]) * 2**table


def in_a_size_of_the_input(model: Any, h: Tensor) -> Tensor:
    if h.shape[0] < 1:  # no symbolic trace decides that: torch.export does
        return h
    return h * model.table.exp().to(h.dtype).view(1, -1).expand(h.shape[0], -1)


CASES: tuple[Between, ...] = (
    lambda model, h: h * model.table.exp(),
    lambda model, h: h * model.weight.exp(),
    parts,
    rows,
    without_gradients,
    chosen,
    copy_written_to,
    sized,
    products,
    in_a_size_of_the_input,
)


@pytest.mark.parametrize("between", CASES, ids=lambda f: f.__name__)
def test_writes_between_calls_are_followed(between: Between) -> None:
    model = net(between)
    before = [t.clone() for t in model.own()]
    made = transform(model, example_args=(X,), preset="lossless")
    assert all(map(torch.equal, before, model.own())), "the trace wrote into the model"
    assert [t.grad for t in model.own()] == [None] * len(before)
    for _ in range(3):
        for module in (model, made):
            model.zero_grad()
            model.weight.grad = None
            y = module(X)
            y.square().sum().backward()
            found = [y, *(p.grad for p in model.parameters()), model.weight.grad]
            if module is model:
                expected = found
        for a, b in zip(expected, found, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        with torch.no_grad():
            for tensor in model.own():
                tensor.mul_(1.25).add_(0.125)


def test_what_nothing_reads_is_not_computed() -> None:
    def sizes_alone(model: Any, h: Tensor) -> Tensor:
        return h * len(model.table.exp().repeat(2))

    made = transform(net(sizes_alone), preset="lossless")
    assert not [n for n in made.graph.nodes if n.target in ("exp", "repeat", torch.exp)]
