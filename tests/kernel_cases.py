"""Inputs and formats for comparing implementations of the packed format bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(kind: str, numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor that is hard in one way: see the branches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    if kind == "ties":  # few distinct magnitudes, -0.0 among them
        x = (x * 2).round()
    elif kind == "zeros":
        x = torch.zeros(numel)
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).smallest_normal / 4
    elif kind == "wild":  # forty orders of magnitude, overflowing in float16
        x = x * torch.exp(torch.randn(numel, generator=generator) * 20)
    elif kind == "special":
        hit = torch.rand(numel, generator=generator) < (2e-3, 2e-2)[seed % 2]
        some = torch.tensor(_SPECIAL[seed % len(_SPECIAL)])
        x = torch.where(hit, some[torch.arange(numel) % len(some)], x)
    elif kind == "outliers":
        x = x * torch.where(torch.rand(numel, generator=generator) < 0.01, 100.0, 1.0)
    elif kind == "one-sided":
        x = torch.nn.functional.gelu(x)
    elif kind == "narrow":  # far from zero, within a few steps of bfloat16
        x = (x / 64 + 3) * (-1) ** seed
    elif kind == "huge":  # ranges at the edge of overflow
        x = x.clamp(-2, 2) / 3.9 * torch.finfo(dtype).max
    return x.to(dtype)


_NAN, _INF = float("nan"), float("inf")
_SPECIAL = ([_NAN], [_INF], [-_INF], [_INF, -_INF], [_NAN, _INF, -_INF])
KINDS = ("ties", "zeros", "subnormal", "wild", "special", "outliers", "one-sided", "narrow", "huge")


def cases(sizes: st.SearchStrategy[int], blocks: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """(x, seed, (keep, block, bits, layout, stochastic)): the arguments of `sparsify`."""
    xs = st.builds(
        make, st.sampled_from(KINDS), sizes, st.sampled_from(DTYPES), st.integers(0, 2**20)
    )
    seeds = st.integers(-(2**63), 2**63 - 1).map(lambda s: torch.tensor([s]))
    formats = st.tuples(
        st.sampled_from([0, 7, 1000, 3333, 6611, 10000]),
        st.sampled_from(blocks),
        st.integers(0, 8),
        st.integers(0, 2),
        st.booleans(),
    )
    return st.tuples(xs, seeds, formats)


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal patterns; of a NaN only that it is one."""
    assert left.dtype == right.dtype
    if left.is_floating_point():
        assert torch.equal(left.isnan(), right.isnan())
        as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[left.element_size()]
        left, right = (torch.where(t.isnan(), 0.0, t).view(as_int) for t in (left, right))
    torch.testing.assert_close(left, right, rtol=0, atol=0)
