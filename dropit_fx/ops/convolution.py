"""Convolutions and transposed convolutions of one to three dimensions.

The backward is ``aten.convolution_backward``; the gradients of input and bias do not read the
input, which is what is packed: they are exact (DropIT, arXiv 2202.13808, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved, of_layer, per_dimension, vjp
from dropit_fx.ops.matmul import LAYER
from dropit_fx.ops.rule import OpRule

aten = torch.ops.aten


def _conv(dims: int) -> Callable[..., Tensor]:
    op = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        return op(input, weight, bias, stride, padding, dilation, groups)

    return conv


def _conv_transpose(dims: int) -> Callable[..., Tensor]:
    op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]

    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        return op(input, weight, bias, stride, padding, output_padding, groups, dilation)

    return conv_transpose


def _convolution_backward(dims: int, transposed: bool) -> Callable[[Tensor, Saved, Called], Grads]:
    """The backward of ``conv{dims}d``: ``input: (b, in, *)``, ``weight: (out, in / groups, *)``."""

    def ints(value: Any) -> list[int]:
        return per_dimension(value, dims)

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        args = call.args
        if isinstance(args["padding"], str) or grad.dim() != dims + 2:
            return vjp(grad, saved, call)
        bias = call.shapes.get("bias")
        return of_layer(
            aten.convolution_backward,
            call,
            grad,
            saved["input"],
            saved["weight"],
            list(bias) if bias is not None else None,
            ints(args["stride"]),
            ints(args["padding"]),
            ints(args["dilation"]),
            transposed,
            ints(args["output_padding"]) if transposed else [0] * dims,
            args["groups"],
        )

    return backward


CONV = tuple(
    OpRule(
        name=f"conv{d}d",
        targets=(
            getattr(torch, f"conv{d}d"),
            getattr(aten, f"conv{d}d").default,
            getattr(aten, f"conv{d}d").padding,
        ),
        reads=LAYER,
        run=_conv(d),
        backward=_convolution_backward(d, transposed=False),
        autocast="lower",
    )
    for d in (1, 2, 3)
)


CONV_TRANSPOSE = tuple(
    OpRule(
        name=f"conv_transpose{d}d",
        targets=(
            getattr(torch, f"conv_transpose{d}d"),
            getattr(aten, f"conv_transpose{d}d").default
            if d == 1
            else getattr(aten, f"conv_transpose{d}d").input,
        ),
        reads=LAYER,
        run=_conv_transpose(d),
        backward=_convolution_backward(d, transposed=True),
        autocast="lower",
    )
    for d in (1, 2, 3)
)

ROWS = (*CONV, *CONV_TRANSPOSE)
