"""The backward of attention from query, key and value alone: one op, for CPUs.

PyTorch's own backward reads the output and the log-sum-exp of the forward, which are not kept: with
a rounded query and key they would not fit the scores, so that the forward would have to run again.
Shapes: ``grad`` and ``query`` (batch, heads, queries, size), ``key`` and ``value`` (batch, heads /
n, keys, size); ``mask`` broadcasts to (batch, heads, queries, keys), boolean or added to the
scores. The gradients have these shapes, in the memory order (batch, rows, heads, size).
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from dropit_fx.kernels.cpu import load
from dropit_fx.kernels.dispatch import define

_POINTER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "dropit_attention_backward": [_POINTER, _POINTER, _POINTER, _FLOAT, _INT, _INT],
    "dropit_attention_runs": [],
}
_Grads = tuple[Tensor, Tensor, Tensor]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C kernel; None where this installation has none, or this machine cannot run it."""
    lib = load("_attention", _SIGNATURES)
    return lib if lib is not None and lib.dropit_attention_runs() else None


RUNS = library() is not None  # a constant: backward formulas are traced


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as float32 that is added to the scores, of their shape."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf"))
    mask = mask.float().expand(*query.shape[:3], key.shape[2])
    return mask if mask.stride(3) == 1 else mask.contiguous()


def attention_backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> _Grads:
    """In PyTorch, with all scores at once: the oracle, and what runs where there is no C."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    (batch, heads, rows, size), kv_heads, keys = query.shape, key.shape[1], key.shape[2]
    grouped = batch, kv_heads, heads // kv_heads * rows, size
    scores = scale * (query.reshape(grouped) @ key.mT).view(batch, heads, rows, keys)
    added = _added(mask, query, key)
    if added is not None:
        scores = scores + added
    if is_causal:
        later = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    p = torch.softmax(scores, -1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0)
    dp = (grad.reshape(grouped) @ value.mT).view_as(p)
    ds = (p * (dp - (dp * p).sum(-1, keepdim=True))).view(*grouped[:3], keys) * scale
    dq = (ds @ key).view_as(query)
    dk, dv = ds.mT @ query.reshape(grouped), p.view_as(ds).mT @ grad.reshape(grouped)
    return _by_rows(dq), _by_rows(dk), _by_rows(dv)


def _by_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(like: Tensor) -> Tensor:
    batch, heads, rows, size = like.shape
    return like.new_empty(batch, rows, heads, size).transpose(1, 2)


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> _Grads:
    lib = library()
    inputs = [query, key, value, grad]
    if lib is not None and all(x.dtype == torch.float32 for x in inputs):
        inputs = [x if x.stride(3) == 1 else x.contiguous() for x in inputs]
        outputs = _empty(query), _empty(key), _empty(value)
        tensors = [*inputs, *outputs, _added(mask, query, key)]
        strides = [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]
        batch, heads, rows, size = query.shape
        sizes = [batch, heads, key.shape[1], rows, key.shape[2], size]
        failed = lib.dropit_attention_backward(
            (_POINTER * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors]),
            (ctypes.c_int64 * len(strides))(*strides),
            (ctypes.c_int64 * len(sizes))(*sizes),
            size**-0.5 if scale is None else scale,
            is_causal,
            torch.get_num_threads(),
        )
        if not failed:
            return outputs
    return attention_backward_reference(grad, query, key, value, mask, is_causal, scale)


define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask,"
    " bool is_causal, float? scale) -> (Tensor, Tensor, Tensor)",
    attention_backward_reference,
    lambda grad, query, key, value, *_: (_empty(query), _empty(key), _empty(value)),
    _attention_backward,
    triton=False,
)
