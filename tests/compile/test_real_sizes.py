"""What a partition saves is told as large as it is, where fake tensors are smaller than real."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit_fx.compile.backend import compiled_graphs, forget_compiled_graphs
from dropit_fx.measure import saved_bytes

NORMS = {
    "layer norm": nn.LayerNorm(64),
    "group norm": nn.GroupNorm(4, 64),
    "batch norm": nn.BatchNorm1d(64),
}


class Normed(nn.Module):
    """A norm whose input is in fewer bits than its weight."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(64, 64), norm, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = self.b(F.gelu(self.norm(self.a(x))))
        return out


class Bags(nn.Module):
    """Sums and means of rows, between these and behind the last of these offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(100, 16, mode="mean")
        self.sum = nn.EmbeddingBag(100, 16, mode="sum", include_last_offset=True)
        self.top = nn.Linear(32, 64)

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        bags = self.mean(words, offsets[:-1]), self.sum(words, offsets)
        return F.gelu(self.top(torch.cat(bags, 1)))


def assert_told(model: nn.Module, *inputs: Tensor) -> None:
    before = len(compiled_graphs())
    compiled = torch.compile(model, backend="dropit", options={"inner": "aot_eager"})
    try:
        compiled(*inputs).float().sum().backward()
        (graph,) = compiled_graphs()[before:]
    finally:
        forget_compiled_graphs(before)
    assert graph.saved_bytes == saved_bytes(compiled, *inputs)


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_norms_of_mixed_dtypes(name: str) -> None:
    assert_told(Normed(NORMS[name]), torch.randn(128, 64))


def test_bags_of_embeddings() -> None:
    words, offsets = torch.randint(0, 100, (64,)), torch.arange(0, 65, 4)
    assert_told(Bags(), words, offsets)
