"""The op table: one row for each op that can be packed.

What autograd saves for *every other* op is asked of autograd itself (``passes/find_saved.py``), so
an op without a row is counted exactly and kept whole. To add an op, add a row: its spellings, what
its backward reads, how to run it, and a formula from ``backwards.py`` (or none: the generic
``torch.func.vjp`` then serves).
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dropit_fx.kernels.format import index_bits
from dropit_fx.ops import backwards as bw
from dropit_fx.ops import runs
from dropit_fx.ops.pooling import max_pool_backward, max_pool_saving, packable, window_bits
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use
from dropit_fx.private import (
    CHECKPOINT_CONTEXT,
    STACKLEVEL,
    OpOverload,
    c_nn,
    schema,
    tag_activation_checkpoint,
    to_copy,
)

aten = torch.ops.aten


def _one_bit(args: Mapping[str, Any]) -> int:
    return 1


def _product(left: str, right: str) -> tuple[Read, ...]:
    """The reads of a GEMM: each operand, for the gradient of the other."""
    return (
        Read(operand=left, use=Use.CONTRACT, needed_by=(right,)),
        Read(operand=right, use=Use.CONTRACT, needed_by=(left,)),
    )


def _layer() -> tuple[Read, ...]:
    """The reads of linear and convolution: the weight stays exact, so that dX does."""
    return (
        Read(operand="input", use=Use.CONTRACT, needed_by=("weight",)),
        Read(operand="weight", use=Use.CONTRACT, needed_by=("input",), lossy=False),
    )


def _piecewise(
    name: str,
    operand: str,
    targets: tuple[Any, ...],
    between: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None,
    **row: Any,
) -> OpRule:
    """A row of a piecewise-linear function: one bit says which of its two slopes holds."""
    read = Read(
        operand=operand, use=Use.SLOPE, needed_by=("input",), bits=_one_bit, between=between
    )
    return OpRule(name=name, targets=targets, reads=(read,), **row)


def _smooth(
    name: str,
    targets: tuple[Any, ...],
    *,
    operand: str = "input",
    function: Callable[[Mapping[str, Any]], str] | None = None,
    inside: bool = False,
    **row: Any,
) -> OpRule:
    """A row of a smooth pointwise function: what is read gives the slope, element by element."""
    read = Read(
        operand=operand,
        use=Use.SLOPE,
        needed_by=("input",),
        function=function or (lambda args: name),
    )
    reads = (read, Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)))[: 1 + inside]
    run = getattr(runs, name)
    return OpRule(name=name, targets=targets, reads=reads, run=run, derive=run, **row)


def _standard(name: str, **defaults: Any) -> Callable[[Mapping[str, Any]], str]:
    """Names the table of ``name`` where the call has its standard parameters."""
    return lambda args: name if all(args[k] == v for k, v in defaults.items()) else ""


def _norm(*statistics: str, by_channel: bool = False) -> tuple[Read, ...]:
    """The reads of a normalisation: its input, and what was computed from the exact input."""
    both = ("input", "weight")
    exact = [
        Read(operand=s, use=Use.REDUCE, needed_by=both, lossy=False, like="") for s in statistics
    ]
    return (
        Read(operand="input", use=Use.REDUCE, needed_by=both, by_channel=by_channel),
        Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
        *exact,
    )


def _full_size(operand: str) -> Callable[[Mapping[str, Any]], bool]:
    """False for an operand that is broadcast: a scale of many elements, and small."""
    return lambda args: bool(args[operand].numel() == args["result"].numel())


def _number_over_tensor(args: Mapping[str, Any]) -> str:
    if isinstance(args["input"], Tensor):
        return ""
    return "a number over a tensor is computed, and saved, through the reciprocal"


def _no_attention_dropout(args: Mapping[str, Any]) -> str:
    if args["dropout_p"]:
        return "attention dropout: its random state would have to be replayed in the backward"
    return ""


def _plain_cross_entropy(args: Mapping[str, Any]) -> str:
    if args["target"].is_floating_point():
        return "its targets are probabilities"
    if args["weight"] is not None or args["label_smoothing"]:
        return "class weights and label smoothing read more than the logarithms"
    return _deprecated_reduction(args)


def _deprecated_reduction(args: Mapping[str, Any]) -> str:
    if args["size_average"] is not None or args["reduce"] is not None:
        return "it is called with deprecated arguments"
    return ""


def _dropout_draws(args: Mapping[str, Any]) -> str:
    return "" if args["training"] and 0 < args["p"] < 1 else "this dropout draws no mask"


def _selective(args: Mapping[str, Any]) -> str:
    if CHECKPOINT_CONTEXT in args["body"].meta:
        return "a selective checkpoint looks values up by the ops of its forward"
    return ""


def _plain_where(args: Mapping[str, Any]) -> str:
    both = [args[n].dtype for n in ("input", "other") if isinstance(args[n], Tensor)]
    return "" if len(set(both)) <= 1 else "it joins two dtypes"


def _no_cast(args: Mapping[str, Any]) -> str:
    x, out = args["input"], args["result"]
    floats = x.is_floating_point() and out.is_floating_point()
    if not floats or x.dtype == out.dtype or x.device != out.device:
        return "it is no cast from one floating-point dtype to another"
    return ""


def _indices(operand: str, table: str, bits: Callable[[Mapping[str, Any]], int]) -> Read:
    return Read(operand=operand, use=Use.SLOPE, needed_by=(table,), bits=bits, like=operand)


def _plain_embedding(args: Mapping[str, Any]) -> str:
    if args["max_norm"] is not None:
        return "it renormalises its weight"
    if args["padding_idx"] is not None and args["padding_idx"] < 0:
        return "its padding index is negative, which its spellings read differently"
    return ""


def _any_index(args: Mapping[str, Any]) -> int:
    return 32  # what it indexes may be larger in the next call


def _adaptive_spellings(d: int) -> tuple[Any, ...]:
    name = f"adaptive_avg_pool{d}d"
    plain = (torch.adaptive_avg_pool1d,) if d == 1 else (c_nn(name),)
    return (getattr(F, name), *plain, getattr(aten, name).default)


# Ops whose backward reads nothing but the shape of their input: name, run, spellings.
_SHAPE_ONLY: tuple[tuple[str, Callable[..., Any], tuple[Any, ...]], ...] = (
    ("pad", runs.pad, (F.pad, c_nn("pad"), aten.pad.default)),
    ("avg_pool1d", runs.avg_pool1d, (F.avg_pool1d, torch.avg_pool1d, aten.avg_pool1d.default)),
    (
        "avg_pool3d",
        runs.avg_pool(3),
        (F.avg_pool3d, aten.avg_pool3d.default),
    ),
    *(
        (f"adaptive_avg_pool{d}d", runs.adaptive_avg_pool(d), _adaptive_spellings(d))
        for d in (1, 2, 3)
    ),
)

_CLAMPS_FROM_BELOW, _CLAMPS_FROM_ABOVE = (
    (
        *(getattr(torch, name), getattr(torch, f"{name}_"), name, f"{name}_"),
        *(getattr(aten, name).default, getattr(aten, f"{name}_").default),
    )
    for name in ("clamp_min", "clamp_max")
)
_ATTENDS = ("query", "key", "value", "attn_mask")

OP_RULES: tuple[OpRule, ...] = (
    OpRule(
        name="linear",
        targets=(F.linear, aten.linear.default),
        reads=_layer(),
        run=runs.linear,
        backward=bw.linear,
        autocast="lower",
    ),
    *(
        OpRule(
            name=f"conv{d}d",
            targets=(
                getattr(torch, f"conv{d}d"),
                getattr(aten, f"conv{d}d").default,
                getattr(aten, f"conv{d}d").padding,
            ),
            reads=_layer(),
            run=runs.conv(d),
            backward=bw.convolution(d, transposed=False),
            autocast="lower",
        )
        for d in (1, 2, 3)
    ),
    *(
        OpRule(
            name=f"conv_transpose{d}d",
            targets=(
                getattr(torch, f"conv_transpose{d}d"),
                getattr(aten, f"conv_transpose{d}d").default
                if d == 1
                else getattr(aten, f"conv_transpose{d}d").input,
            ),
            reads=_layer(),
            run=runs.conv_transpose(d),
            backward=bw.convolution(d, transposed=True),
            autocast="lower",
        )
        for d in (1, 2, 3)
    ),
    OpRule(
        name="matmul",
        targets=(
            torch.matmul,
            operator.matmul,
            "matmul",
            "__matmul__",
            aten.matmul.default,
        ),
        reads=_product("input", "other"),
        run=runs.matmul,
        backward=bw.matmul,
        autocast="lower",
    ),
    OpRule(
        name="mm",
        targets=(torch.mm, "mm", aten.mm.default),
        reads=_product("input", "mat2"),
        run=runs.mm,
        backward=bw.mm,
        autocast="lower",
    ),
    OpRule(
        name="bmm",
        targets=(torch.bmm, "bmm", aten.bmm.default),
        reads=_product("input", "mat2"),
        run=runs.bmm,
        backward=bw.bmm,
        autocast="lower",
    ),
    OpRule(  # also Hugging Face's Conv1D
        name="addmm",
        targets=(torch.addmm, "addmm", aten.addmm.default),
        reads=_product("mat1", "mat2"),
        run=runs.addmm,
        backward=bw.addmm,
        autocast="lower",
    ),
    OpRule(
        name="baddbmm",
        targets=(torch.baddbmm, "baddbmm", aten.baddbmm.default),
        reads=_product("batch1", "batch2"),
        run=runs.baddbmm,
        backward=bw.baddbmm,
        autocast="lower",
    ),
    _piecewise(
        "relu",
        "result",
        (F.relu, torch.relu, torch.relu_, "relu", "relu_", aten.relu.default, aten.relu_.default),
        between=lambda args: (0.0, None),
        run=runs.relu,
        derive=runs.relu,
        backward=bw.masked("result"),
    ),
    _piecewise(
        "relu6",
        "result",
        (F.relu6, aten.relu6.default, aten.relu6_.default),
        between=lambda args: (0.0, 6.0),
        run=runs.relu6,
        derive=runs.relu6,
        backward=bw.masked("result"),
    ),
    _piecewise(
        "hardtanh",
        "result",
        (F.hardtanh, F.hardtanh_, aten.hardtanh.default, aten.hardtanh_.default),
        between=lambda args: (args["min_val"], args["max_val"]),
        run=runs.hardtanh,
        run_saving=runs.hardtanh_saving,
        derive=runs.hardtanh,
        backward=bw.masked("result"),
    ),
    _piecewise(
        "leaky_relu",
        "input",
        (F.leaky_relu, F.leaky_relu_, aten.leaky_relu.default, aten.leaky_relu_.default),
        run=runs.leaky_relu,
        derive=runs.leaky_relu,
        run_saving=runs.leaky_relu_saving,
        backward=bw.leaky_relu,
    ),
    OpRule(
        name="dropout",
        targets=(
            F.dropout,
            torch.dropout,
            torch.dropout_,
            aten.dropout.default,
            aten.dropout_.default,
        ),
        orders=dict.fromkeys((torch.dropout_, aten.dropout_.default), ("input", "p", "training")),
        reads=(Read(operand="mask", use=Use.SLOPE, needed_by=("input",), bits=_one_bit),),
        run=runs.dropout,
        run_saving=runs.dropout_saving,
        backward=bw.dropout,
        obstacle=_dropout_draws,
    ),
    *(
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
            run=runs.max_pool(d),
            run_saving=max_pool_saving(d),
            backward=max_pool_backward(d),
            obstacle=packable(d),
        )
        for d in (1, 2, 3)
    ),
    _smooth(
        "gelu",
        (F.gelu, aten.gelu.default),
        function=lambda args: "gelu_tanh" if args["approximate"] == "tanh" else "gelu",
        backward=bw.gelu,
    ),
    _smooth(
        "silu",
        (F.silu, aten.silu.default, aten.silu_.default),
        backward=bw.pointwise(aten.silu_backward),
    ),
    _smooth(
        "mish",
        (F.mish, aten.mish.default, aten.mish_.default),
        backward=bw.pointwise(aten.mish_backward),
    ),
    _smooth(
        "elu",
        (F.elu, F.elu_, aten.elu.default, aten.elu_.default),
        function=_standard("elu", alpha=1.0),
        backward=bw.elu,
    ),
    _smooth(
        "selu",
        (F.selu, torch.selu, torch.selu_, aten.selu.default, aten.selu_.default),
    ),
    _smooth(
        "celu",
        (F.celu, torch.celu, torch.celu_, aten.celu.default, aten.celu_.default),
        function=_standard("celu", alpha=1.0),
    ),
    _smooth(
        "softplus",
        (F.softplus, aten.softplus.default),
        function=_standard("softplus", beta=1, threshold=20),
        backward=bw.pointwise(aten.softplus_backward, "beta", "threshold"),
    ),
    _smooth(
        "hardswish",
        (F.hardswish, aten.hardswish.default, aten.hardswish_.default),
        backward=bw.pointwise(aten.hardswish_backward),
    ),
    _smooth(
        "hardsigmoid",
        (F.hardsigmoid, aten.hardsigmoid.default, aten.hardsigmoid_.default),
        backward=bw.pointwise(aten.hardsigmoid_backward),
    ),
    _smooth("logsigmoid", (F.logsigmoid, aten.log_sigmoid.default), inside=True),
    _smooth("softsign", (F.softsign,), inside=True),
    _smooth(
        "sigmoid",
        (torch.sigmoid, F.sigmoid, "sigmoid", aten.sigmoid.default),
        operand="result",
        function=lambda args: "sigmoid of result",
        backward=bw.pointwise(aten.sigmoid_backward, operand="result"),
    ),
    _smooth(
        "tanh",
        (torch.tanh, F.tanh, "tanh", aten.tanh.default),
        operand="result",
        function=lambda args: "tanh of result",
        backward=bw.pointwise(aten.tanh_backward, operand="result"),
    ),
    *(
        OpRule(
            name=name,
            targets=(getattr(torch, name), name, getattr(aten, name).default),
            reads=(Read(operand=operand, use=Use.SLOPE, needed_by=("input",)),),
            run=getattr(runs, name),
            derive=getattr(runs, name),
            backward=bw.exp if name == "exp" else None,
        )
        for name, operand in (("exp", "result"), ("sin", "input"), ("cos", "input"))
    ),
    OpRule(
        name="clamp",
        targets=(
            *(torch.clamp, torch.clip, "clamp", "clip", aten.clamp.default),
            *(torch.clamp_, "clamp_", "clip_", aten.clamp_.default),
            *_CLAMPS_FROM_BELOW,
            *_CLAMPS_FROM_ABOVE,
        ),
        orders=dict.fromkeys(_CLAMPS_FROM_ABOVE, ("input", "max")),
        reads=(Read(operand="input", use=Use.SLOPE, needed_by=("input",), bits=_one_bit),),
        run=runs.clamp,
        run_saving=runs.clamp_saving,
        backward=bw.masked("input"),
        derive=runs.clamp,
        obstacle=lambda args: (
            "its bounds are tensors"
            if isinstance(args["min"], Tensor) or isinstance(args["max"], Tensor)
            else ""
        ),
    ),
    OpRule(
        name="where",
        targets=(torch.where, "where", aten.where.self),
        orders={"where": ("input", "condition", "other")},
        reads=(
            Read(
                operand="condition",
                use=Use.SLOPE,
                needed_by=("input", "other"),
                bits=_one_bit,
                like="condition",
            ),
        ),
        run=runs.where,
        backward=bw.where,
        derive=runs.where,
        obstacle=_plain_where,
    ),
    OpRule(
        name="masked_fill",
        targets=(
            torch.masked_fill,
            "masked_fill",
            "masked_fill_",
            aten.masked_fill.Scalar,
            aten.masked_fill_.Scalar,
        ),
        reads=(
            Read(operand="mask", use=Use.SLOPE, needed_by=("input",), bits=_one_bit, like="mask"),
        ),
        run=runs.masked_fill,
        backward=bw.masked_fill,
        derive=runs.masked_fill,
        obstacle=lambda args: "its value is a tensor" if isinstance(args["value"], Tensor) else "",
    ),
    OpRule(
        name="mul",
        targets=(
            *(operator.mul, torch.mul, "mul", "__mul__", aten.mul.Tensor),
            *(operator.imul, "mul_", "__imul__", aten.mul_.Tensor),
        ),
        reads=(
            Read(operand="input", use=Use.REDUCE, needed_by=("other",), lossy=_full_size("input")),
            Read(operand="other", use=Use.REDUCE, needed_by=("input",), lossy=_full_size("other")),
        ),
        run=runs.mul,
        backward=bw.mul,
        derive=runs.mul,
    ),
    OpRule(
        name="div",
        targets=(
            *(operator.truediv, torch.div, "div", "__truediv__", aten.div.Tensor),
            *(operator.itruediv, "div_", "__itruediv__", aten.div_.Tensor),
        ),
        reads=(
            Read(operand="input", use=Use.REDUCE, needed_by=("other",), lossy=_full_size("input")),
            # near zero, a small change of the divisor is a large one of the gradient
            Read(operand="other", use=Use.REDUCE, needed_by=("input", "other"), lossy=False),
        ),
        run=runs.div,
        derive=runs.div,
        obstacle=_number_over_tensor,
    ),
    OpRule(
        name="pow",
        targets=(
            *(operator.pow, torch.pow, "pow", "__pow__", aten.pow.Tensor_Scalar),
            *(operator.ipow, "pow_", "__ipow__", aten.pow_.Scalar),
        ),
        reads=(
            Read(
                operand="input",
                use=Use.REDUCE,
                needed_by=("input",),
                lossy=lambda args: args["exponent"] >= 1,  # below, the slope at 0 has no bound
            ),
        ),
        run=runs.pow,
        derive=runs.pow,
        obstacle=lambda args: (
            "" if isinstance(args["exponent"], int | float) else "its exponent is a tensor"
        ),
    ),
    OpRule(
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
        run=runs.layer_norm,
        run_saving=runs.layer_norm_saving,
        backward=bw.layer_norm,
        derive=runs.layer_norm_again,
    ),
    OpRule(
        name="group_norm",
        targets=(F.group_norm, torch.group_norm, aten.group_norm.default),
        orders=dict.fromkeys(
            (torch.group_norm, aten.group_norm.default),
            ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
        ),
        reads=_norm("mean", "rstd", by_channel=True),
        run=runs.group_norm,
        run_saving=runs.group_norm_saving,
        backward=bw.group_norm,
        derive=runs.group_norm,
    ),
    OpRule(  # PyTorch computes it from simpler ops, whose saved tensors are made again
        name="rms_norm",
        targets=(F.rms_norm, torch.rms_norm, aten.rms_norm.default),
        reads=(
            Read(operand="input", use=Use.REDUCE, needed_by=("input", "weight")),
            Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
            Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input", "weight")),
        ),
        run=runs.rms_norm,
        derive=runs.rms_norm,
    ),
    OpRule(
        name="batch_norm",
        targets=(F.batch_norm, torch.batch_norm, aten.batch_norm.default),
        orders=dict.fromkeys(
            (torch.batch_norm, aten.batch_norm.default),
            (
                "input",
                "weight",
                "bias",
                "running_mean",
                "running_var",
                "training",
                "momentum",
                "eps",
                "cudnn_enabled",
            ),
        ),
        reads=(
            *_norm("mean", "invstd", by_channel=True),
            Read(
                operand="reserve",
                use=Use.REDUCE,
                needed_by=("input", "weight"),
                lossy=False,
                like="",
                nbytes=runs.reserve_nbytes,
            ),
            # of the statistics, only eval mode reads values
            Read(
                operand="running_mean", use=Use.REDUCE, needed_by=("input", "weight"), lossy=False
            ),
            Read(operand="running_var", use=Use.REDUCE, needed_by=("input", "weight"), lossy=False),
        ),
        run=runs.batch_norm,
        run_saving=runs.batch_norm_saving,
        backward=bw.batch_norm,
        derive=runs.batch_norm_again,
        obstacle=lambda args: "" if args["input"].numel() else "its batch is empty",
    ),
    OpRule(
        name="scaled_dot_product_attention",
        targets=(F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default),
        reads=(
            *[Read(operand=n, use=Use.REDUCE, needed_by=_ATTENDS) for n in _ATTENDS[:3]],
            Read(operand="attn_mask", use=Use.REDUCE, needed_by=_ATTENDS, lossy=False),
            Read(operand="result", use=Use.SHAPE, needed_by=_ATTENDS),
            Read(operand=INSIDE, use=Use.SHAPE, needed_by=_ATTENDS),
        ),
        run=runs.scaled_dot_product_attention,
        backward=bw.attention,
        autocast="lower",
        obstacle=_no_attention_dropout,
    ),
    *(
        OpRule(
            name=name,
            targets=(
                getattr(F, name),
                getattr(torch, name),
                name,
                getattr(aten, name).int,
            ),
            orders={getattr(F, name): ("input", "dim", STACKLEVEL, "dtype")},
            reads=(Read(operand="result", use=Use.REDUCE, needed_by=("input",)),),
            run=getattr(runs, name),
            backward=bw.softmax(log=name == "log_softmax"),
        )
        for name in ("softmax", "log_softmax")
    ),
    OpRule(
        name="nll_loss",
        targets=(F.nll_loss, aten.nll_loss_nd.default),
        orders={
            aten.nll_loss_nd.default: ("input", "target", "weight", "reduction", "ignore_index")
        },
        reads=(
            Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
            Read(operand="target", use=Use.REDUCE, needed_by=("input",), lossy=False),
            Read(operand="weight", use=Use.REDUCE, needed_by=("input",), lossy=False),
            Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
        ),
        run=runs.nll_loss,
        obstacle=_deprecated_reduction,
    ),
    OpRule(
        name="cross_entropy",
        targets=(F.cross_entropy, aten.cross_entropy_loss.default),
        orders={
            aten.cross_entropy_loss.default: (
                "input",
                "target",
                "weight",
                "reduction",
                "ignore_index",
                "label_smoothing",
            )
        },
        reads=(
            Read(operand="log_probs", use=Use.REDUCE, needed_by=("input",), like="input"),
            Read(operand="target", use=Use.REDUCE, needed_by=("input",), lossy=False),
            Read(operand=INSIDE, use=Use.SHAPE, needed_by=("input",)),
        ),
        run=runs.cross_entropy,
        run_saving=runs.cross_entropy_saving,
        backward=bw.cross_entropy,
        obstacle=_plain_cross_entropy,
    ),
    OpRule(
        name="embedding",
        targets=(F.embedding, torch.embedding, aten.embedding.default),
        orders=dict.fromkeys(
            (torch.embedding, aten.embedding.default),
            ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
        ),
        reads=(_indices("input", "weight", lambda args: index_bits(args["weight"].shape[0])),),
        run=runs.embedding,
        backward=bw.embedding,
        obstacle=_plain_embedding,
    ),
    *(
        OpRule(
            name=name,
            targets=(getattr(torch, name), name, getattr(aten, name).default),
            reads=(
                _indices("index", "input", _any_index),
                Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
            )[:reads],
            run=getattr(runs, name),
            backward=getattr(bw, name),
        )
        for name, reads in (("index_select", 1), ("gather", 2))
    ),
    *(
        OpRule(
            name=name,
            targets=targets,
            reads=(Read(operand="input", use=Use.SHAPE, needed_by=("input",)),),
            run=run,
        )
        for name, run, targets in _SHAPE_ONLY
    ),
    OpRule(
        name="avg_pool2d",
        targets=(F.avg_pool2d, aten.avg_pool2d.default),
        reads=(Read(operand="input", use=Use.SHAPE, needed_by=("input",)),),
        run=runs.avg_pool(2),
        backward=bw.avg_pool2d,
    ),
)

_CASTS = (
    *("to", "type", "type_as", "float", "double", "half", "bfloat16"),
    *(getattr(aten.to, overload) for overload in ("dtype", "dtype_layout", "device", "other")),
    aten.type_as.default,
    to_copy.default,
)

_OF_CASTS = (
    *("dtype", "dst_type", "tensor", "other", "device", "layout", "pin_memory"),
    *("non_blocking", "copy", "memory_format"),
)

# Ops that save nothing: the rows are here for the values that are derived through them.
SAVES_NOTHING: tuple[OpRule, ...] = (
    *(
        OpRule(
            name=name,
            targets=(
                getattr(operator, name),
                getattr(operator, f"i{name}"),
                getattr(torch, name),
                name,
                f"{name}_",
                f"__{name}__",
                f"__i{name}__",
                getattr(aten, name).Tensor,
                getattr(aten, f"{name}_").Tensor,
            ),
            reads=(),
            run=getattr(runs, name),
            derive=getattr(runs, name),
        )
        for name in ("add", "sub")
    ),
    OpRule(
        name="to",
        targets=_CASTS,
        # to what it is cast, the result says
        orders=dict.fromkeys(_CASTS, ("input",)),
        ignored=frozenset(_OF_CASTS),
        reads=(),
        run=runs.to,
        derive=runs.to,
        obstacle=_no_cast,
    ),
)

# What is recomputed keeps its inputs. `packed_checkpoint` runs this row.
CHECKPOINT = OpRule(
    name="checkpoint",
    targets=(tag_activation_checkpoint,),
    reads=(Read(operand="inputs", use=Use.REDUCE, needed_by=("inputs",)),),
    run=runs.checkpoint,
    obstacle=_selective,
)

RULES: dict[str, OpRule] = {}
DERIVABLE: dict[str, OpRule] = {}
_BY_TARGET: dict[Any, OpRule] = {}
_DERIVABLE_BY_TARGET: dict[Any, OpRule] = {}


def add_row(rule: OpRule) -> None:
    """Makes a row known, under its name and under its targets."""
    if rule.reads:
        RULES[rule.name] = rule
        _BY_TARGET.update(dict.fromkeys(rule.targets, rule))
    if rule.derive:
        DERIVABLE[rule.name] = rule
        _DERIVABLE_BY_TARGET.update(dict.fromkeys(rule.targets, rule))


for _rule in (*OP_RULES, *SAVES_NOTHING, CHECKPOINT):
    add_row(_rule)

# Some spellings call an argument otherwise.
_ALIASES = {"self": "input", "train": "training", "mat1": "input", "batch1": "input"}


def rule_of(node: fx.Node) -> OpRule | None:
    """The row for a ``call_function`` or ``call_method`` node, or None."""
    return _row(_BY_TARGET, node)


def derivable_rule_of(node: fx.Node) -> OpRule | None:
    """The row by which the result of a node can be made again, or None."""
    return _row(_DERIVABLE_BY_TARGET, node)


def _row(rows: dict[Any, OpRule], node: fx.Node) -> OpRule | None:
    calls = node.op in ("call_function", "call_method")
    return rows.get(node.target) if calls and isinstance(node.target, Hashable) else None


_signature = functools.cache(inspect.signature)


def bind(
    rule: OpRule, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any = None
) -> dict[str, Any] | None:
    """Argument name -> value, defaults included, in the order of the row's signature.

    Arguments of a variadic ``*inputs`` are ``inputs.0``, ``inputs.1`` and so on.

    None where the call has arguments that the row does not know (``out=``), which keeps it dense.
    """
    # Dynamo traces no caches
    signature_of = inspect.signature if torch.compiler.is_compiling() else _signature
    signature = signature_of(rule.run)
    known = {(k if k in signature.parameters else _ALIASES.get(k, k)): v for k, v in kwargs.items()}
    order = rule.orders.get(target) if isinstance(target, Hashable) else None
    if order is not None:
        known |= dict(zip(order, args, strict=False))
        args = ()
    for name in rule.ignored - set(signature.parameters):
        known.pop(name, None)
    try:
        bound = signature.bind(*args, **known)
    except TypeError:
        return None
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}.{i}": v for i, v in enumerate(value)}
        else:
            named[name] = value
    if "inplace" in named and _writes(target):
        named["inplace"] = True
    return named


def reads_of(rule: OpRule, operands: Mapping[str, Any]) -> tuple[Read, ...]:
    """The reads of one call; a read of variadic arguments becomes one of each tensor."""
    found: list[Read] = []
    tensors = [n for n, value in operands.items() if isinstance(value, Tensor)]
    for read in rule.reads:
        each = tuple(n for n in tensors if n.startswith(f"{read.operand}."))
        found += [replace(read, operand=n, needed_by=each) for n in each] or [read]
    return tuple(found)


def inputs_of(rule: OpRule) -> tuple[str, ...]:
    """Names of the arguments of a row, in order."""
    return tuple(n for n in rule.run.__annotations__ if n != "return")


def is_inplace(node: fx.Node, args: Mapping[str, Any]) -> bool:
    """Whether the call writes into its input."""
    return bool(args.get("inplace")) or _writes(node.target)


# `h *= 2` and its like: the function of the operator and the method behind it
_AUGMENTED = frozenset(
    f"i{name}"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
)


def _writes(target: Any) -> bool:
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if isinstance(target, OpOverload):
        name = schema(target).name
    if name.endswith("__") or getattr(target, "__module__", "") == "_operator":
        return name.strip("_") in _AUGMENTED
    return name.endswith("_")
