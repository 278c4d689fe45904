"""What fused packing reads and writes for a GPU, by the bytes of the kernels that are scheduled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_code import launches, sources
from torch import Tensor

from dropit_fx.bench.schedule import Kernel, kernels, scheduled_for
from dropit_fx.compile.fuse import FusePacking
from dropit_fx.kernels import AFFINE, FULL, SYMMETRIC, Format
from dropit_fx.private import FakeTensorMode, make_fx, select_decomp_table
from dropit_fx.private_inductor import FUSING, inductor_config, schedule, written

SAMPLES, TOKENS, WIDTH, BLOCK = 8, 64, 768, 256
SHAPE = SAMPLES, TOKENS, WIDTH
NUMEL = SAMPLES * TOKENS * WIDTH
DENSE = 2 * NUMEL  # bytes of a bfloat16 tensor
SMALL = DENSE // 32  # bytes: statistics of rows, scales, vectors of one row
Pack = Callable[[Tensor], tuple[Tensor, ...]]


def packer(bits: int, spacing: int = SYMMETRIC) -> Pack:
    numbers = FULL, BLOCK, bits, spacing, False
    return lambda x: torch.ops.dropit.sparsify(x.reshape(-1), *numbers)[:2]


def codes(bits: int) -> int:
    return Format(FULL, BLOCK, bits).nbytes(NUMEL, 2)


def scheduled(run: Callable[..., Any], *shapes: tuple[int, ...] | Tensor) -> list[Kernel]:
    """The kernels of a function of bfloat16 tensors of these shapes."""
    return compiled(run, *shapes)[0]


def compiled(
    run: Callable[..., Any], *shapes: tuple[int, ...] | Tensor
) -> tuple[list[Kernel], tuple[int, int]]:
    """The kernels, and of tensors of full size how often loops read one and how many are made."""
    with FakeTensorMode() as mode:
        given = [
            mode.from_tensor(s) if isinstance(s, Tensor) else torch.empty(s, dtype=torch.bfloat16)
            for s in shapes
        ]
        graph = make_fx(run, select_decomp_table(), tracing_mode="fake")(*given)
    FusePacking()(graph.graph)
    graph.recompile()
    with inductor_config(**FUSING), scheduled_for(graph, (), "cuda") as made:
        found = list(kernels(schedule(made), ""))
        inputs = graph.graph.find_nodes(op="placeholder")
        names = {n.name for n in inputs if n.meta["val"].nbytes >= DENSE}
        return found, whole_tensors(written(made), names)


def whole_tensors(code: str, inputs: set[str]) -> tuple[int, int]:
    """Of tensors of full size, read from the code: how often loops read one; how many are made.

    Args:
        code: of a graph.
        inputs: those among its inputs.
    """
    allocated = re.findall(r"(\w+) = empty_strided_cuda\(\(([\d, ]+)\), .*torch\.\w*float", code)
    sizes = {name: math.prod(map(int, re.findall(r"\d+", size))) for name, size in allocated}
    made = {name for name, size in sizes.items() if size >= NUMEL}
    whole = inputs | made
    for name, of in re.findall(r"(\w+) = .*; del (\w+) .*# reuse", code):
        whole |= {name} if of in whole else set()
    reads = 0
    for name, arguments in launches(code):
        source = sources(code)[name]
        taken = re.search(rf"def {name}\(([^)]*)\)", source)
        assert taken is not None
        pairs = zip(taken[1].split(", "), arguments.split(", "), strict=False)
        reads += sum(f"tl.load({p} " in source for p, given in pairs if given in whole)
    return reads, len(made)


def traffic(found: list[Kernel]) -> tuple[int, int]:
    return sum(k.read_bytes for k in found), sum(k.write_bytes for k in found)


# Producers: the value that a kernel makes or reads is packed in that kernel


def rotated(x: Tensor) -> Tensor:
    heads = x.view(SAMPLES, TOKENS, 12, 64)
    first, second = heads.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (heads * 0.5 + turned * 0.25).view(SHAPE)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def root_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,))


def channels_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm and ReLU of (samples, channels, length); with mean and deviation of channels."""
    variance, mean = torch.var_mean(x.float(), (0, 2), correction=0)
    deviation = (variance + 1e-5).sqrt()
    out = (x - mean[:, None]) / deviation[:, None]
    return out.relu().to(x.dtype), mean, deviation


