"""How the rows of the op table run: each op as a function of named arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.private import (
    batch_norm_impl_index,
    cudnn_reserve_nbytes,
    suggest_memory_format,
    tag_activation_checkpoint,
)


def checkpoint(body: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return tag_activation_checkpoint(body, *inputs, **options)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(input, other)


def mm(input: Tensor, mat2: Tensor) -> Tensor:
    return torch.mm(input, mat2)


def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    return torch.bmm(input, mat2)


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return torch.baddbmm(input, batch1, batch2, beta=beta, alpha=alpha)


def conv(dims: int) -> Callable[..., Tensor]:
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


def conv_transpose(dims: int) -> Callable[..., Tensor]:
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


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu(input)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    return F.hardtanh(input, min_val, max_val)


def hardtanh_saving(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result says where it was cut, unless a bound is none of the numbers of its dtype."""
    out = F.hardtanh(input, min_val, max_val)
    if _holds(input.dtype, min_val) and _holds(input.dtype, max_val):
        return out, {}
    slope = torch.ops.aten.hardtanh_backward(torch.ones_like(input), input, min_val, max_val)
    return out, {"result": slope != 0}


def _holds(dtype: torch.dtype, bound: float) -> bool:
    """Whether a short dtype has this very number; longer ones round it in one way everywhere."""
    if dtype not in (torch.bfloat16, torch.float16) or bound in (0.0, math.inf, -math.inf):
        return True
    info = torch.finfo(dtype)
    if not info.smallest_normal <= abs(bound) <= info.max:
        return False
    # rounded to its significand (Dekker): arithmetic that a compiler can do as it traces
    far = bound * (2.0**52 * info.eps + 1)
    return far - (far - bound) == bound


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return F.leaky_relu(input, negative_slope)


