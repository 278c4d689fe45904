"""Small models with checkpoints, and steps of them, for the tests of packing without a graph."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS = 64, 64
Grads = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, *more: Any, scale: Any = None) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x))))
        for other in more:
            y = y * (other[0] if isinstance(other, tuple) else other)
        return x + self.dropout(y if scale is None else y * scale)


class Net(nn.Module):
    """Blocks that are checkpointed, one by one."""

    def __init__(self, depth: int = 3, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.options = {"use_reentrant": False} | options

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, *more, **named, **self.options)
        return F.cross_entropy(self.head(x), torch.arange(len(x)) % 10)


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).train()


def batch(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[float, Grads]:
    """The loss of one step, with its dropout, and all gradients."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(*args, **kwargs)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def error(found: Grads, wanted: Grads) -> float:
    assert found.keys() == wanted.keys()
    off = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted)
    return (off / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5


REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An activation: what something was made of that requires a gradient."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_() * 1
