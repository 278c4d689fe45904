"""checkpoint_contexts: what a plan keeps whole is saved, the rest computed again, to the bit."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import dropit_fx
from dropit_fx.selective import IGNORED, saved_ops

KEEP_TANH = {"rules": [{"op": "tanh", "codec": "keep"}], "preset": "balanced"}


class Block(nn.Module):
    """Some of everything: a residual, a norm, chance, views."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(self.norm(x)))
        h = self.drop(h.reshape(-1, 256)).reshape(h.shape)
        return x + self.drop(self.two(h))


class Blocks(nn.Module):
    """Two of them, of which the steps may checkpoint each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 8)
        self.contexts: dict[int, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            how = self.contexts.get(number)
            x = (
                block(x)
                if how is None
                else checkpoint(block, x, use_reentrant=False, context_fn=how)
            )
        return self.head(x)


class Seen(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += func not in IGNORED
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, x: Tensor, seen: Seen | None = None) -> list[Tensor]:
    """The gradients; ``seen`` counts what the backward runs."""
    model.zero_grad()
    torch.manual_seed(3)
    with set_checkpoint_early_stop(False):  # else what no backward reads is not run again
        loss = model(x).square().mean()
    with seen or torch.enable_grad():
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def config_of(text: Any) -> dropit_fx.Config:
    return dropit_fx.load_config(text)


def test_what_is_not_kept_whole_is_what_runs_again_and_gradients_keep_their_bits() -> None:
    model, x = Blocks(), torch.randn(32, 16, 64)
    plain = Seen()
    exact = step(model, x, plain)
    planned = dropit_fx.plan(model, x, peak="80%", device="h100")
    for config in (planned, config_of(KEEP_TANH)):
        model.contexts = {}
        ops = saved_ops(model, config, (x,))
        names = [f"blocks.{number}" for number in range(2)]
        made = [dropit_fx.checkpoint_contexts(model, config, (x,), module=n) for n in names]
        model.contexts = dict(enumerate(made))
        again = Seen()
        assert all(map(torch.equal, step(model, x, again), exact))
        inside = [op for op in ops if op.module.startswith("blocks.")]
        computed = Counter(op.name for op in inside if not op.saved)
        assert computed
        assert again.ops - plain.ops == computed
        assert not plain.ops - again.ops


def test_what_is_kept_is_saved_and_what_is_random_is_not() -> None:
    model, x = Blocks(), torch.randn(32, 16, 64)
    ops = saved_ops(model, config_of(KEEP_TANH), (x,))
    saved = Counter(op.name for op in ops if op.saved)
    assert saved["aten.tanh.default"] == 2
    assert not any("dropout" in name or "bernoulli" in name or "div_" in name for name in saved)
    nothing = saved_ops(model.eval(), config_of({"preset": "max"}), (x,))
    assert not any(op.saved for op in nothing if op.name == "aten.tanh.default")


def test_a_whole_model_and_a_forward_that_is_not_the_one_that_was_planned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))
    x = torch.randn(128, 64)
    contexts = dropit_fx.checkpoint_contexts(model, config_of(KEEP_TANH), (x,))
    for _ in range(2):  # a new count in each step
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        y.sum().backward()
    with pytest.raises(RuntimeError, match=r"op 1 of the checkpoint is aten\.mul.* was planned"):
        checkpoint(lambda x: model(2 * x), x, use_reentrant=False, context_fn=contexts)
    with pytest.raises(ValueError, match="no submodule"):
        dropit_fx.checkpoint_contexts(model, config_of(KEEP_TANH), (x,), module="none")
    model[0].unused = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="no op"):
        dropit_fx.checkpoint_contexts(model, config_of(KEEP_TANH), (x,), module="0.unused")
