"""Modules that stand in a model more than once: one tensor, however many ways lead to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropit_fx
from dropit_fx.capture.fake import fake_state, held
from dropit_fx.measure import saved_bytes
from dropit_fx.private import FakeTensorMode


class Behind(nn.Module):
    """Holds a module that may be another's too."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x)
        return out + x


class Owner(nn.Module):
    """Its own module is one of its blocks', as position encodings are."""

    def __init__(self, part: nn.Module, blocks: int) -> None:
        super().__init__()
        self.part = part
        self.blocks = nn.ModuleList(Behind(part) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


class TiedWeights(nn.Module):
    """Two modules with one weight, one of which stands here twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)).relu())


def conv(**how: Any) -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1, **how)


def twice(part: nn.Module) -> nn.Module:
    return nn.Sequential(part, nn.ReLU(), part)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a layer": lambda: twice(nn.Linear(8, 8)),
    "a convolution": lambda: twice(conv(groups=4)),
    "a norm with buffers": lambda: twice(nn.BatchNorm2d(4)),
    "a module with a layer": lambda: twice(Behind(nn.Linear(8, 8))),
    "a layer of two modules": lambda: (
        lambda part: nn.Sequential(Behind(part), nn.GELU(), Behind(part))
    )(nn.Linear(8, 8)),
    "the root's and a block's": lambda: Owner(conv(), 1),
    "the root's and two blocks'": lambda: Owner(conv(), 2),
    "tied weights": TiedWeights,
}


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_more_than_once_is_trained_as_in_the_dense_model(name: str) -> None:
    model, x = MODELS[name](), torch.randn(3, 4, 8, 8)
    before = {n: (id(t), t.detach().clone()) for n, t in model.state_dict(keep_vars=True).items()}
    made = dropit_fx.transform(model, preset="lossless", example_args=(x,))
    for n, t in model.state_dict(keep_vars=True).items():
        assert (id(t), True) == (before[n][0], torch.equal(t, before[n][1]))
    assert dropit_fx.report(made).kept_bytes == saved_bytes(made, x)
    found = []
    for run in (model, made):
        model.load_state_dict({n: t for n, (_, t) in before.items()})
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        found.append(
            [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    assert len(found[0]) == 1 + len(list(model.parameters()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_on_fakes_puts_every_tensor_back(name: str) -> None:
    model = MODELS[name]()
    before = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    with fake_state(model, FakeTensorMode()):
        inside = {n: id(t) for n, t in held(model).items()}
        assert not set(before.values()) & set(inside.values())
        assert len(set(inside.values())) == len(set(before.values()))
    assert before == {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}


class Listed(nn.Module):
    """A batch norm that is called under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.norms = nn.ModuleList([self.norm])
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(self.norms[0](x)).tanh())
        return out


def test_a_batch_norm_of_two_names_serves_both_modes() -> None:
    model, x = Listed(), torch.randn(8, 16)
    packed = dropit_fx.transform(model, example_args=(x,), preset="lossless")
    for training in (True, False):
        assert torch.equal(packed.train(training)(x), model.train(training)(x))
    assert int(model.norm.num_batches_tracked) == 4  # the two calls of each model, in training
