"""A packed copy of a tensor: how it is made, what it is, and how it is read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.traceback import annotate

from dropit_fx.codecs import CODEC, DERIVED
from dropit_fx.codecs.codec import Codec
from dropit_fx.kernels.channels import TINY, finite_statistics, has_kernel, statistics
from dropit_fx.kernels.fused_bits import is_empty
from dropit_fx.ops.autocasting import autocast_as
from dropit_fx.ops.table import DERIVABLE
from dropit_fx.private import native_batch_norm_legit
from dropit_fx.runtime.offload import OFFLOAD, offloaded
from dropit_fx.runtime.tensor_spec import (
    TensorSpec,
    ascends,
    flatten,
    in_order,
    memory_order,
    spec_of,
    unflatten,
)

# Marks of the nodes of a joint graph, for ``partition.KeepPacked``
PACKING = {"dropit": "pack"}
AGAIN = {"dropit": "again"}  # made again, for the backward, of what is there


def _marked(x: Tensor, mark: dict[str, str] = PACKING) -> AbstractContextManager[Any]:
    """Marks what is traced inside, where ``x`` is traced; to enter a context takes time."""
    return nullcontext() if _is_plain(x) else annotate(mark)


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and not torch.compiler.is_compiling()


# beside the options of a codec of rows: elements of a row, and whether these are samples
WIDTH, SAMPLES = "width", "samples"

KEEP: tuple[str, dict[str, Any]] = ("keep", {})  # in ``packed=`` of a call: the tensor as it is
DROP: tuple[str, dict[str, Any]] = ("drop", {})  # and: its shape alone
Settings = tuple[tuple[str, Any], ...]  # options of a codec, in plain values for Dynamo's sake


class Packed(NamedTuple):
    """One packed tensor: what the codec kept, and how to read it back."""

    parts: tuple[Tensor, ...]
    codec: str
    options: Settings
    dtype: torch.dtype


class Kept(NamedTuple):
    """How an operand is kept between forward and backward."""

    operand: str
    codec: str  # of CODEC, or DERIVED; "keep": the dense tensor
    options: Settings = ()
    dtype: torch.dtype | None = None  # of what is read back; None: not packed yet
    tensors: int = 1  # that hold it; 0: an argument or the result, as it is


class Recipe(NamedTuple):
    """How the result of a call is made again, from what is kept of its arguments."""

    rule_name: str
    plain: tuple[Any, ...]  # all arguments, None in the place of tensors
    kept: tuple[Kept, ...]  # the tensors,
    specs: tuple[TensorSpec, ...]  # and what each is when it is read back
    spec: TensorSpec  # of the result
    autocast: torch.dtype | None = None  # that of the call, where its bits depend on it


def spelled(codec: str, options: Mapping[str, Any]) -> str:
    """A codec as people read it: ``mink(gamma=0.5, bits=4)``."""
    known = CODEC.get(codec)
    told = {o.name for o in known.options if o.shown} if known else set()
    told.add("bits")  # which the row of an op may say, not a config
    given = [(k, v) for k, v in options.items() if k in told]
    shown = [f"{k}={v}" for k, v in given if v is not None and v is not False]
    return codec + (f"({', '.join(shown)})" if shown else "")


def kept_as(operand: str, packed: Packed) -> Kept:
    """How ``operand`` is kept, of which there is a packed copy."""
    return Kept(operand, packed.codec, packed.options, packed.dtype, len(packed.parts))


def shared_out(
    kept: Sequence[Kept], tensors: Sequence[Tensor]
) -> list[tuple[Kept, tuple[Tensor, ...]]]:
    """Each of ``kept`` with the tensors that hold it, which lie one behind the other."""
    found, at = [], 0
    for one in kept:
        found.append((one, tuple(tensors[at : at + one.tensors])))
        at += one.tensors
    return found


def channel_nbytes(shape: Sequence[int]) -> int:
    """Bytes of the mean and the deviation of each channel."""
    return 2 * 4 * int(shape[1])


def standardise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel around 0, in units of its deviation; and mean and inverse deviation, (C,).

    In a block of elements of several channels, all of them then have the same say. The kernel of
    batch norm does it in half the time of ``torch.std_mean``. A channel that is not finite stays as
    it is: a norm over groups reads its other samples.
    """
    if is_empty(x.numel()):  # which that kernel refuses
        return x, x.new_zeros(x.shape[1]).float(), x.new_ones(x.shape[1]).float()
    norm = native_batch_norm_legit.no_stats
    out, mean, inverse = norm(x.float(), None, None, True, 0.0, TINY)
    if memory_order(out) != memory_order(x):
        out = torch.empty_like(x).copy_(out)
    finite = (inverse > 0).view(_along_channels(x))
    return torch.where(finite, out.to(x.dtype), x), *finite_statistics(mean, inverse)