def leaky_relu_saving(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    return F.leaky_relu(input, negative_slope), {"input": input > 0}


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return F.dropout(input, p, training)


def dropout_saving(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    if inplace and input.is_cuda:  # other random numbers there than those of the fused kernel
        scaled = torch.empty_like(input).bernoulli_(1 - p).div_(1 - p)
        return input * scaled, {"mask": scaled != 0}
    # draws the same random numbers as F.dropout, whose own saved tensor is a mask of floats
    out, mask = torch.native_dropout(input, p, True)
    return out, {"mask": mask}


def max_pool(dims: int) -> Callable[..., Tensor]:
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


# Pointwise nonlinearities


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(input, approximate=approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.silu(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    return F.mish(input)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return F.elu(input, alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.selu(input)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return F.celu(input, alpha)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return F.softplus(input, beta, threshold)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    return F.hardswish(input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.hardsigmoid(input)


def logsigmoid(input: Tensor) -> Tensor:
    return F.logsigmoid(input)


def softsign(input: Tensor) -> Tensor:
    return F.softsign(input)


def sigmoid(input: Tensor) -> Tensor:
    return torch.sigmoid(input)


def tanh(input: Tensor) -> Tensor:
    return torch.tanh(input)


def exp(input: Tensor) -> Tensor:
    return torch.exp(input)


def sin(input: Tensor) -> Tensor:
    return torch.sin(input)


def cos(input: Tensor) -> Tensor:
    return torch.cos(input)


# Masks


def clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return torch.clamp(input, min, max)


def _passes_at_bounds() -> bool:
    """Whether this PyTorch hands on a gradient at the very bound: it has not always been so."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor([-1.0, 1.0], requires_grad=True)
        (slope,) = torch.autograd.grad(torch.clamp(x, -1, 1).sum(), x)
    return bool(slope.all())


_PASSES_AT_BOUNDS = _passes_at_bounds()


def clamp_saving(
    input: Tensor, min: Any = None, max: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    passed = torch.ones_like(input, dtype=torch.bool)
    if min is not None:
        passed = input >= min if _PASSES_AT_BOUNDS else input > min
    if max is not None:
        passed = passed & (input <= max if _PASSES_AT_BOUNDS else input < max)
    return torch.clamp(input, min, max), {"input": passed}


def where(condition: Tensor, input: Any, other: Any) -> Tensor:
    return torch.where(condition, input, other)


def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    return torch.masked_fill(input, mask, value)


# Indices


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.index_select(input, dim, index)


def gather(input: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    return torch.gather(input, dim, index, sparse_grad=sparse_grad)


# Arithmetic


def add(input: Any, other: Any, alpha: Any = 1) -> Tensor:
    return torch.add(input, other, alpha=alpha)


def sub(input: Any, other: Any, alpha: Any = 1) -> Tensor:
    return torch.sub(input, other, alpha=alpha)


def mul(input: Any, other: Any, inplace: bool = False) -> Tensor:
    return _arithmetic(torch.mul, input, other, inplace)


def div(input: Any, other: Any, inplace: bool = False) -> Tensor:
    return _arithmetic(torch.div, input, other, inplace)


def pow(input: Any, exponent: Any, inplace: bool = False) -> Tensor:
    return _arithmetic(torch.pow, input, exponent, inplace)


def _arithmetic(op: Callable[..., Tensor], input: Any, other: Any, inplace: bool) -> Tensor:
    """What is written in place keeps its dtype; autocast has no say in it."""
    if not inplace or not isinstance(input, Tensor):
        return op(input, other)
    device = input.device.type
    lowered = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if lowered else nullcontext():
        return op(input, other).to(input.dtype)


def to(input: Tensor) -> Tensor:
    """``input`` itself: a value that is made again takes the dtype of the one it stands for."""
    return input


# Normalisation: the statistics are made once, and kept as they are.


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def layer_norm_saving(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, dict[str, Tensor]]:
    out, mean, rstd = torch.native_layer_norm(input, list(normalized_shape), weight, bias, eps)
    return out, {"mean": mean, "rstd": rstd}


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return F.group_norm(input, num_groups, weight, bias, eps)


def group_norm_saving(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, dict[str, Tensor]]:
    n, channels = input.shape[:2]
    x = input.contiguous(memory_format=group_format(input))
    out, mean, rstd = torch.native_group_norm(
        x, weight, bias, n, channels, cells(input.shape), num_groups, eps
    )
    return out, {"mean": mean, "rstd": rstd}


def group_format(x: Tensor) -> torch.memory_format:
    """The layout that PyTorch computes a group norm in: on a CPU, channels may come last."""
    return suggest_memory_format(x) if x.device.type == "cpu" else torch.contiguous_format


def cells(shape: Any) -> Any:
    """Elements of one channel."""
    count = 1
    for size in shape[2:]:
        count = count * size
    return count


def rms_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return F.rms_norm(input, list(normalized_shape), weight, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_saving(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, dict[str, Tensor]]:
    # what F.batch_norm itself calls: on CUDA it takes cuDNN's kernel or the native one
    out, mean, invstd, reserve, _ = batch_norm_impl_index(
        input, weight, bias, running_mean, running_var, training, momentum, eps, _cudnn_enabled()
    )
    return out, {"mean": mean, "invstd": invstd, "reserve": reserve}


def _cudnn_enabled() -> bool:
    return bool(torch.backends.cudnn.enabled)


def reserve_nbytes(args: Mapping[str, Any]) -> int:
    """Bytes of what cuDNN's batch norm hands to its backward, which a fake tensor leaves out."""
    x = args["input"]
    return cudnn_reserve_nbytes(x) if x.is_cuda and args["training"] else 0


def layer_norm_again(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    """From statistics that are kept: one pass over ``input``, no sums."""
    if mean is None or rstd is None:
        return layer_norm(input, normalized_shape, weight, bias, eps)
    out = (input - mean).mul_(rstd)  # in place from here on: one tensor is alive, not four
    out = out if weight is None else out.mul_(weight)
    out = out if bias is None else out.add_(bias)
    return out.to(input.dtype)


def batch_norm_again(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    invstd: Tensor | None = None,
) -> Tensor:
    """From the statistics of the batch, which is not counted into the running ones again."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if mean is None or invstd is None:
        return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    across = [1, -1] + [1] * (input.dim() - 2)
    return (input * scale.view(across)).add_(shift.view(across)).to(input.dtype)


# Attention and losses


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.softmax(input, dim, dtype)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.log_softmax(input, dim, dtype)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Any = "mean",
) -> Tensor:
    out: Tensor = torch.ops.aten.nll_loss_nd(
        input, target, weight, reduction_enum(reduction), ignore_index
    )
    return out


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Any = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    out: Tensor = torch.ops.aten.cross_entropy_loss(
        input, target, weight, reduction_enum(reduction), ignore_index, label_smoothing
    )
    return out


def cross_entropy_saving(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Any = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs = torch.log_softmax(input, class_dim(input))
    out = nll_loss(log_probs, target, weight, ignore_index=ignore_index, reduction=reduction)
    return out, {"log_probs": log_probs}


def class_dim(input: Tensor) -> int:
    """The dimension of the classes: the second, or the only one."""
    return 0 if input.dim() == 1 else 1


def reduction_enum(reduction: Any) -> int:
    """``"mean"`` as ATen's number for it."""
    if isinstance(reduction, int):
        return reduction
    return {"none": 0, "mean": 1, "sum": 2}[reduction]


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    stride = kernel_size if stride is None else stride
    return F.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool(dims: int) -> Callable[..., Tensor]:
    """Of 2 or 3 dimensions: that of 1 knows no divisor."""
    op = (F.avg_pool2d, F.avg_pool3d)[dims - 2]

    def avg_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        return op(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )

    return avg_pool


def adaptive_avg_pool(dims: int) -> Callable[..., Tensor]:
    op = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]

    def adaptive_avg_pool(input: Tensor, output_size: Any) -> Tensor:
        return op(input, output_size)

    return adaptive_avg_pool


def pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    return F.pad(input, list(pad), mode, value)
