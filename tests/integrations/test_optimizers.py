"""Optimizers that save memory too: in few bits, of low rank, in the backward; beside packing."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure

STEPS = 8
Update = Callable[[], None]


def network() -> nn.Module:
    torch.manual_seed(0)

    def block(width: int) -> nn.Module:
        layers = nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, 64)
        return nn.Sequential(nn.LayerNorm(width), *layers)

    return nn.Sequential(nn.Linear(64, 64), block(64), nn.ReLU(), block(64), nn.LayerNorm(64))


def batch(step: int) -> Tensor:
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(step))


def split(model: nn.Module, **matrices: object) -> list[dict[str, object]]:
    """Two groups: matrices, with settings of their own, and the rest."""
    flat = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": flat},
        {"params": [p for p in model.parameters() if p.dim() == 2]} | matrices,
    ]


def apollo(model: nn.Module) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    how = {"proj": "random", "proj_type": "std", "scale_type": "channel", "scale": 1}
    made: torch.optim.Optimizer = APOLLOAdamW(
        split(model, rank=8, update_proj_gap=3, **how), lr=3e-3
    )
    return made


def galore(model: nn.Module) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    groups = split(model, rank=8, update_proj_gap=3, scale=1.0, proj_type="std")
    made: torch.optim.Optimizer = GaLoreAdamW(groups, lr=3e-3, no_deprecation_warning=True)
    return made


def eight_bit(model: nn.Module) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    # the first layer's weight has as many values
    made: torch.optim.Optimizer = AdamW8bit(model.parameters(), lr=3e-3, min_8bit_size=64 * 64)
    return made


def whole(optimizer: torch.optim.Optimizer) -> Update:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def in_backward(model: nn.Module) -> Update:
    """Each parameter is updated and its gradient let go as soon as the backward has it."""
    each = {p: torch.optim.AdamW([p], lr=3e-3) for p in model.parameters()}

    def hook(parameter: Tensor) -> None:
        each[parameter].step()  # type: ignore[index]
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)

    def nothing_left() -> None:
        assert all(p.grad is None for p in model.parameters())

    return nothing_left


OPTIMIZERS: dict[str, Callable[[nn.Module], Update]] = {
    "apollo": lambda model: whole(apollo(model)),
    "galore": lambda model: whole(galore(model)),
    "8 bits": lambda model: whole(eight_bit(model)),
    "in the backward": in_backward,
}


def packed(model: nn.Module, how: str, preset: str) -> nn.Module:
    if how == "transform":
        return dropit_fx.transform(model, preset=preset, example_args=(batch(0),))
    torch.compiler.reset()
    return torch.compile(model, backend="dropit_eager", options={"preset": preset})  # type: ignore[return-value]


def train(run: nn.Module, update: Update, steps: Iterable[int] = range(STEPS)) -> list[float]:
    """The losses of a model that learns to give its input back."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = (run(batch(step)) - batch(step)).square().mean()
        loss.backward()
        update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", ["transform", "dropit_eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lossless_steps_are_those_of_dense(name: str, how: str) -> None:
    dense, mine = network(), network()
    expected = train(dense, OPTIMIZERS[name](dense))
    assert train(packed(mine, how, "lossless"), OPTIMIZERS[name](mine)) == expected
    for ours, theirs in zip(mine.parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_packed_steps_learn_and_keep_what_the_report_says(name: str) -> None:
    dense, mine = network(), network()
    expected = train(dense, OPTIMIZERS[name](dense))
    rewritten = packed(mine, "transform", "balanced")
    losses = train(rewritten, OPTIMIZERS[name](mine))
    assert expected[-1] < expected[0] < 1.05 * losses[0]
    assert losses[-1] - expected[-1] < 0.1 * (expected[0] - expected[-1])
    report = dropit_fx.report(rewritten)
    assert report.kept_bytes < 0.5 * report.dense_bytes
    assert measure.saved_bytes(rewritten, batch(0)) == report.kept_bytes


@pytest.mark.parametrize("make", [apollo, galore, eight_bit])
def test_a_run_that_is_saved_goes_on(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    first = network()
    optimizer = make(first)
    rewritten = packed(first, "transform", "lossless")
    train(rewritten, whole(optimizer), range(4))
    saved = copy.deepcopy((rewritten.state_dict(), optimizer.state_dict()))
    expected = train(rewritten, whole(optimizer), range(4, STEPS))
    second = network()
    resumed = packed(second, "transform", "lossless")
    again = make(second)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert train(resumed, whole(again), range(4, STEPS)) == expected
