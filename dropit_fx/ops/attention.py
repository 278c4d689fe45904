"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.kernels import attention as attention_kernel
from dropit_fx.ops.backwards import Called, Grads, Saved, vjp
from dropit_fx.ops.rule import INSIDE, OpRule, Read, Use

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


def _attention_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
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


def _no_attention_dropout(args: Mapping[str, Any]) -> str:
    if args["dropout_p"]:
        return "attention dropout: its random state would have to be replayed in the backward"
    return ""


ATTENTION = OpRule(
    name="scaled_dot_product_attention",
    targets=(F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default),
    reads=(
        *[Read(operand=n, use=Use.REDUCE, needed_by=_ATTENDS) for n in _ATTENDS[:3]],
        Read(operand="attn_mask", use=Use.REDUCE, needed_by=_ATTENDS, lossy=False),
        Read(operand="result", use=Use.SHAPE, needed_by=_ATTENDS),
        Read(operand=INSIDE, use=Use.SHAPE, needed_by=_ATTENDS),
    ),
    run=_scaled_dot_product_attention,
    backward=_attention_backward,
    autocast="lower",
    obstacle=_no_attention_dropout,
)

ROWS = (ATTENTION,)
