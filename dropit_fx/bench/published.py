"""DropIT as it was published, re-made as a yardstick for benchmarks. Nothing else uses it.

Linear and Conv2d modules select the largest (1 - gamma) * n magnitudes of their whole input with
one ``topk`` and keep values and int32 indices; the backward scatters them into zeros (DropIT, arXiv
2202.13808, algorithm 1). The modules that its benchmarks leave out are left out here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit_fx.words import matches

# its DeiT benchmark leaves out the patch embedding and the head; a ResNet's, the first convolution
EXCLUDED = ("patch_embed.*", "head", "fc", "conv1", "*.conv_stem", "classifier")


def select(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Values and int32 flat indices of the ``int(n * (1 - gamma))`` largest magnitudes of ``x``."""
    flat = x.reshape(-1)
    index = flat.abs().topk(int(flat.numel() * (1 - gamma)), sorted=False).indices
    return flat[index], index.to(torch.int32)


def scatter(values: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """The dense tensor with zeros where ``select`` dropped."""
    flat = values.new_zeros(shape.numel())
    return flat.scatter_(0, index.to(torch.int64), values).reshape(shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float) -> Tensor:
        ctx.shape, ctx.has_bias = x.shape, bias is not None
        ctx.save_for_backward(*select(x, gamma), weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, index, weight = ctx.saved_tensors
        x = scatter(values, index, ctx.shape).flatten(0, -2)
        flat = grad.flatten(0, -2)
        return grad @ weight, flat.t() @ x, flat.sum(0) if ctx.has_bias else None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, weight: Tensor, gamma: float) -> Tensor:
        ctx.shape, ctx.layer = x.shape, layer
        ctx.save_for_backward(*select(x, gamma), weight)
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, index, weight = ctx.saved_tensors
        layer = ctx.layer
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad,
            scatter(values, index, ctx.shape),
            weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0, 0],
            layer.groups,
            [ctx.needs_input_grad[0], True, False],
        )
        return dx, None, dw, None


def to_published(model: nn.Module, gamma: float) -> nn.Module:
    """Replaces the forward of each Linear and bias-free Conv2d of ``model``, in place."""
    for name, module in model.named_modules():
        if matches(name, EXCLUDED):
            continue
        if type(module) is nn.Linear:
            module.forward = lambda x, m=module: _Linear.apply(x, m.weight, m.bias, gamma)  # type: ignore[method-assign,misc]
        elif type(module) is nn.Conv2d and module.bias is None:
            module.forward = lambda x, m=module: _Conv2d.apply(x, m, m.weight, gamma)  # type: ignore[method-assign,misc]
    return model
