"""A model's own hooks: what they make of its inputs, and what they keep, is told as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit_fx import report, transform
from dropit_fx.measure import saved_bytes

Hook = Callable[..., Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def hooked(kind: str, hook: Hook, **how: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    getattr(model, f"register_forward_{kind}")(hook, **how)
    return model


def batch(needs_grad: bool = False) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(128, 64, requires_grad=needs_grad)


def grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(2)
    loss = model(x).square().sum()
    return list(torch.autograd.grad(loss, [*model.parameters()]))


BEFORE: dict[str, Hook] = {
    "other values": lambda m, args: args[0].exp(),
    "a product with a number": lambda m, args: (args[0] * 2,),
    "a larger batch": lambda m, args: (torch.cat([args[0], args[0]]),),
    "another dtype between": lambda m, args: (args[0].double().float(),),
    "chance": lambda m, args: (F.dropout(args[0], 0.1),),
    "a view": lambda m, args: (args[0].view(2, 64, 64),),
    "a leaf": lambda m, args: (args[0].detach(),),
    "a parameter of the model": lambda m, args: (args[0] * m.layers.get_parameter("0.weight")[0],),
    "nothing": lambda m, args: None,
}
BEHIND: dict[str, Hook] = {
    "other values": lambda m, args, out: torch.tanh(out),
    "two reads": lambda m, args, out: F.gelu(out) * out,
    "a product with the input": lambda m, args, out: out.sum() * args[0],
    "nothing": lambda m, args, out: None,
}
CASES = [("pre_hook", hook) for hook in BEFORE.values()]
CASES += [("hook", hook) for hook in BEHIND.values()]
NAMES = [f"before: {name}" for name in BEFORE] + [f"behind: {name}" for name in BEHIND]


@pytest.mark.parametrize("needs_grad", [False, True], ids=["data", "input with a gradient"])
@pytest.mark.parametrize(("kind", "hook"), CASES, ids=NAMES)
def test_what_hooks_make_and_keep_is_told(kind: str, hook: Hook, needs_grad: bool) -> None:
    model, x = hooked(kind, hook), batch(needs_grad)
    for preset in ("balanced", "lossless"):
        made = transform(model, preset=preset, example_args=(x,))
        assert report(made).dense_bytes == saved_bytes(model, x)
        assert report(made).kept_bytes == saved_bytes(made, x)
    for ours, theirs in zip(grads(made, x), grads(model, x), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_hook_has_made_is_packed() -> None:
    x = batch()
    made = transform(hooked("pre_hook", BEFORE["other values"]), example_args=(x,))
    row = next(r for r in report(made).rows if r.dense_bytes == x.nbytes)
    assert row.codec != "keep"
    assert row.kept_bytes < x.nbytes / 4


def test_what_a_hook_keeps_is_named() -> None:
    made = transform(hooked("hook", BEHIND["other values"]), example_args=(batch(),))
    (row,) = [r for r in report(made).rows if "hook" in r.reason]
    assert __file__ in row.reason


def test_hooks_with_keyword_inputs() -> None:
    def wider(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (), {"x": torch.cat([kwargs["x"]] * 2)}

    x = batch()
    model = hooked("pre_hook", wider, with_kwargs=True)
    made = transform(model, example_kwargs={"x": x})
    assert report(made).dense_bytes == saved_bytes(model, x=x)
    assert report(made).kept_bytes == saved_bytes(made, x=x)


def test_hooks_of_a_submodule_that_is_rewritten_alone() -> None:
    x = batch()
    model = nn.Sequential(nn.Linear(64, 64), hooked("pre_hook", BEFORE["a larger batch"]))
    dense = saved_bytes(model, x)
    made = transform(model, modules="1", example_args=(x,))
    assert report(made).dense_bytes == dense
    assert report(made).kept_bytes == saved_bytes(made, x)


def test_hooks_leave_nothing_behind() -> None:
    seen: list[Tensor] = []

    def notes(module: nn.Module, args: Any) -> None:
        seen.append(args[0])

    transform(hooked("pre_hook", notes), example_args=(batch(),))
    assert not seen


def test_hooks_that_ask_for_values_are_not_counted(caplog: Any) -> None:
    def says(module: nn.Module, args: Any, out: Tensor) -> None:
        assert out.mean().item() < 1e3

    x, model = batch(), hooked("hook", says)
    with caplog.at_level(logging.WARNING):
        made = transform(model, example_args=(x,))
    assert "not counted" in caplog.text
    assert __file__ in caplog.text
    assert report(made).kept_bytes == saved_bytes(made, x)


GIVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf": lambda x: x,
    "a view of a leaf": lambda x: x.view(2, 64, 64),
    "what an op has made": lambda x: x * 2,
    "a view of what an op has made": lambda x: (x * 2).view(2, 64, 64),
}


@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN.keys())
def test_inputs_are_told_as_they_are_measured(give: Callable[[Tensor], Tensor]) -> None:
    model, x = Net(), give(batch(needs_grad=True))
    for preset in ("balanced", "lossless"):
        made = transform(model, preset=preset, example_args=(x,))
        assert report(made).dense_bytes == saved_bytes(model, x)
        assert report(made).kept_bytes == saved_bytes(made, x)
