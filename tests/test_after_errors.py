"""What an error in a forward leaves: gradients, autocast, hooks and kernels are as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

import dropit_fx

BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "hooks": partial(disable_saved_tensors_hooks, "not here"),
    "kernels": partial(torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend.MATH),
}


class Model(nn.Module):
    """Fails in its block where the input is not positive-definite."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.weight, self.block = nn.Parameter(torch.ones(4)), block

    def forward(self, x: Tensor) -> Tensor:
        h = (x * self.weight).exp()
        with BLOCKS[self.block]():
            y = torch.linalg.cholesky(x)
        return h.sum() + y.sum()


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    """A mode that stays on shows in the one test alone."""
    kernels = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.backends.cuda.enable_flash_sdp(kernels)
    with disable_saved_tensors_hooks(""):
        pass


def modes() -> tuple[bool, ...]:
    try:
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            hooks = True
    except RuntimeError:
        hooks = False
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.flash_sdp_enabled(),
        hooks,
    )


def _stock_leaves(block: str, x: Tensor) -> bool:
    """Whether PyTorch's own eager backend leaves a mode of a block that failed."""
    before = modes()
    with pytest.raises(RuntimeError, match="cholesky"):
        torch.compile(Model(block), backend="eager")(-x)
    left = modes() != before
    torch.set_autocast_enabled("cpu", False)
    return left


WAYS = {
    "transform": lambda model, x: dropit_fx.transform(model, example_args=(x,)),
    "plug-in": lambda model, x: torch.compile(model, backend="dropit_eager"),
}
ALL = [(way, block) for way in WAYS for block in BLOCKS]


@pytest.mark.parametrize(
    ("way", "block"), [pair for pair in ALL if pair != ("transform", "inference_mode")]
)
def test_a_block_that_fails_leaves_all_modes_as_they_were(way: str, block: str) -> None:
    torch._dynamo.reset()
    x = torch.eye(4)
    if (way, block) == ("plug-in", "autocast") and _stock_leaves(block, x):
        pytest.skip("Dynamo of this PyTorch leaves autocast on, with its own backend too")
    packed = WAYS[way](Model(block), x)
    with torch.set_grad_enabled(block != "enable_grad"):
        before = modes()
        packed(x)
        assert modes() == before
        with pytest.raises(RuntimeError, match="cholesky"):
            packed(-x)
        assert modes() == before