POINTWISE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {  # -> what is packed, what is made
    "GELU": lambda x: (x, F.gelu(x)),
    "GELU, tanh": lambda x: (x, F.gelu(x, approximate="tanh")),
    "SwiGLU": lambda gate, up: (gate, F.silu(gate) * up),
    "add": lambda x, y: (x + y, x + y),
    "dropout": lambda x, kept: (x * kept * 2.0, x * kept * 2.0),
    "cast": lambda x: (x, x.to(torch.float32)),
}


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("name", POINTWISE)
def test_packing_joins_the_loop_that_makes_or_reads_a_value(name: str, bits: int) -> None:
    run, pack = POINTWISE[name], packer(bits)

    def made(*given: Tensor) -> Any:
        return run(*given)[1]

    def packed(*given: Tensor) -> Any:
        value, out = run(*given)
        return out, *pack(value)

    given = [SHAPE] * run.__code__.co_argcount
    reads, writes = traffic(scheduled(made, *given))
    found = scheduled(packed, *given)
    more = traffic(found)[0] - reads, traffic(found)[1] - writes
    assert more[0] <= SMALL, found
    assert codes(bits) <= more[1] <= codes(bits) + SMALL, found


READ_BY_A_CALL: dict[str, Callable[..., Tensor]] = {
    "GELU": F.gelu,
    "SwiGLU": lambda gate, up: F.silu(gate) * up,
    "dropout": lambda x, kept: x * kept * 2.0,
}


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("name", READ_BY_A_CALL)
def test_what_a_call_reads_is_packed_by_the_loop_that_makes_it(name: str, bits: int) -> None:
    """Not read again from the memory in which the call wants it."""
    run, pack = READ_BY_A_CALL[name], packer(bits)

    def made(weight: Tensor, *given: Tensor) -> Any:
        return run(*given) @ weight

    def packed(weight: Tensor, *given: Tensor) -> Any:
        value = run(*given)
        return value @ weight, *pack(value)

    given = [(WIDTH, WIDTH), *[SHAPE] * (2 if name in ("SwiGLU", "dropout") else 1)]
    reads, writes = traffic(scheduled(made, *given))
    found = scheduled(packed, *given)
    assert traffic(found)[0] - reads <= SMALL, found
    assert codes(bits) <= traffic(found)[1] - writes <= codes(bits) + SMALL, found


# -> what is packed, what is made; and dense tensors that are read once more
ROWS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], int]] = {
    "layer norm": (lambda x: (x, norm(x)), 1),
    "RMS norm": (lambda x: (x, root_norm(x)), 1),
    "add, layer norm": (lambda x, y: (x + y, norm(x + y)), 2),
    "add, RMS norm": (lambda x, y: (x + y, root_norm(x + y)), 2),
    "RoPE": (lambda x: (rotated(x), rotated(x)), 1),
    "softmax": (lambda x: (x.softmax(-1), x.softmax(-1)), 2),  # for scales, and for codes
}


@pytest.mark.parametrize("name", ROWS)
def test_beside_other_loops_a_value_is_read_once_more(name: str) -> None:
    """A kernel reduces rows or blocks, not both; there is no full-size tensor in between."""
    (run, more), pack = ROWS[name], packer(4)
    given = [SHAPE] * run.__code__.co_argcount

    def packed(*given: Tensor) -> Any:
        value, out = run(*given)
        return out, *pack(value)

    reads, writes = traffic(scheduled(lambda *given: run(*given)[1], *given))
    found = scheduled(packed, *given)
    assert traffic(found)[0] - reads <= more * DENSE + 2 * SMALL, found
    assert traffic(found)[1] - writes <= codes(4) + 2 * SMALL, found


