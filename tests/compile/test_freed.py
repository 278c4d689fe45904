"""Compiled, what has no reader left is freed, and not held for a later buffer of its shape."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit_fx.measure import peak_memory

WIDTH = 32


class Block(nn.Module):
    """Attention, and a layer whose tensors are four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x).view(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


def test_nothing_is_held_through_attention_for_the_next_wide_layer() -> None:
    model, x = nn.Sequential(*[Block() for _ in range(3)]), torch.randn(8, 128, WIDTH)
    peaks = []
    with torch.compiler.config.patch(force_disable_caches=True):
        for options in ({}, {"allow_buffer_reuse": True}):  # as inductor has it
            torch.compiler.reset()
            peaks.append(peak_memory(torch.compile(model, backend="dropit", options=options), x))
    wide = x.nbytes * 4
    assert peaks[0] <= peaks[1] - wide / 2
