"""A block of a transformer by itself, as a spec for ``bench``: ``dropit_fx.bench.blocks:llama``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Llama(nn.Module):
    """A block of Llama (arXiv 2302.13971): RMS norms, rotated attention of groups, gated MLP.

    Args:
        width: Of the tokens.
        inner: Width of the MLP.
        heads: Of queries.
        groups: Heads of keys and values.
        tokens: In a sequence.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, inner: int, heads: int, groups: int, tokens: int) -> None:
        super().__init__()
        self.size = width // heads
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        steps = 500000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        angles = (torch.arange(tokens)[:, None] * steps).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as ``x``: (batch, tokens, width)."""
        h = self.attention_norm(x)
        q, k = (self._rotated(self._by_heads(layer(h))) for layer in (self.q, self.k))
        v = self._by_heads(self.v(h))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        made: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return made

    def _by_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.size).transpose(1, 2)

    def _rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin


def llama_1b() -> tuple[nn.Module, tuple[Tensor]]:
    """Of Llama 3.2, 1.2 billion parameters: 2048 wide; otherwise as :func:`llama`."""
    return Llama(2048, 8192, 32, 8, 2048), (torch.randn(1, 2048, 2048, requires_grad=True),)


def llama() -> tuple[nn.Module, tuple[Tensor]]:
    """Of Llama 3, 8 billion parameters: 4096 wide; 2048 tokens.

    And its input (batch, tokens, width), which wants a gradient, as between other blocks.
    """
    return Llama(4096, 14336, 32, 8, 2048), (torch.randn(1, 2048, 4096, requires_grad=True),)
