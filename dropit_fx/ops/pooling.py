"""Max-pool's saved indices, in the fewest bits that lose nothing.

PyTorch keeps the pooled tensor (of which the backward reads only the shape) and, for each output,
the flat int64 position of its maximum. The window that it lies in is known from the output's own
position, so the offset inside the window says as much: ``ceil(log2(prod(kernel_size)))`` bits
instead of 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.kernels.windows import decode_window_reference, encode_window_reference
from dropit_fx.ops.backwards import Called, Grads, Saved, per_dimension
from dropit_fx.ops.rule import OpRule, Read, Use, shape_only
from dropit_fx.private import c_nn

aten = torch.ops.aten


_WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")  # behind the input


class Window:
    """Kernel, stride, padding and dilation of one max-pool call, an int for each dimension.

    One-dimensional pooling is two-dimensional pooling over rows of height one, as in PyTorch.
    """

    def __init__(self, dims: int, args: Mapping[str, Any]) -> None:
        stride = args["stride"]
        self.kernel = per_dimension(args["kernel_size"], dims)
        self.stride = self.kernel if stride in (None, (), []) else per_dimension(stride, dims)
        self.padding = per_dimension(args["padding"], dims)
        self.dilation = per_dimension(args["dilation"], dims)
        self.ceil_mode = bool(args["ceil_mode"])
        if dims == 1:
            self.kernel, self.stride = [1, *self.kernel], [1, *self.stride]
            self.padding, self.dilation = [0, *self.padding], [1, *self.dilation]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of ``aten.max_pool2d_with_indices``."""
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode

    def encode(self, indices: Tensor, sizes: list[int]) -> Tensor:
        """Flat positions in an input of spatial ``sizes`` -> offsets inside the window (uint8)."""
        op = torch.ops.dropit.encode_window if _one_kernel(indices) else encode_window_reference
        return op(indices, sizes, self.kernel, self.stride, self.padding, self.dilation)

    def decode(self, codes: Tensor, sizes: list[int]) -> Tensor:
        """The inverse of :meth:`encode`: int64 positions."""
        op = torch.ops.dropit.decode_window if _one_kernel(codes) else decode_window_reference
        return op(codes, sizes, self.kernel, self.stride, self.padding, self.dilation)


def _one_kernel(x: Tensor) -> bool:
    # A compiler fuses the formula with the pooling itself, and holds no int64 positions then
    return (x.is_cuda or type(x) is Tensor) and not torch.compiler.is_compiling()


def window_bits(dims: int) -> Callable[[Mapping[str, Any]], int]:
    """Bits of an offset inside the window, at least 1."""

    def bits(args: Mapping[str, Any]) -> int:
        cells = math.prod(per_dimension(args["kernel_size"], dims))
        return max(1, (cells - 1).bit_length())

    return bits


def packable(dims: int) -> Callable[[Mapping[str, Any]], str]:
    """Why a call's indices cannot be packed: the caller wants them, or the window is too large."""

    def obstacle(args: Mapping[str, Any]) -> str:
        if args["return_indices"]:
            return "the caller wants the indices themselves"
        return "" if window_bits(dims)(args) <= 8 else "its window has more than 256 cells"

    return obstacle


def _max_pool(dims: int) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]

    def max_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        return op(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    return max_pool


def _max_pool_saving(dims: int) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """``max_pool{dims}d`` that also returns the window offsets of its maxima."""

    def run(input: Tensor, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        window = Window(dims, dict(zip(_WINDOW, args, strict=False)))
        x = input.unsqueeze(-2) if dims == 1 else input
        op = aten.max_pool3d_with_indices if dims == 3 else aten.max_pool2d_with_indices
        out, codes = op(x, *window.arguments)
        codes = window.encode(codes, list(x.shape[-len(window.kernel) :]))
        if dims == 1:
            out, codes = out.squeeze(-2), codes.squeeze(-2)
        return out, {"indices": codes}

    return run


def _max_pool_backward(dims: int) -> Callable[[Tensor, Saved, Called], Grads]:
    """``dX`` is ``grad`` at the maxima; the input's values are not read."""

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        window = Window(dims, call.args)
        # not saved: saved["input"] is uninitialised memory of the right shape
        x, codes = saved["input"], saved["indices"]
        if dims == 1:
            x, codes, grad = x.unsqueeze(-2), codes.unsqueeze(-2), grad.unsqueeze(-2)
        op = (
            aten.max_pool3d_with_indices_backward
            if dims == 3
            else aten.max_pool2d_with_indices_backward
        )
        indices = window.decode(codes, list(x.shape[-len(window.kernel) :]))
        out = op(grad, x, *window.arguments, indices)
        return {"input": out.squeeze(-2) if dims == 1 else out}

    return backward


MAX_POOL = tuple(
    OpRule(
        name=f"max_pool{d}d",
        targets=(
            getattr(F, f"max_pool{d}d"),
            getattr(torch, f"max_pool{d}d"),
            getattr(aten, f"max_pool{d}d").default,
        ),
        reads=(
            Read(operand="indices", use=Use.SLOPE, needed_by=("input",), bits=window_bits(d)),
            Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
        ),
        run=_max_pool(d),
        run_saving=_max_pool_saving(d),
        backward=_max_pool_backward(d),
        obstacle=packable(d),
    )
    for d in (1, 2, 3)
)


def _avg_pool2d_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """Reads only the shape of the input: the tensor given here is blank memory."""
    a = call.args
    kernel = per_dimension(a["kernel_size"], 2)
    stride = kernel if a["stride"] in (None, (), []) else per_dimension(a["stride"], 2)
    padding = per_dimension(a["padding"], 2)
    counted = a["ceil_mode"], a["count_include_pad"], a["divisor_override"]
    out = aten.avg_pool2d_backward(grad, saved["input"], kernel, stride, padding, *counted)
    return {"input": out}


AVG_POOL = tuple(
    shape_only(
        name,
        op,
        *dict.fromkeys((op, getattr(torch, name, op))),
        getattr(aten, name).default,
        schema=getattr(aten, name).default,
        backward=formula,
    )
    for name, op, formula in (
        ("avg_pool1d", F.avg_pool1d, None),
        ("avg_pool2d", F.avg_pool2d, _avg_pool2d_backward),
        ("avg_pool3d", F.avg_pool3d, None),
    )
)


ADAPTIVE_AVG_POOL = tuple(
    shape_only(name, getattr(F, name), getattr(F, name), plain, op, schema=op)
    for name, plain, op in (
        ("adaptive_avg_pool1d", torch.adaptive_avg_pool1d, aten.adaptive_avg_pool1d.default),
        ("adaptive_avg_pool2d", c_nn("adaptive_avg_pool2d"), aten.adaptive_avg_pool2d.default),
        ("adaptive_avg_pool3d", c_nn("adaptive_avg_pool3d"), aten.adaptive_avg_pool3d.default),
    )
)


PAD = shape_only("pad", F.pad, F.pad, c_nn("pad"), aten.pad.default)

ROWS = (*MAX_POOL, *AVG_POOL, *ADAPTIVE_AVG_POOL, PAD)