def test_what_batch_norm_and_relu_read_and_make_is_read_twice_more() -> None:
    """For blocks around the means of channels, and for bytes of one bit an element."""

    def packed(x: Tensor) -> Any:
        out, mean, deviation = channels_norm(x)
        numbers = FULL, BLOCK, 6, SYMMETRIC, False
        ops = torch.ops.dropit
        values, scale, _ = ops.sparsify_channels(
            x.reshape(-1), mean, 1 / deviation, WIDTH, *numbers
        )
        return out, ops.pack_between(out.reshape(-1), 0.0, None), values, scale

    plain, (reads, made) = compiled(lambda x: channels_norm(x)[0], SHAPE)
    found, (more_reads, as_many) = compiled(packed, SHAPE)
    assert traffic(found)[0] - traffic(plain)[0] <= 2 * DENSE + 2 * SMALL, found
    assert traffic(found)[1] - traffic(plain)[1] <= codes(6) + NUMEL // 8 + 2 * SMALL, found
    assert reads >= 2
    assert more_reads <= reads + 2
    assert as_many == made == 1


# -> how often tensors of full size are read once more
WRITTEN: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], int]] = {
    "GELU": (POINTWISE["GELU"], 0),
    **{name: ROWS[name] for name in ("RMS norm", "RoPE")},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_in_the_code_a_loop_more_reads_the_tensor_at_most_and_none_is_between(name: str) -> None:
    (run, more), pack = WRITTEN[name], packer(4)

    def packed(x: Tensor) -> Any:
        value, out = run(x)
        return out, *pack(value)

    reads, made = compiled(lambda x: run(x)[1], SHAPE)[1]
    assert (reads, made) == (1, 1)
    packed_reads, as_many = compiled(packed, SHAPE)[1]
    assert packed_reads <= reads + more
    assert as_many == made


def test_of_a_part_of_a_tensor_packing_reads_that_part_once() -> None:
    """As of queries, keys and values in one tensor: neighbours in a byte are no more reads."""
    pack = packer(4)
    found = scheduled(
        lambda x: pack(x.unflatten(-1, (3, 12, 64)).select(2, 0).reshape(SHAPE)),
        (SAMPLES, TOKENS, 3 * WIDTH),
    )
    assert DENSE <= traffic(found)[0] <= DENSE + SMALL, found


# Consumers: bytes are read where the value is needed


def unpacked(values: Tensor, scale: Tensor, bits: int, spacing: int) -> Tensor:
    numbers = FULL, BLOCK, bits, spacing
    flat = torch.ops.dropit.unsparsify(
        *(values, scale, values.new_empty(0), NUMEL, torch.bfloat16), *numbers
    )
    return flat.view(SHAPE)


def parts(bits: int) -> tuple[Tensor, Tensor]:
    values, scale, _ = Format(FULL, BLOCK, bits).sizes(NUMEL)
    return torch.empty(values, dtype=torch.uint8), torch.empty(scale, dtype=torch.bfloat16)


def norm_backward(x: Tensor, grad: Tensor) -> Any:
    single = x.float()
    variance, mean = torch.var_mean(single, -1, correction=0, keepdim=True)
    invstd = (variance + 1e-5).rsqrt()
    return torch.ops.aten.native_layer_norm_backward(
        *(grad, x, [WIDTH], mean, invstd, None, None, [True, False, False])
    )[0], norm(x)


def root_norm_backward(x: Tensor, grad: Tensor) -> Any:
    single = x.float()
    inverse = (single.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    normed = single * inverse
    slope = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * inverse
    return slope.to(grad.dtype), root_norm(x)


CONSUMERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {  # and dense tensors written
    "GELU": (lambda x, g: (torch.ops.aten.gelu_backward(g, x), F.gelu(x)), 2),
    "SiLU": (lambda x, g: (torch.ops.aten.silu_backward(g, x), F.silu(x)), 2),
    "layer norm": (norm_backward, 2),
    "RMS norm": (root_norm_backward, 2),
    "RoPE": (lambda x, g: rotated(x) * g, 1),
    "softmax": (lambda x, g: torch.ops.aten._softmax_backward_data(g, x, -1, torch.bfloat16), 1),
    "dropout": (lambda x, g: g * x, 1),
}


@pytest.mark.parametrize("spacing", [SYMMETRIC, AFFINE])
@pytest.mark.parametrize("name", CONSUMERS)
def test_what_is_unpacked_is_read_as_bytes_in_one_kernel(name: str, spacing: int) -> None:
    run, written = CONSUMERS[name]
    found = scheduled(
        lambda values, scale, grad: run(unpacked(values, scale, 5, spacing), grad), *parts(5), SHAPE
    )
    assert len(found) == 1, found
    assert traffic(found)[0] <= codes(5) + DENSE + SMALL
    assert traffic(found)[1] <= written * DENSE + SMALL


IN_FRONT: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": norm,
    "RMS norm": root_norm,
    "GELU": F.gelu,
    "RoPE": rotated,
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_in_front_of_a_product_what_is_unpacked_is_made_again_in_one_kernel(name: str) -> None:
    def gradient(values: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
        read = IN_FRONT[name](unpacked(values, scale, 5, SYMMETRIC))
        return grad.T @ read.view(-1, WIDTH)

    found, tensors = compiled(gradient, *parts(5), (SAMPLES * TOKENS, 64))
    (made_again,) = [k for k in found if not k.extern]
    assert made_again.read_bytes <= codes(5) + SMALL
    assert made_again.write_bytes == DENSE
    assert tensors == (0, 1)


def test_batch_norm_and_relu_read_bytes_in_their_backward() -> None:
    """Twice, as dense reads its tensors: for sums over channels, and for the gradient."""
    numbers = FULL, BLOCK, 6, SYMMETRIC

    def backward(
        values: Tensor, scale: Tensor, mask: Tensor, mean: Tensor, deviation: Tensor, grad: Tensor
    ) -> Tensor:
        ops, none = torch.ops.dropit, values.new_empty(0)
        x = ops.unsparsify_channels(
            *(values, scale, none, mean, deviation, WIDTH, NUMEL, torch.bfloat16), *numbers
        ).view(SHAPE)
        grad = ops.apply_mask(mask, grad.reshape(-1), 0.0).view(SHAPE)
        given: Tensor = torch.ops.aten.native_batch_norm_backward(
            *(grad, x, None, None, None, mean, 1 / deviation, True, 1e-5, [True, False, False])
        )[0]
        return given

    mask = torch.empty(NUMEL // 8, dtype=torch.uint8)
    statistics = torch.empty(TOKENS), torch.empty(TOKENS)
    found, tensors = compiled(backward, *parts(6), mask, *statistics, SHAPE)
    assert traffic(found)[0] <= 2 * (codes(6) + NUMEL // 8 + DENSE) + 2 * SMALL, found
    assert traffic(found)[1] <= DENSE + SMALL, found
    assert tensors == (2, 1)


def test_what_attention_reads_is_unpacked_once() -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def twice(values: Tensor, scale: Tensor) -> Any:
        q = unpacked(values, scale, 4, AFFINE).view(SAMPLES, TOKENS, 12, 64).transpose(1, 2)
        return attend(q, q, q)[0], attend(q, q, q, is_causal=True)[0]

    found = [k for k in scheduled(twice, *parts(4)) if not k.extern]
    assert traffic(found)[1] == DENSE, found
