"""The backward formulas that rows of the op table name.

With ``y = run(*args)`` and ``grad = dL/dy``, each formula has the signature
``(grad, saved, call) -> {argument: dL/dargument}``: ``saved[operand]`` unpacks a saved tensor when
it is first read, ``call`` holds the other arguments and what is asked for. They follow the products
and reductions of PyTorch's own formulas one for one, so that with a lossless codec every gradient
has the same bits:

* GEMM, ``Y = A B``:          ``dA = dY B^T``,  ``dB = A^T dY``
* linear, ``Y = X W^T + b``:  ``dX = dY W``,    ``dW = dY^T X``,  ``db = sum(dY)``
* convolution:                ``aten.convolution_backward``
* pointwise ``y = f(x)``:     ``dX = dY * f'(x)``

Where only X is packed, dX and db do not touch it: they are exact (DropIT, arXiv 2202.13808, section
3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dropit_fx.kernels import attention as attention_kernel
from dropit_fx.ops import runs
from dropit_fx.ops.rule import OpRule
from dropit_fx.private import (
    log_softmax_backward_data,
    softmax_backward_data,
    suggest_memory_format,
)

Grads = dict[str, Tensor | None]
aten = torch.ops.aten


class Call:
    """The arguments of one call that are not saved tensors, and which gradients are asked for.

    Attributes:
        rule: The row.
        args: Argument name -> value, with None in the place of each tensor.
        shapes: Argument name -> shape, for tensor arguments.
        strides: Argument name -> strides, for tensor arguments.
        dtypes: Argument name -> dtype, for tensor arguments.
        needs: The arguments whose gradients are wanted.
    """

    def __init__(
        self,
        rule: OpRule,
        args: dict[str, Any],
        shapes: dict[str, Any],
        strides: dict[str, Any],
        dtypes: dict[str, torch.dtype],
        needs: frozenset[str],
    ) -> None:
        self.rule = rule
        self.args = args
        self.shapes = shapes
        self.strides = strides
        self.dtypes = dtypes
        self.needs = needs


class Saved(Mapping[str, Tensor]):
    """What the op kept: operand -> dense tensor, unpacked when it is read."""

    def masked(self, operand: str, grad: Tensor, off: float = 0.0) -> Tensor:
        """``grad`` where the bits kept for ``operand`` are set, ``off * grad`` elsewhere."""
        raise NotImplementedError

    def rounded(self, operand: str) -> bool:
        """Whether ``operand`` differs from what the op read in the forward."""
        raise NotImplementedError


Formula = Callable[[Tensor, Saved, Call], Grads]


def vjp(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """The generic backward: ``torch.func.vjp`` of the row's ``run``. It repeats the forward."""
    wanted = tuple(n for n in call.shapes if n in call.needs)
    fixed = {n: call.args[n] for n in call.args if n not in call.shapes}
    fixed |= {n: saved[n] for n in call.shapes if n not in wanted}

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(wanted, tensors, strict=True))
        # positional, in signature order: some builtins take no keywords
        return call.rule.run(*[given[n] if n in given else fixed[n] for n in call.args])

    pull = torch.func.vjp(run, *[saved[n] for n in wanted])[1]
    return dict(zip(wanted, pull(grad), strict=True))


def _column_major(shape: Any, strides: Any) -> bool:
    return bool(strides[0] == 1 and strides[1] == shape[0])


def _contiguous(shape: Any, strides: Any) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def _left(grad: Tensor, b: Tensor, a_is_column_major: bool) -> Tensor:
    """``dA = dY B^T`` of a 2-D product; column-major where A is, as in autograd."""
    return b.mm(grad.t()).t() if a_is_column_major else grad.mm(b.t())


def _right(grad: Tensor, a: Tensor, b_is_column_major: bool) -> Tensor:
    """``dB = A^T dY`` of a 2-D product; column-major where B is."""
    return grad.t().mm(a).t() if b_is_column_major else a.t().mm(grad)


