"""Lookups: indices are kept in the fewest bits that count the rows; and samples of a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.kernels.format import index_bits
from dropit_fx.ops.backwards import Called, Grads, Saved
from dropit_fx.ops.rule import OpRule, Read, Use

aten = torch.ops.aten


def _indices(operand: str, table: str, bits: Callable[[Mapping[str, Any]], int]) -> Read:
    return Read(operand=operand, use=Use.SLOPE, needed_by=(table,), bits=bits, like=operand)


def _any_index(args: Mapping[str, Any]) -> int:
    return 32  # what it indexes may be larger in the next call


def _embedding_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """The rows of ``grad`` are added to those of ``dW`` that were looked up."""
    padding, rows = call.args["padding_idx"], call.shapes["weight"][0]
    padding = -1 if padding is None else padding
    by_frequency, sparse = call.args["scale_grad_by_freq"], call.args["sparse"]
    out = aten.embedding_backward(grad, saved["input"], rows, padding, by_frequency, sparse)
    return {"weight": out}


def _plain_embedding(args: Mapping[str, Any]) -> str:
    if args["max_norm"] is not None:
        return "it renormalises its weight"
    if args["padding_idx"] is not None and args["padding_idx"] < 0:
        return "its padding index is negative, which its spellings read differently"
    return ""


EMBEDDING = OpRule(
    name="embedding",
    targets=(F.embedding, torch.embedding, aten.embedding.default),
    orders=dict.fromkeys(
        (torch.embedding, aten.embedding.default),
        ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    ),
    nones={"padding_idx": -1},
    reads=(_indices("input", "weight", lambda args: index_bits(args["weight"].shape[0])),),
    run=F.embedding,
    backward=_embedding_backward,
    obstacle=_plain_embedding,
)


def _index_select_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """Added to what was selected."""
    out = grad.new_zeros(call.shapes["input"])
    return {"input": out.index_add(call.args["dim"], saved["index"], grad)}


INDEX_SELECT = OpRule(
    name="index_select",
    targets=(torch.index_select, "index_select", aten.index_select.default),
    reads=(_indices("index", "input", _any_index),),
    run=torch.index_select,
    schema=aten.index_select.default,
    backward=_index_select_backward,
)


def _gather(input: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    return torch.gather(input, dim, index, sparse_grad=sparse_grad)


def _gather_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """Added to what was gathered; the tensor given for its shape is blank memory."""
    args = call.args["dim"], saved["index"], call.args["sparse_grad"]
    return {"input": aten.gather_backward(grad, saved["input"], *args)}


GATHER = OpRule(
    name="gather",
    targets=(torch.gather, "gather", aten.gather.default),
    reads=(
        _indices("index", "input", _any_index),
        Read(operand="input", use=Use.SHAPE, needed_by=("input",)),
    ),
    run=_gather,
    backward=_gather_backward,
)


def _grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: Any = "bilinear",
    padding_mode: Any = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    if isinstance(mode, str):
        return F.grid_sample(input, grid, mode, padding_mode, align_corners)
    return torch.grid_sampler(input, grid, mode, padding_mode, bool(align_corners))


GRID_SAMPLE = OpRule(
    name="grid_sample",
    targets=(F.grid_sample, torch.grid_sampler, aten.grid_sampler.default),
    reads=(
        # the result is linear in it, its slope in the grid a difference of neighbours
        Read(operand="input", use=Use.REDUCE, needed_by=("grid",)),
        Read(operand="grid", use=Use.REDUCE, needed_by=("input", "grid"), lossy=False),
    ),
    run=_grid_sample,
)


def _index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Any = 1) -> Tensor:
    return torch.index_add(input, dim, index, source, alpha=alpha)


def _index_add_backward(grad: Tensor, saved: Saved, call: Called) -> Grads:
    """``dX = dY``; what was added gets what came of it."""
    out, alpha = Grads(), call.args["alpha"]
    if "input" in call.needs:
        out["input"] = grad
    if "source" in call.needs:
        rows = grad.index_select(call.args["dim"], saved["index"])
        out["source"] = rows if alpha == 1 else rows * alpha
    return out


INDEX_ADD = OpRule(
    name="index_add",
    targets=(torch.index_add, "index_add", aten.index_add.default),
    reads=(
        _indices("index", "source", _any_index),
        Read(operand="source", use=Use.SHAPE, needed_by=("source",)),
    ),
    run=_index_add,
    backward=_index_add_backward,
    obstacle=lambda args: "" if args["source"].dim() else "it adds a number",
)

ROWS = (INDEX_ADD, EMBEDDING, INDEX_SELECT, GATHER, GRID_SAMPLE)
