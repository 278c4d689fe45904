"""Normalisations: the statistics are made once, from the exact input, and kept as they are.

The backward is ATen's own, on what is unpacked of the input and on those statistics. What PyTorch
computes from simpler ops (RMS and instance norms, norms of vectors) is made again from the input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops.backwards import Called, Grads, Saved, of_layer, optional
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use
from dropit_fx.private import batch_norm_impl_index, cudnn_reserve_nbytes, suggest_memory_format

aten = torch.ops.aten


def _norm(*statistics: str, by_channel: bool = False) -> tuple[Read, ...]:
    """The reads of a normalisation: its input, and what was computed from the exact input."""
    both = ("input", "weight")
    exact = [
        Read(operand=s, use=Use.REDUCE, needed_by=both, lossy=False, exact=True) for s in statistics
    ]
    return (
        Read(operand="input", use=Use.REDUCE, needed_by=both, by_channel=by_channel),
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
        *exact,
    )


def _layer_norm_saving(
    input: Tensor, normalized_shape: Any, *affine: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    out, mean, rstd = torch.native_layer_norm(input, list(normalized_shape), *affine)
    return out, {"mean": mean, "rstd": rstd}


def _layer_norm_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """ATen's own, with the statistics of the exact input."""
    return of_layer(
        aten.native_layer_norm_backward,
        call,
        grad.contiguous(),
        saved["input"],
        list(call.args["normalized_shape"]),
        saved["mean"],
        saved["rstd"],
        optional(saved, call, "weight"),
        optional(saved, call, "bias"),
    )


