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
from dropit_fx.private_inductor import (
    FUSING,
    ORDERING,
    PRE_PASS,
    inductor_config,
    schedule,
    written,
)

SAMPLES, TOKENS, WIDTH, BLOCK = 16, 64, 768, 256
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
    run: Callable[..., Any], *shapes: tuple[int, ...] | Tensor, backward: bool = False
) -> tuple[list[Kernel], tuple[int, int]]:
    """The kernels, and of tensors of full size how often loops read one and how many are made."""
    with FakeTensorMode() as mode:
        given = [
            mode.from_tensor(s) if isinstance(s, Tensor) else torch.empty(s, dtype=torch.bfloat16)
            for s in shapes
        ]
        graph = make_fx(run, select_decomp_table(), tracing_mode="fake")(*given)
    limits: dict[str, Any] = FUSING | {PRE_PASS: FusePacking()} | (ORDERING if backward else {})
    with inductor_config(**limits), scheduled_for(graph, (), "cuda") as made:
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
    plain, tensors = compiled(made, *given)
    found, as_many = compiled(packed, *given)
    more = traffic(found)[0] - traffic(plain)[0], traffic(found)[1] - traffic(plain)[1]
    assert more[0] <= SMALL, found
    assert codes(bits) <= more[1] <= codes(bits) + SMALL, found
    assert as_many == tensors == (len(given), 1)


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

    plain, (reads, made) = compiled(lambda *given: run(*given)[1], *given)
    found, (more_reads, as_many) = compiled(packed, *given)
    assert traffic(found)[0] - traffic(plain)[0] <= more * DENSE + 2 * SMALL, found
    assert traffic(found)[1] - traffic(plain)[1] <= codes(4) + 2 * SMALL, found
    assert reads == len(given)
    assert more_reads <= reads + more
    assert as_many == made == 1


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


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gated_backward(gate: Tensor, up: Tensor, grad: Tensor) -> Any:
    """Both gradients of SwiGLU, and its value for the layer behind it."""
    silu = F.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), grad * silu, silu * up


# Of what is unpacked, and of a gradient; and dense tensors written
CONSUMERS: dict[str, tuple[Callable[..., Any], int]] = {
    "GELU": (lambda x, g: (torch.ops.aten.gelu_backward(g, x), F.gelu(x)), 2),
    "GELU, tanh": (
        lambda x, g: (torch.ops.aten.gelu_backward(g, x, approximate="tanh"), gelu_tanh(x)),
        2,
    ),
    "SiLU": (lambda x, g: (torch.ops.aten.silu_backward(g, x), F.silu(x)), 2),
    "SwiGLU": (gated_backward, 3),
    "layer norm": (norm_backward, 2),
    "RMS norm": (root_norm_backward, 2),
    "add, layer norm": (lambda x, y, g: norm_backward(x + y, g), 2),
    "add, RMS norm": (lambda x, y, g: root_norm_backward(x + y, g), 2),
    "RoPE": (lambda x, g: rotated(x) * g, 1),
    "softmax": (lambda x, g: torch.ops.aten._softmax_backward_data(g, x, -1, torch.bfloat16), 1),
    "cast": (lambda x, g: (g.float() * x.float()).to(g.dtype), 1),
}


@pytest.mark.parametrize("spacing", [SYMMETRIC, AFFINE])
@pytest.mark.parametrize("name", CONSUMERS)
def test_what_is_unpacked_is_read_as_bytes_in_one_kernel(name: str, spacing: int) -> None:
    run, written = CONSUMERS[name]
    count = run.__code__.co_argcount - 1

    def read(*given: Tensor) -> Any:
        *packed, grad = given
        pairs = zip(packed[::2], packed[1::2], strict=True)
        return run(*(unpacked(values, scale, 5, spacing) for values, scale in pairs), grad)

    found, tensors = compiled(read, *parts(5) * count, SHAPE)
    assert len(found) == 1, found
    assert traffic(found)[0] <= count * codes(5) + DENSE + SMALL
    assert traffic(found)[1] <= written * DENSE + SMALL
    assert tensors == (1, written)