def _along_channels(x: Tensor) -> list[int]:
    """The shape in which a number for each channel is broadcast to ``x``."""
    return [-1 if d == 1 else 1 for d in range(x.dim())]


def _pack_by_channel(
    x: Tensor, codec: Codec, options: dict[str, Any]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The parts of standardised ``x``, and mean and deviation of each channel, ``(1, C, 1, ...)``.

    In eager mode, and on CUDA, what is standardised never lies in memory: a kernel makes the
    statistics; for a compiler on CUDA they are those that it computes for the norm behind.
    """
    if not _in_one(x) or codec.pack_channels is None or is_empty(x.numel()):
        standard, mean, inverse = standardise(x)
        with _marked(x):
            parts = codec.pack(flatten(standard), options)
    else:
        flat, inner = flatten(x), _run(x.shape, memory_order(x))
        mean, inverse = statistics(x, flat, inner) if _is_plain(x) else standardise(x)[1:]
        with _marked(x):
            parts = codec.pack_channels(flat, mean, inverse, inner, options)
    shape = _along_channels(x)
    return parts, mean.view(shape), inverse.reciprocal().view(shape)


def _in_one(x: Tensor) -> bool:
    """Whether one kernel standardises and packs, or unpacks and puts the channels back."""
    return has_kernel(x) if _is_plain(x) else x.is_cuda


def _run(shape: Sequence[int], order: list[int]) -> Any:
    """How many elements of one channel (dimension 1) follow each other, in memory order."""
    inner = 1
    for d in order[order.index(1) + 1 :]:
        inner = inner * shape[d]
    return inner


def buffers_of(codec: str, options: Settings) -> int:
    """How many tensors a packed operand is: the statistics of its channels may be two of them."""
    return CODEC[codec].buffers + 2 * bool(dict(options).get("by_channel"))


def parts_of(
    x: Tensor, order: list[int], codec: str, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What a codec keeps of ``x``, whose elements are taken in ``order``; on the host, if asked."""
    if not options.get("by_channel"):
        with _marked(x):
            parts = CODEC[codec].pack(in_order(x, order), options)
    else:
        codes, mean, deviation = _pack_by_channel(x, CODEC[codec], options)
        parts = (*codes, mean, deviation)
    return offloaded(parts, options[OFFLOAD]) if OFFLOAD in options and _is_plain(x) else parts


def read_back(kept: Kept, parts: tuple[Tensor, ...], spec: TensorSpec) -> Tensor:
    """The dense tensor (or the slopes) that ``parts`` stand for, laid out as ``spec`` says."""
    shape, order, dtype = spec.shape, spec.order, kept.dtype
    assert dtype is not None
    if kept.codec == "keep":
        if parts[0].dtype == dtype:
            return parts[0]
        with _marked(parts[0], AGAIN):
            return parts[0].to(dtype)
    if kept.codec == DERIVED:
        with _marked(parts[0], AGAIN):
            return unflatten(_derive(_recipe(kept), parts).to(dtype), shape, order)
    numel = 1
    for size in shape:
        numel = numel * size
    options, codec = dict(kept.options), CODEC[kept.codec]
    if not options.get("by_channel"):
        return unflatten(codec.unpack(parts, options, numel, dtype), shape, order)
    *codes, mean, deviation = parts
    if _in_one(mean) and codec.unpack_channels is not None:
        given = tuple(codes), mean.view(-1), deviation.view(-1), _run(shape, order)
        return unflatten(codec.unpack_channels(*given, options, numel, dtype), shape, order)
    value = unflatten(codec.unpack(tuple(codes), options, numel, dtype), shape, order)
    return value.mul_(deviation).add_(mean)


def kept_rows(
    kept: Kept, parts: tuple[Tensor, ...], spec: TensorSpec, grad: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The rows of ``grad`` and of an operand that a sum over rows is to be made of.

    None where that takes them all: the codec keeps no rows, or all of them, or none of those that
    this reader sees, since it sees the elements in other rows or in another order.
    """
    codec, options = CODEC.get(kept.codec), dict(kept.options)
    if codec is None or codec.contract is None or codec.lossless(options):
        return None
    if options[WIDTH] != spec.shape[-1] or not ascends(spec.order):
        return None
    return codec.contract(parts, options, grad, spec.dtype)


def kept_samples(
    kept: Kept, parts: tuple[Tensor, ...], spec: TensorSpec, grad: Tensor
) -> tuple[Tensor, Tensor] | None:
    """As :func:`kept_rows`, of ``grad: (batch, ...)`` and an operand whose rows are samples."""
    codec, options = CODEC.get(kept.codec), dict(kept.options)
    if codec is None or codec.contract is None or codec.lossless(options):
        return None
    if options[WIDTH] != width_of(spec.shape, spec.order) or spec.order[0] != 0:
        return None
    order = memory_order(grad)
    order = order if order[0] == 0 else list(range(grad.dim()))
    flat = in_order(grad, order).view(grad.shape[0], width_of(grad.shape, order))
    some, x = codec.contract(parts, options, flat, spec.dtype)
    return _as_samples(some, grad.shape, order), _as_samples(x, spec.shape, spec.order)


def _as_samples(rows: Tensor, shape: Any, order: list[int]) -> Tensor:
    """Rows, each a sample in memory order, in the shape and the layout of samples."""
    return unflatten(rows.reshape(-1), (rows.shape[0], *shape[1:]), order)


def width_of(shape: Sequence[Any], order: list[int]) -> Any:
    """Elements of a sample: of all dimensions in memory but the outermost."""
    width = 1
    for d in order[1:]:
        width = width * shape[d]
    return width


def unpack(packed: Packed, like: Tensor) -> Tensor:
    """What was packed, read back in the shape and the memory order of ``like``."""
    return read_back(kept_as("x", packed), packed.parts, spec_of(like))


def _recipe(kept: Kept) -> Recipe:
    recipe: Recipe = dict(kept.options)["recipe"]
    return recipe


def _derive(recipe: Recipe, parts: tuple[Tensor, ...]) -> Tensor:
    """Makes a derived value again: 1-D, in the memory order of the tensor that it stands for."""
    rule = DERIVABLE[recipe.rule_name]
    assert rule.derive is not None
    names = rule.names(len(recipe.plain))
    values = dict(zip(names, recipe.plain, strict=True))
    for (kept, own), spec in zip(shared_out(recipe.kept, parts), recipe.specs, strict=True):
        values[kept.operand] = read_back(kept, own, spec)
    args = [values.pop(n) for n in names]
    if not rule.repeats:
        return in_order(rule.derive(*args, **values), recipe.spec.order)
    with autocast_as(recipe.autocast, parts[0].device.type):
        return in_order(rule.derive(*args, **values), recipe.spec.order)


def is_rounded(kept: Kept) -> bool:
    """Whether the value that is read back may differ from the one that was packed."""
    if kept.codec == DERIVED:
        return any(map(is_rounded, _recipe(kept).kept))
    return not CODEC[kept.codec].lossless(dict(kept.options))