def _layer_norm_again(
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
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    out = (input - mean).mul_(rstd)  # in place from here on: one tensor is alive, not four
    out = out if weight is None else out.mul_(weight)
    out = out if bias is None else out.add_(bias)
    return out.to(input.dtype)


LAYER_NORM = OpRule(
    name="layer_norm",
    targets=(F.layer_norm, torch.layer_norm, aten.layer_norm.default),
    orders=dict.fromkeys(
        (torch.layer_norm, aten.layer_norm.default),
        ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    ),
    reads=(
        *_norm("mean", "rstd"),
        Read(operand="bias", use=Use.SHAPE, needed_by=("input", "weight")),
    ),
    run=F.layer_norm,
    run_saving=_layer_norm_saving,
    backward=_layer_norm_backward,
    derive=_layer_norm_again,
)


def _group_format(x: Tensor) -> torch.memory_format:
    """The layout that PyTorch computes a group norm in: on a CPU, channels may come last."""
    return suggest_memory_format(x) if x.device.type == "cpu" else torch.contiguous_format


def _cells(shape: Any) -> Any:
    """Elements of one channel."""
    count = 1
    for size in shape[2:]:
        count = count * size
    return count


def _group_norm_saving(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    x = input.contiguous(memory_format=_group_format(input))
    n, channels, cells = *input.shape[:2], _cells(input.shape)
    out, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, cells, num_groups, eps)
    return out, {"mean": mean, "rstd": rstd}


def _group_norm_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """ATen's own, with the statistics of the exact input."""
    shape, x = call.shapes["input"], saved["input"]
    layout = _group_format(x)
    return of_layer(
        aten.native_group_norm_backward,
        call,
        grad.contiguous(memory_format=layout),
        x.contiguous(memory_format=layout),
        saved["mean"],
        saved["rstd"],
        optional(saved, call, "weight"),
        shape[0],
        shape[1],
        _cells(shape),
        call.args["num_groups"],
    )


GROUP_NORM = OpRule(
    name="group_norm",
    targets=(F.group_norm, torch.group_norm, aten.group_norm.default),
    orders=dict.fromkeys(
        (torch.group_norm, aten.group_norm.default),
        ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
    ),
    reads=_norm("mean", "rstd", by_channel=True),
    run=F.group_norm,
    run_saving=_group_norm_saving,
    backward=_group_norm_backward,
    derive=F.group_norm,
)


RMS_NORM = OpRule(  # PyTorch computes it from simpler ops, whose saved tensors are made again
    name="rms_norm",
    targets=(F.rms_norm, torch.rms_norm, aten.rms_norm.default),
    reads=(
        Read(operand="input", use=Use.REDUCE, needed_by=("input", "weight")),
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input", "weight")),
    ),
    run=F.rms_norm,
    derive=F.rms_norm,
)


def _batch_norm_saving(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any, bias: Any, *settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    # what F.batch_norm itself calls: on CUDA it takes cuDNN's kernel or the native one
    tensors, cudnn = (input, weight, bias, running_mean, running_var), torch.backends.cudnn.enabled
    out, mean, invstd, reserve, _ = batch_norm_impl_index(*tensors, *settings, cudnn)
    return out, {"mean": mean, "invstd": invstd, "reserve": reserve}


def _reserve_nbytes(args: Mapping[str, Any]) -> int:
    """Bytes of what cuDNN's batch norm hands to its backward, which a fake tensor leaves out."""
    x = args["input"]
    return cudnn_reserve_nbytes(x) if x.is_cuda and args["training"] else 0


def _batch_norm_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """ATen's own, with the statistics of the exact input; the running ones in eval mode.

    On CUDA, in training and with weight and bias, it asks for the kernel as the forward did.
    """
    training = bool(call.args["training"])
    x = saved["input"]
    asks = x.is_cuda and training and {"weight", "bias"} <= call.shapes.keys()
    running = [
        optional(saved, call, n) if asks or not training else None
        for n in ("running_mean", "running_var")
    ]
    tensors = [optional(saved, call, "weight"), *running, saved["mean"], saved["invstd"]]
    settings = training, call.args["eps"]
    if not asks:
        return of_layer(aten.native_batch_norm_backward, call, grad, x, *tensors, *settings)

    def as_in_forward(*args: Any) -> Any:
        # a copy: cuDNN may write into it, and the backward works twice
        return aten.batch_norm_backward(*args, saved["reserve"].clone())

    layout = suggest_memory_format(x)
    both = [t.contiguous(memory_format=layout) for t in (grad, x)]
    return of_layer(as_in_forward, call, *both, *tensors, *settings)


def _batch_norm_again(
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


BATCH_NORM = OpRule(
    name="batch_norm",
    targets=(F.batch_norm, torch.batch_norm, aten.batch_norm.default),
    orders=dict.fromkeys(
        (torch.batch_norm, aten.batch_norm.default),
        (
            *("input", "weight", "bias", "running_mean", "running_var"),
            *("training", "momentum", "eps", "cudnn_enabled"),
        ),
    ),
    reads=(
        *_norm("mean", "invstd", by_channel=True),
        Read(
            operand="reserve",
            use=Use.REDUCE,
            needed_by=("input", "weight"),
            lossy=False,
            exact=True,
            nbytes=_reserve_nbytes,
        ),
        # of the statistics, only eval mode reads values
        Read(operand="running_mean", use=Use.REDUCE, needed_by=("input", "weight"), lossy=False),
        Read(operand="running_var", use=Use.REDUCE, needed_by=("input", "weight"), lossy=False),
    ),
    run=F.batch_norm,
    run_saving=_batch_norm_saving,
    backward=_batch_norm_backward,
    derive=_batch_norm_again,
    obstacle=lambda args: "" if args["input"].numel() else "its batch is empty",
)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    affine, running, cudnn = (
        (weight, bias),
        (running_mean, running_var),
        torch.backends.cudnn.enabled,
    )
    return torch.instance_norm(input, *affine, *running, use_input_stats, momentum, eps, cudnn)


def _running(args: Mapping[str, Any]) -> str:
    if args["running_mean"] is not None or args["running_var"] is not None:
        return "it counts running statistics, which a repeated call would count again"
    return ""


INSTANCE_NORM = OpRule(  # a batch norm of the channels of all samples, which is made again
    name="instance_norm",
    targets=(F.instance_norm, torch.instance_norm, aten.instance_norm.default),
    orders=dict.fromkeys(
        (torch.instance_norm, aten.instance_norm.default),
        (
            *("input", "weight", "bias", "running_mean", "running_var"),
            *("use_input_stats", "momentum", "eps", "cudnn_enabled"),
        ),
    ),
    reads=(
        *_norm(by_channel=True),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input", "weight")),
    ),
    run=_instance_norm,
    derive=_instance_norm,
    obstacle=_running,
)


def _vector_norm(
    input: Tensor,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    dtype: Any = None,
    out: Tensor | None = None,
) -> Tensor:
    order = 2 if ord in (None, "fro") else ord
    norm: Tensor = torch.linalg.vector_norm(input, order, dim, keepdim, dtype=dtype)
    return norm


def _not_of_vectors(args: Mapping[str, Any]) -> str:
    order, dim = args["ord"], args["dim"]
    if args["out"] is not None:
        return "it writes into out"
    if order == 0:
        return "ord=0 has no gradient"
    of_vectors = not isinstance(order, str) or (
        order == "fro" and (not isinstance(dim, list | tuple) or len(dim) <= 2)
    )
    return "" if of_vectors else f"ord={order!r} is no norm of vectors"


def _is_smooth(order: Any) -> bool:
    """Whether the slope of a p-norm moves little with its input: no sign, and no largest value."""
    return order in (None, "fro") or (not isinstance(order, str) and 1 < order < math.inf)


def _input_of(order: str) -> Read:
    """What is summed into a p-norm; ``order``: the argument that names p."""
    return Read(
        operand="input",
        use=Use.REDUCE,
        needed_by=("input",),
        lossy=lambda args: _is_smooth(args[order]),
    )


VECTOR_NORM = OpRule(
    name="vector_norm",
    targets=(torch.linalg.vector_norm, torch.norm, "norm", aten.linalg_vector_norm.default),
    reads=(
        _input_of("ord"),
        Read(operand="result", use=Use.SHAPE, needed_by=("input",)),  # it is made again
    ),
    run=_vector_norm,
    obstacle=_not_of_vectors,
)


def _normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    return F.normalize(input, p, dim, eps)


NORMALIZE = OpRule(
    name="normalize",
    targets=(F.normalize,),
    reads=(
        _input_of("p"),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
    ),
    run=_normalize,
    derive=_normalize,
    obstacle=lambda args: "" if args["out"] is None else "it writes into out",
)

ROWS = (LAYER_NORM, GROUP_NORM, RMS_NORM, BATCH_NORM, INSTANCE_NORM, VECTOR_NORM, NORMALIZE)
