"""Scaled dot-product attention.

With dropout, PyTorch computes it on CPUs from simpler ops and keeps the weights three times: as
softmax gave them, the dropout's factors, and their product. The row runs the same ops, keeps one
bit for each factor, and makes the rest again in the backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.kernels import attention as attention_kernel
from dropit_fx.ops.backwards import Called, Grads, Saved, is_plain, vjp
from dropit_fx.ops.masks import drop, dropped_again
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use, one_bit
from dropit_fx.private import safe_softmax

aten = torch.ops.aten


_ATTENDS = ("query", "key", "value", "attn_mask")


def _scaled_dot_product_attention(
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


def _weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """The weights before dropout, op by op as PyTorch's ``_scaled_dot_product_attention_math``.

    The factor goes to query and key in equal parts. Half precision comes as float32.
    """
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(factor))
    scores = (query * (-root if factor < 0 else root)) @ (key.transpose(-2, -1) * root)
    if is_causal:
        size = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf)
    return safe_softmax(scores if attn_mask is None else scores + attn_mask, -1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with dropout and its mask, drawn here where it is not given."""
    q, k, v = (x.float() if x.dtype in _HALF else x for x in (query, key, value))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    weights = _weights(q, k, attn_mask, is_causal, scale)
    if mask is None:
        dropped, mask = drop(weights, dropout_p)
    else:
        dropped = dropped_again(weights, mask, dropout_p)
    return (dropped @ v).to(query.dtype), mask


_HALF = (torch.bfloat16, torch.float16)


def _attention_saving(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    *settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    if not dropout_p:
        plain = query, key, value, attn_mask, dropout_p, *settings
        return _scaled_dot_product_attention(*plain), {}
    out, mask = _attend(query, key, value, attn_mask, dropout_p, *settings)
    return out, {"mask": mask}


def _drops(args: Mapping[str, Any]) -> bool:
    p = args["dropout_p"]
    return not (isinstance(p, int | float) and p == 0)


def _made_again(args: Mapping[str, Any]) -> bool:
    """Whether the backward runs the forward again: in float32 on a CPU, one kernel does without."""
    query, mask = args["query"], args["attn_mask"]
    in_one = query.device.type == "cpu" and query.dtype == torch.float32
    learned = isinstance(mask, Tensor) and mask.requires_grad  # then all weights are in memory
    return not (in_one or learned or _drops(args))


def _attention_again(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The result, by the very ops by which the backward makes it again.

    What attention computes beside it depends on whether a gradient is wanted.
    """
    attend = functools.partial(
        _scaled_dot_product_attention,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    if is_plain(query, key, value):
        return attend(query, key, value)
    out: Tensor = torch.func.vjp(attend, query, key, value)[0]
    return out


def _attention_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """From the packed query, key and value alone, since nothing else fits them once rounded.

    With dropout, the forward is run again with its mask. Without, in float32 on a CPU, one kernel
    does it; elsewhere the forward is run again.
    """
    if call.args["dropout_p"]:
        attend: Callable[..., tuple[Tensor, Tensor]] = _attend
        drawn = saved["mask"]
        return vjp(grad, saved, call, lambda *args: attend(*args, drawn)[0])
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


def _dropout_elsewhere(args: Mapping[str, Any]) -> str:
    """Why the row does not cover this call's dropout, or ``""``."""
    p, query, key, value, mask = (args[n] for n in ("dropout_p", *_ATTENDS))
    if not p:
        return ""
    if p == 1:
        return "attention dropout that leaves nothing"
    if query.device.type != "cpu":
        return f"attention dropout: on {query.device.type} the kernel draws its mask inside"
    heads = 1 if args["enable_gqa"] else 0  # of keys and values, which are repeated then
    others = [x.shape[: -2 - heads] for x in (key, value)]
    others += [] if mask is None else [mask.shape[:-2]]
    batch = tuple(query.shape[:-2])
    own = batch[: len(batch) - heads]
    for shape, whole in zip(others, (own, own, batch), strict=False):
        if len(shape) > len(whole) or any(
            a not in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False)
        ):
            return "attention dropout over a batch that is not the query's"
    return ""


ATTENTION = OpRule(
    name="scaled_dot_product_attention",
    targets=(F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default),
    reads=(
        *[Read(operand=n, use=Use.REDUCE, needed_by=_ATTENDS) for n in _ATTENDS[:3]],
        Read(operand="attn_mask", use=Use.REDUCE, needed_by=_ATTENDS, lossy=False),
        Read(
            operand="mask",
            use=Use.SLOPE,
            needed_by=_ATTENDS,
            bits=one_bit,
            shape=lambda args: (*args["query"].shape[:-1], args["key"].shape[-2]),  # of the weights
            when=_drops,
        ),
        Read(operand="result", use=Use.SHAPE, needed_by=_ATTENDS),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=_ATTENDS),
    ),
    run=_scaled_dot_product_attention,
    run_saving=_attention_saving,
    backward=_attention_backward,
    autocast="lower",
    derive=_attention_again,
    made_again=_made_again,
    obstacle=_dropout_elsewhere,
)

ROWS = (ATTENTION,)