def _batch_by_batch(shape: Any, strides: Any) -> bool:
    """Whether a product of a batch and a matrix without gradient is one ``bmm``, not one ``mm``.

    ATen's ``matmul`` folds the batch into the rows where that is a view, or where the matrix wants
    a gradient; the two round differently on some processors.
    """
    rows = range(len(shape) - 2)
    view = all(strides[d] == strides[d + 1] * shape[d + 1] for d in rows)
    return len(shape) > 2 and not view and 0 not in shape


def linear(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``input: (*, in)``, ``weight: (out, in)``, ``bias: (out,)``, ``grad: (*, out)``."""
    if grad.dim() < 2 or len(call.shapes["weight"]) != 2:
        return vjp(grad, saved, call)
    out: Grads = {}
    flat = grad.flatten(0, -2)  # (rows, out)
    if "input" in call.needs:
        shape, strides = call.shapes["input"], call.strides["input"]
        if "weight" not in call.needs and _batch_by_batch(shape, strides):
            batch = grad.flatten(0, -3)  # (batch, rows, out)
            weight = saved["weight"].expand(batch.shape[0], -1, -1)
            out["input"] = batch.bmm(weight).reshape(shape)
        else:
            columns = grad.dim() == 2 and _column_major(shape, strides)
            out["input"] = _left(flat, saved["weight"].t(), columns).reshape(shape)
    if "weight" in call.needs:
        out["weight"] = flat.t().mm(saved["input"].flatten(0, -2))  # (out, rows) @ (rows, in)
    if "bias" in call.needs:
        # contiguous inputs go through addmm on the flat view, others through a broadcast add
        whole = _contiguous(call.shapes["input"], call.strides["input"])
        out["bias"] = (flat if whole else grad).sum_to_size(call.shapes["bias"])
    return out


def mm(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``input: (m, k)``, ``mat2: (k, n)``."""
    out: Grads = {}
    if "input" in call.needs:
        columns = _column_major(call.shapes["input"], call.strides["input"])
        out["input"] = _left(grad, saved["mat2"], columns)
    if "mat2" in call.needs:
        columns = _column_major(call.shapes["mat2"], call.strides["mat2"])
        out["mat2"] = _right(grad, saved["input"], columns)
    return out


def addmm(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``beta * input + alpha * (mat1: (m, k)) @ (mat2: (k, n))``; ``input`` broadcasts."""
    out: Grads = {}
    alpha, beta = call.args["alpha"], call.args["beta"]
    if "input" in call.needs:
        out["input"] = _scaled(grad, beta).sum_to_size(call.shapes["input"])
    if "mat1" in call.needs:
        columns = _column_major(call.shapes["mat1"], call.strides["mat1"])
        out["mat1"] = _scaled(_left(grad, saved["mat2"], columns), alpha)
    if "mat2" in call.needs:
        columns = _column_major(call.shapes["mat2"], call.strides["mat2"])
        out["mat2"] = _scaled(_right(grad, saved["mat1"], columns), alpha)
    return out


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def bmm(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``input: (b, m, k)``, ``mat2: (b, k, n)``."""
    out: Grads = {}
    if "input" in call.needs:
        out["input"] = grad.bmm(saved["mat2"].transpose(1, 2))
    if "mat2" in call.needs:
        out["mat2"] = saved["input"].transpose(1, 2).bmm(grad)
    return out


def baddbmm(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``beta * input + alpha * (batch1: (b, m, k)) @ (batch2: (b, k, n))``."""
    out: Grads = {}
    alpha, beta = call.args["alpha"], call.args["beta"]
    if "input" in call.needs:
        out["input"] = _scaled(grad, beta).sum_to_size(call.shapes["input"])
    if "batch1" in call.needs:
        out["batch1"] = _scaled(grad.bmm(saved["batch2"].transpose(1, 2)), alpha)
    if "batch2" in call.needs:
        out["batch2"] = _scaled(saved["batch1"].transpose(1, 2).bmm(grad), alpha)
    return out


def matmul(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``input: (*, m, k)``, ``other: (*, k, n)`` or ``(k, n)``.

    As ``torch.matmul`` does it: folded into one ``mm`` where ``other`` is a matrix, else one
    ``bmm``. How it folds batches that broadcast depends on more than their shapes: those repeat the
    forward.
    """
    a_shape, b_shape = call.shapes["input"], call.shapes["other"]
    one_batch = a_shape[:-2] == b_shape[:-2]
    if len(a_shape) < 2 or len(b_shape) < 2 or not (one_batch or len(b_shape) == 2):
        return vjp(grad, saved, call)
    out: Grads = {}
    if len(b_shape) == 2:
        flat = grad.flatten(0, -2)  # (rows, n)
        if "input" in call.needs:
            strides = call.strides["input"]
            if "other" not in call.needs and _batch_by_batch(a_shape, strides):
                batch = grad.flatten(0, -3)  # (batch, m, n)
                matrix = saved["other"].t().expand(batch.shape[0], -1, -1)
                out["input"] = batch.bmm(matrix).reshape(a_shape)
            else:
                columns = len(a_shape) == 2 and _column_major(a_shape, strides)
                out["input"] = _left(flat, saved["other"], columns).reshape(a_shape)
        if "other" in call.needs:
            columns = _column_major(b_shape, call.strides["other"])
            out["other"] = _right(flat, saved["input"].flatten(0, -2), columns)
        return out
    flat = grad.flatten(0, -3)  # (batch, m, n)
    if "input" in call.needs:
        b = saved["other"].flatten(0, -3)  # (batch, k, n)
        out["input"] = flat.bmm(b.transpose(1, 2)).reshape(a_shape)
    if "other" in call.needs:
        a = saved["input"].flatten(0, -3)  # (batch, m, k)
        out["other"] = a.transpose(1, 2).bmm(flat).reshape(b_shape)
    return out


def per_dimension(value: Any, dims: int) -> list[int]:
    """``3`` or ``(3,)`` or ``(3, 3)`` as one int for each dimension."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))


def convolution(dims: int, transposed: bool) -> Callable[[Tensor, Saved, Call], Grads]:
    """The backward of ``conv{dims}d``: ``input: (b, in, *)``, ``weight: (out, in / groups, *)``."""

    def ints(value: Any) -> list[int]:
        return per_dimension(value, dims)

    def backward(grad: Tensor, saved: Saved, call: Call) -> Grads:
        args = call.args
        if isinstance(args["padding"], str) or grad.dim() != dims + 2:
            return vjp(grad, saved, call)
        bias = call.shapes.get("bias")
        names = ("input", "weight", "bias")
        grads = aten.convolution_backward(
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
            [n in call.needs for n in names],
        )
        return dict(zip(names, grads, strict=True))

    return backward


def masked(operand: str) -> Formula:
    """The gradient where the bit of ``operand`` is set (relu sets it for NaN), 0 elsewhere."""

    def backward(grad: Tensor, saved: Saved, call: Call) -> Grads:
        return {"input": saved.masked(operand, grad)}

    return backward


def leaky_relu(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """The gradient where the bit is set, ``negative_slope`` times it elsewhere."""
    slope = call.args["negative_slope"]
    return {"input": torch.where(saved["input"], grad, grad * slope)}


def dropout(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``dX = dY * mask / (1 - p)``."""
    p = call.args["p"]
    scale = 0.0 if p == 1 else 1 / (1 - p)
    if (grad.is_cpu or call.args["inplace"]) and type(grad) is Tensor:
        # there autograd, in eager mode, multiplies by a tensor: its dtype has rounded the scale
        scale = torch.tensor(scale, dtype=grad.dtype).item()
    return {"input": aten.native_dropout_backward(grad, saved["mask"], scale)}


def slopes(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``dX = dY * f'(x)`` where what is kept gives ``f'(x)`` itself (codec ``few_bit``)."""
    (operand,) = saved
    return {"input": grad * saved[operand]}


def pointwise(op: Callable[..., Tensor], *names: str, operand: str = "input") -> Formula:
    """``dX = op(grad, x, *args)``: one of ATen's own backward functions."""

    def backward(grad: Tensor, saved: Saved, call: Call) -> Grads:
        return {"input": op(grad, saved[operand], *[call.args[n] for n in names])}

    return backward


def exp(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``dX = dY * y``."""
    return {"input": grad * saved["result"]}


def where(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """The gradient goes to ``input`` where the condition holds, else to ``other``."""
    holds, out = saved["condition"], Grads()
    if "input" in call.needs:
        out["input"] = grad.where(holds, 0).sum_to_size(call.shapes["input"])
    if "other" in call.needs:
        out["other"] = grad.masked_fill(holds, 0).sum_to_size(call.shapes["other"])
    return out


def masked_fill(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """No gradient where it was filled."""
    return {"input": grad.masked_fill(saved["mask"], 0).sum_to_size(call.shapes["input"])}


def embedding(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """The rows of ``grad`` are added to those of ``dW`` that were looked up."""
    padding, rows = call.args["padding_idx"], call.shapes["weight"][0]
    padding = -1 if padding is None else padding
    by_frequency, sparse = call.args["scale_grad_by_freq"], call.args["sparse"]
    out = aten.embedding_backward(grad, saved["input"], rows, padding, by_frequency, sparse)
    return {"weight": out}


def index_select(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """Added to what was selected."""
    out = grad.new_zeros(call.shapes["input"])
    return {"input": out.index_add(call.args["dim"], saved["index"], grad)}


def gather(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """Added to what was gathered; the tensor given for its shape is blank memory."""
    args = call.args["dim"], saved["index"], call.args["sparse_grad"]
    return {"input": aten.gather_backward(grad, saved["input"], *args)}


def gelu(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """As ATen."""
    return {"input": aten.gelu_backward(grad, saved["input"], approximate=call.args["approximate"])}


def elu(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """As ATen, from the input."""
    alpha = call.args["alpha"]
    return {"input": aten.elu_backward(grad, alpha, 1.0, 1.0, False, saved["input"])}


def mul(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``dA = dY * B``, ``dB = dY * A``, summed over what was broadcast."""
    out: Grads = {}
    for name, factor in (("input", "other"), ("other", "input")):
        if name in call.needs:
            by = saved[factor] if factor in call.shapes else call.args[factor]
            out[name] = (grad * by).sum_to_size(call.shapes[name])
    return out


def layer_norm(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """ATen's own, with the statistics of the exact input."""
    names = ("input", "weight", "bias")
    grads = aten.native_layer_norm_backward(
        grad.contiguous(),
        saved["input"],
        list(call.args["normalized_shape"]),
        saved["mean"],
        saved["rstd"],
        saved["weight"] if "weight" in call.shapes else None,
        saved["bias"] if "bias" in call.shapes else None,
        [n in call.needs for n in names],
    )
    return dict(zip(names, grads, strict=True))


def group_norm(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """ATen's own, with the statistics of the exact input."""
    names = ("input", "weight", "bias")
    shape, x = call.shapes["input"], saved["input"]
    layout = runs.group_format(x)
    grads = aten.native_group_norm_backward(
        grad.contiguous(memory_format=layout),
        x.contiguous(memory_format=layout),
        saved["mean"],
        saved["rstd"],
        saved["weight"] if "weight" in call.shapes else None,
        shape[0],
        shape[1],
        runs.cells(shape),
        call.args["num_groups"],
        [n in call.needs for n in names],
    )
    return dict(zip(names, grads, strict=True))


def batch_norm(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """ATen's own, with the statistics of the exact input; the running ones in eval mode.

    On CUDA, in training and with weight and bias, it asks for the kernel as the forward did.
    """
    names = ("input", "weight", "bias")
    training = bool(call.args["training"])
    x = saved["input"]
    asks = x.is_cuda and training and {"weight", "bias"} <= call.shapes.keys()
    with_stats = asks or not training
    arguments = [
        grad,
        x,
        saved["weight"] if "weight" in call.shapes else None,
        saved["running_mean"] if "running_mean" in call.shapes and with_stats else None,
        saved["running_var"] if "running_var" in call.shapes and with_stats else None,
        saved["mean"],
        saved["invstd"],
        training,
        call.args["eps"],
        [n in call.needs for n in names],
    ]
    if asks:
        layout = suggest_memory_format(x)
        arguments[:2] = [t.contiguous(memory_format=layout) for t in (grad, x)]
        # a copy: cuDNN may write into it, and the backward works twice
        grads = aten.batch_norm_backward(*arguments, saved["reserve"].clone())
    else:
        grads = aten.native_batch_norm_backward(*arguments)
    return dict(zip(names, grads, strict=True))


def attention(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """From the packed query, key and value alone, since nothing else fits them once rounded.

    In float32 on a CPU one kernel does it; elsewhere the forward is run again.
    """
    names = ("query", "key", "value")
    q, k, v = (call.shapes[n] for n in names)
    ours = (
        grad.is_cpu
        and attention_kernel.RUNS
        and all(call.dtypes[n] == torch.float32 for n in names)
        and len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and k[1] == v[1]
        and q[1] % k[1] == 0
        and q[3] == v[3]
        and "attn_mask" not in call.needs
    )
    if not ours or not any(map(saved.rounded, names)):  # exact ones have the bits of autograd
        return vjp(grad, saved, call)
    mask = saved["attn_mask"] if "attn_mask" in call.shapes else None
    grads = torch.ops.dropit.attention_backward(
        grad,
        *[saved[n] for n in names],
        mask,
        call.args["is_causal"],
        call.args["scale"],
    )
    return dict(zip(names, grads, strict=True))


def softmax(log: bool) -> Formula:
    """``dX = y (dY - sum(dY y))``, and ``dY - exp(y) sum(dY)`` of the logarithm."""
    op = log_softmax_backward_data if log else softmax_backward_data

    def backward(grad: Tensor, saved: Saved, call: Call) -> Grads:
        dtype = call.dtypes["input"]
        return {"input": op(grad, saved["result"], call.args["dim"], dtype)}

    return backward


def cross_entropy(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """``dX = (softmax(x) - onehot(target)) * dY``, from the packed ``log softmax(x)``."""
    # in the layout in which log_softmax makes it, whatever that of its input
    log_probs, target = saved["log_probs"].contiguous(), saved["target"]
    dim = runs.class_dim(log_probs)
    reduction, ignored = runs.reduction_enum(call.args["reduction"]), call.args["ignore_index"]
    loss = functools.partial(
        aten.nll_loss_nd, target=target, reduction=reduction, ignore_index=ignored
    )
    (inner,) = torch.func.vjp(loss, log_probs)[1](grad)
    out = log_softmax_backward_data(inner, log_probs, dim, call.dtypes["input"])
    return {"input": out}


def avg_pool2d(grad: Tensor, saved: Saved, call: Call) -> Grads:
    """Reads only the shape of the input: the tensor given here is blank memory."""
    a = call.args
    kernel = per_dimension(a["kernel_size"], 2)
    stride = kernel if a["stride"] in (None, (), []) else per_dimension(a["stride"], 2)
    padding = per_dimension(a["padding"], 2)
    counted = a["ceil_mode"], a["count_include_pad"], a["divisor_override"]
    out = aten.avg_pool2d_backward(grad, saved["input"], kernel, stride, padding, *counted)
    return {"input": out}