def test_the_mask_of_dropout_is_read_as_bits_where_the_gradient_is() -> None:
    def backward(mask: Tensor, grad: Tensor) -> Tensor:
        kept = torch.ops.dropit.unpack_uint(mask, 1, NUMEL).bool().view(SHAPE)
        out: Tensor = torch.ops.aten.native_dropout_backward(grad, kept, 2.0)
        return out

    found, tensors = compiled(backward, torch.empty(NUMEL // 8, dtype=torch.uint8), SHAPE)
    assert len(found) == 1, found
    assert traffic(found) == (NUMEL // 8 + DENSE, DENSE)
    assert tensors == (1, 1)


IN_FRONT: dict[str, Callable[..., Tensor]] = {
    "layer norm": norm,
    "RMS norm": root_norm,
    "add, layer norm": lambda x, y: norm(x + y),
    "add, RMS norm": lambda x, y: root_norm(x + y),
    "GELU": lambda x: F.gelu(x),
    "GELU, tanh": gelu_tanh,
    "SwiGLU": lambda gate, up: F.silu(gate) * up,
    "batch norm, ReLU": lambda x: F.relu(x * 0.5 + 0.25),  # by the statistics that are kept
    "softmax": lambda x: x.softmax(-1),
    "RoPE": rotated,
    "cast": lambda x: x.float().to(x.dtype),
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_in_front_of_a_product_what_is_unpacked_is_made_again_in_one_kernel(name: str) -> None:
    run = IN_FRONT[name]
    count = run.__code__.co_argcount

    def gradient(*given: Tensor) -> Tensor:
        *packed, grad = given
        pairs = zip(packed[::2], packed[1::2], strict=True)
        read = run(*(unpacked(values, scale, 5, SYMMETRIC) for values, scale in pairs))
        return grad.T @ read.view(-1, WIDTH)

    found, tensors = compiled(gradient, *parts(5) * count, (SAMPLES * TOKENS, 64))
    (made_again,) = [k for k in found if not k.extern]
    assert made_again.read_bytes <= count * codes(5) + SMALL
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


def gelu_slope(x: Tensor, grad: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.gelu_backward(grad, x)
    return out


def side_by_side(x: Tensor, *grads: Tensor) -> Tensor:
    """Gradients of queries, keys and values, as the layer in front made these."""
    heads = [grad.view(SAMPLES, TOKENS, 12, 64).transpose(1, 2) for grad in grads]
    return torch.stack(heads).permute(1, 3, 0, 2, 4).contiguous()


SUMMED: dict[str, tuple[Callable[..., Tensor], int]] = {  # and gradients that it is made of
    "GELU": (gelu_slope, 1),
    "queries, keys, values": (side_by_side, 3),
}


@pytest.mark.parametrize("name", SUMMED)
def test_the_gradient_of_a_bias_is_summed_by_the_loop_that_writes_what_is_summed(name: str) -> None:
    run, count = SUMMED[name]

    def gradients(values: Tensor, scale: Tensor, *grads: Tensor) -> Any:
        x = unpacked(values, scale, 5, SYMMETRIC)
        rows = run(x, *grads).view(SAMPLES * TOKENS, -1)
        return rows.T @ x.view(-1, WIDTH), rows.sum([0], keepdim=True)

    found, tensors = compiled(gradients, *parts(5), *[SHAPE] * count, backward=True)
    loops = [k for k in found if not k.extern]
    sums = count * 2 * SMALL  # of each sample, in float32
    assert traffic(loops)[0] <= 2 * codes(5) + count * DENSE + sums, found
    assert traffic(loops)[1] <= DENSE + count * DENSE + sums, found
    assert tensors[0] == count


def test_what_attention_reads_is_unpacked_once() -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def twice(values: Tensor, scale: Tensor) -> Any:
        q = unpacked(values, scale, 4, AFFINE).view(SAMPLES, TOKENS, 12, 64).transpose(1, 2)
        return attend(q, q, q)[0], attend(q, q, q, is_causal=True)[0]

    found = [k for k in scheduled(twice, *parts(4)) if not k.extern]
    assert traffic(found)[1] == DENSE, found
