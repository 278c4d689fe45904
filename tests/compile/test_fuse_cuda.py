"""What inductor writes of fused packing for a GPU: nothing to dispatch, bytes read where needed."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cuda_code import code_of, compiled, launches, sources
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dropit_fx.compile.fuse import FusePacking
from dropit_fx.compile.inner import INNER, aot
from dropit_fx.kernels import AFFINE, FULL, SPACINGS, SYMMETRIC, UNIFORM
from dropit_fx.private import (
    FakeTensorMode,
    make_boxed_func,
    make_fx,
)

WIDTH, TOKENS = 64, 48
CONFIG = {"rules": [{"op": "*", "codec": "quant", "bits": 4, "block": 256}]}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gelu(nn.Module):
    """As DeiT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Gated(nn.Module):
    """As Llama has them, without the rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = Attention()
        self.gate, self.up = nn.Linear(WIDTH, 256), nn.Linear(WIDTH, 256)
        self.down = nn.Linear(256, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


BLOCKS = {"gelu": (Gelu, 2), "gated": (Gated, 1)}


@functools.cache
def graphs(name: str) -> list[fx.GraphModule]:
    """Forward and backward behind the cut."""
    kept: list[fx.GraphModule] = []

    def note(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        kept.append(copy.deepcopy(graph))
        return make_boxed_func(graph.forward)

    block, depth = BLOCKS[name]
    model = nn.Sequential(*(block() for _ in range(depth))).to(torch.bfloat16)
    x = torch.randn(4, TOKENS, WIDTH, dtype=torch.bfloat16)
    with (
        mock.patch.dict(INNER, {"inductor": aot(True, note)}),
        sdpa_kernel(SDPBackend.MATH),
    ):
        torch._dynamo.reset()
        torch.compile(model, backend="dropit", options={"config": CONFIG})(x).sum().backward()
    return kept


@functools.cache
def codes(name: str, fuse: bool) -> list[str]:
    return [code_of(graph, FusePacking() if fuse else lambda _: None) for graph in graphs(name)]


def dispatched(code: str) -> list[str]:
    return re.findall(r"= torch\.ops\.dropit\.(\w+)\.default\(", code)


@pytest.mark.parametrize("name", BLOCKS)
def test_on_a_gpu_nothing_is_dispatched(name: str) -> None:
    forward, backward = codes(name, False)
    assert set(dispatched(forward)) == {"sparsify"}
    assert set(dispatched(backward)) == {"unsparsify"}
    packed = len(dispatched(forward))
    fused = codes(name, True)
    assert not any(map(dispatched, fused))
    # who reduces a block writes its bytes; what the ops launched is not counted here
    assert len(launches(fused[0])) <= len(launches(forward)) + packed


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("spacing", [SYMMETRIC, AFFINE, UNIFORM])
def test_a_product_is_read_once_for_its_scale_and_its_codes(bits: int, spacing: int) -> None:
    """Other kernels put scales and, of five bits, bytes in their order."""

    def packed(a: Tensor, b: Tensor) -> Any:
        numbers = FULL, 256, bits, spacing, False
        return torch.ops.dropit.sparsify((a @ b).view(-1), *numbers)[:2]

    with FakeTensorMode():
        given = torch.empty(512, 512), torch.empty(512, 512)
        graph = make_fx(packed, tracing_mode="fake")(*given)
    code = code_of(graph, FusePacking())
    products = {*re.findall(r"extern_kernels.mm\(.*, out=(\w+)\)", code)}
    for name, of in re.findall(r"(\w+) = .*; del (\w+) .*# reuse", code):
        products |= {name} if of in products else set()
    readers = [n for n, arguments in launches(code) if products & {*arguments.split(", ")}]
    assert len(readers) == 1, launches(code)


@pytest.mark.parametrize("spacing", [SYMMETRIC, AFFINE, UNIFORM])
def test_eight_bits_are_written_by_the_kernel_that_makes_the_values(spacing: int) -> None:
    def packed(x: Tensor) -> Any:
        y = x.sin()
        return y, *torch.ops.dropit.sparsify(y.view(-1), FULL, 256, 8, spacing, False)[:2]

    with FakeTensorMode():
        graph = make_fx(packed, tracing_mode="fake")(torch.empty(512, 512))
    launched = launches(code_of(graph, FusePacking()))
    readers = [n for n, arguments in launched if {"x_1", "buf0"} & {*arguments.split(", ")}]
    assert len(readers) == 1, launched


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_unpacked_is_read_by_the_kernel_that_needs_it(name: str) -> None:
    """Bytes are read, and what is written is no copy of what they stand for."""
    _, backward = codes(name, True)
    wanted = {"gelu": "gelu_backward", "gated": "silu"}[name]
    kernels = {k: s for k, s in sources(backward).items() if "unsparsify" in k}
    readers = [k for k, source in kernels.items() if "'*u8'" in source]
    assert any(wanted in k for k in readers), list(kernels)


UNPACK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f"{SPACINGS[spacing]}, {bits} bits": functools.partial(
        lambda spacing, bits, values, scale: torch.ops.dropit.unsparsify(
            *(values, scale, values.new_empty(0), 8 * 512, torch.float32),
            *(FULL, 256, bits, spacing),
        ),
        *(spacing, bits),
    )
    for spacing, bits in [(SYMMETRIC, 4), (SYMMETRIC, 5), (AFFINE, 4), (UNIFORM, 3)]
}


@pytest.mark.parametrize("name", UNPACK)
def test_what_is_unpacked_is_rounded_as_by_the_reference(name: str) -> None:
    """A product that is contracted with a sum has other bits: no instruction does both."""
    bits = int(name[-6])
    with FakeTensorMode():
        given = (
            torch.empty(512 * bits, dtype=torch.uint8),
            torch.empty(32, dtype=torch.bfloat16),
        )
        graph = make_fx(UNPACK[name])(*given)
    code = code_of(graph, FusePacking())
    ((kernel, source),) = sources(code).items()
    figures = compiled(source, kernel)
    assert "mul" in figures.ptx
    assert "fma" not in figures.ptx
    assert ".approx" not in figures.ptx
    assert "div." not in figures.ptx
    assert figures.spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_it_compiles_without_spills(name: str) -> None:
    for code in codes(name, True):
        for kernel, source in sources(code).items():
            if "sparsify" in kernel:
                figures = compiled(source, kernel)
                assert figures.spills == 0, kernel
