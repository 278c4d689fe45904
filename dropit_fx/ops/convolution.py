"""Convolutions and transposed convolutions of one to three dimensions.

The backward is ``aten.convolution_backward``; the gradients of input and bias do not read the
input, which is what is packed: they are exact (DropIT, arXiv 2202.13808, section 3). That of the
weight sums over the samples: where some were dropped, it is that of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved, of_layer, per_dimension, vjp
from dropit_fx.ops.matmul import LAYER
from dropit_fx.ops.rule import OpRule, Read

aten = torch.ops.aten
_WEIGHT = frozenset({"weight"})


def _convolution_backward(dims: int, transposed: bool) -> Callable[[Tensor, Saved, Called], Grads]:
    """The backward of ``conv{dims}d``: ``input: (b, in, *)``, ``weight: (out, in / groups, *)``."""

    def ints(value: Any) -> list[int]:
        return per_dimension(value, dims)

    def backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
        args = call.args
        if isinstance(args["padding"], str) or grad.dim() != dims + 2:
            return vjp(grad, saved, call)
        bias = call.shapes.get("bias")
        how = (
            list(bias) if bias is not None else None,
            ints(args["stride"]),
            ints(args["padding"]),
            ints(args["dilation"]),
            transposed,
            ints(args["output_padding"]) if transposed else [0] * dims,
            args["groups"],
        )

        def grads(call: Called, grad: Tensor, x: Tensor) -> Grads:
            return of_layer(aten.convolution_backward, call, grad, x, saved["weight"], *how)

        some = saved.by_sample("input", grad) if "weight" in call.needs else None
        if some is None:
            return grads(call, grad, saved["input"])
        others = replace(call, needs=call.needs - {"weight"})
        found = grads(others, grad, saved.blank("input")) if others.needs else {}
        return found | {"weight": grads(replace(call, needs=_WEIGHT), *some)["weight"]}

    return backward


def _layer(dims: int) -> tuple[Read, ...]:
    """The reads of ``conv{dims}d``; a formula of its own has who pads by numbers, in batches."""

    def by_sample(args: Mapping[str, Any]) -> bool:
        batched = args["input"].dim() == dims + 2
        return batched and not isinstance(args["padding"], str)

    return replace(LAYER[0], by_sample=by_sample), LAYER[1]


CONV = tuple(
    OpRule(
        name=f"conv{d}d",
        targets=(
            getattr(torch, f"conv{d}d"),
            getattr(aten, f"conv{d}d").default,
            getattr(aten, f"conv{d}d").padding,
        ),
        reads=_layer(d),
        run=getattr(F, f"conv{d}d"),
        schema=getattr(aten, f"conv{d}d").default,
        backward=_convolution_backward(d, transposed=False),
        autocast="lower",
    )
    for d in (1, 2, 3)
)


_TRANSPOSE = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
CONV_TRANSPOSE = tuple(
    OpRule(
        name=f"conv_transpose{d}d",
        targets=(getattr(torch, f"conv_transpose{d}d"), op),
        reads=_layer(d),
        run=getattr(F, f"conv_transpose{d}d"),
        schema=op,
        backward=_convolution_backward(d, transposed=True),
        autocast="lower",
    )
    for d, op in enumerate(_TRANSPOSE, 1)
)

ROWS = (*CONV, *CONV_TRANSPOSE)
