"""How a row runs with packed saved tensors: the functions that appear in rewritten graphs.

Its kinds of node::

    %p = pack(%x, (%w,), 'mink', {'gamma': 0.9, ...})            -> Packed or None
    %y = packed_linear(%x, %w, %b, packed={'input': %p})         -> the op's result
    %d = derived('layer_norm', (%x, ...), {'input': %p}, %y)     -> Packed

``pack`` makes the copy that is kept (once for all readers of a value); ``packed_<row>`` runs the op
exactly and keeps the packed form in the place of the dense tensor; ``derived`` keeps nothing new:
it says how a value is made again from what is packed of the operands of the op that made it.
``packed_checkpoint`` is a checkpointed region; in its body, ``stand_in`` reads a packed input.
``packed=`` names every read of the row, and nothing else is saved. Reads that the op makes itself
(masks, indices, its result) name their codec and options: ``packed={'result': ('bitmask', {'bits':
1})}``; with ``gives=('result',)`` the call returns the packed form of these too, for other readers.
``('keep', {})`` keeps the tensor as it is, in the calls whose wanted gradients read it: weights may
be frozen, and thawed, after the rewrite. ``('drop', {})`` is for what only lends its shape. One
``torch.autograd.Function`` runs every row; packed tensors go through ``save_for_backward``, so
hooks, offloading and fake tensors see them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import annotate
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from dropit_fx.codecs import CODEC
from dropit_fx.codecs.codec import Codec
from dropit_fx.ops import backwards
from dropit_fx.ops.autocasting import autocast_on, cast_operands, runs_as_it_is, under_autocast
from dropit_fx.ops.rule import OpRule
from dropit_fx.ops.table import CHECKPOINT, DERIVABLE, OP_RULES, RULES, bind, inputs_of, is_inplace
from dropit_fx.private import (
    CHECKPOINT_CONTEXT,
    OpOverload,
    constant_to_dynamo,
    dynamo_skips,
    forward_mode_level,
    is_view,
    native_batch_norm_legit,
    peek_interpreter_stack,
    storage_id,
    unsafe_view,
)

PACKING = {"dropit": "pack"}  # marks the nodes of a joint graph for ``partition.KeepPacked``


class Packed(NamedTuple):
    """One packed tensor: what the codec kept, and how to read it back."""

    parts: tuple[Tensor, ...]
    codec: str
    options: tuple[tuple[str, Any], ...]
    dtype: torch.dtype


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation of dimensions that makes ``x`` contiguous, None where there is none.

    Packing in memory order costs no copy for channels_last and transposed tensors.
    """
    if x.is_contiguous():
        return list(range(x.dim()))
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    return order if x.permute(order).is_contiguous() else None


def flatten(x: Tensor) -> Tensor:
    """The elements of ``x`` as a 1-D contiguous tensor, in memory order where ``x`` is dense."""
    return _in_order(x, memory_order(x))


def _in_order(x: Tensor, order: list[int] | None) -> Tensor:
    return x.reshape(-1) if order is None else x.permute(order).reshape(-1)


def unflatten(flat: Tensor, shape: Any, order: list[int] | None) -> Tensor:
    """The inverse of :func:`flatten` for a tensor of ``shape`` and ``order``."""
    if order is None:
        return flat.reshape(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([shape[d] for d in order]).permute(inverse)


def _lowered(x: Tensor) -> Tensor:
    """``x`` in the dtype of autocast, where it is on."""
    device = x.device.type
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if not autocast_on(device) or x.dtype not in floats:
        return x
    return x.to(torch.get_autocast_dtype(device))


def channel_nbytes(shape: Sequence[int]) -> int:
    """Bytes of the mean and the deviation of each channel."""
    return 2 * 4 * int(shape[1])


_TINY = torch.finfo(torch.float32).tiny  # in the place of a norm's epsilon


def _standardise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel around 0, in units of its deviation; and mean and inverse deviation, (C,).

    In a block of elements of several channels, all of them then have the same say. The kernel of
    batch norm does it in half the time of ``torch.std_mean``.
    """
    norm = native_batch_norm_legit.no_stats
    out, mean, inverse = norm(x.float(), None, None, True, 0.0, _TINY)
    if memory_order(out) != memory_order(x):
        out = torch.empty_like(x).copy_(out)
    return out.to(x.dtype), mean, inverse


def _pack_by_channel(
    x: Tensor, codec: Codec, options: dict[str, Any]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The parts of standardised ``x``, and mean and deviation of each channel, ``(1, C, 1, ...)``.

    On CUDA what is standardised never lies in memory: in eager mode batch norm's own kernel reads
    the statistics, for a compiler they are those that it computes for the norm behind.
    """
    if not x.is_cuda or codec.pack_channels is None:
        standard, mean, inverse = _standardise(x)
        with annotate(PACKING):
            parts = codec.pack(flatten(standard), options)
    else:
        plain = type(x) is Tensor and not torch.compiler.is_compiling()
        found = torch.batch_norm_stats(x, _TINY) if plain else _standardise(x)[1:]
        mean, inverse = (t.float() for t in found)  # of float64, the kernel's are float64
        order = memory_order(x)
        with annotate(PACKING):
            parts = codec.pack_channels(flatten(x), mean, inverse, _run(x.shape, order), options)
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    return parts, mean.view(shape), inverse.reciprocal().view(shape)


def _run(shape: Sequence[int], order: list[int] | None) -> Any:
    """How many elements of one channel (dimension 1) follow each other, in memory order."""
    order = list(range(len(shape))) if order is None else order
    inner = 1
    for d in order[order.index(1) + 1 :]:
        inner = inner * shape[d]
    return inner


@constant_to_dynamo
def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, or forward-mode differentiation.

    They differentiate, or batch, what is computed op by op: packed tensors are constants to them.
    """
    return peek_interpreter_stack() is not None or forward_mode_level() >= 0


def _overrides(values: Sequence[Any]) -> bool:
    """Whether a subclass of tensors has a say of its own in what ops do (no mode, no proxy)."""
    return any(
        isinstance(v, Tensor)
        and not isinstance(v, nn.Parameter)
        and type(v) is not Tensor
        and hasattr(type(v).__torch_function__, "__func__")
        for v in values
    )


def _on_meta(values: Sequence[Any]) -> bool:
    return any(isinstance(v, Tensor) and v.device.type == "meta" for v in values)


def pack(
    x: Tensor,
    needed_by: tuple[Tensor | None, ...],
    codec: str,
    options: Mapping[str, Any],
    autocast: bool = False,
) -> Packed | None:
    """Packs ``x`` for its readers' backward.

    Args:
        x: Any shape and strides; float32, bfloat16, float16 or float64.
        needed_by: The tensors whose gradients will read it.
        codec: Name of the codec.
        options: All its options; with ``by_channel``, each channel (dimension 1) is packed around
            its own mean and in units of its own deviation, which are kept too.
        autocast: Pack it in autocast's dtype, since that is what its readers compute with.

    Returns:
        None where nothing will read it: grad mode is off, or nothing in ``needed_by`` requires
        grad; and where its readers run as PyTorch does: under ``torch.func``, on meta tensors, for
        subclasses with ops of their own.
    """
    if _transformed():
        return None
    if has_torch_function((x, *needed_by)):
        if _overrides((x, *needed_by)):
            return None
        return handle_torch_function(
            pack, (x, *needed_by), x, needed_by, codec, options, autocast=autocast
        )
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in needed_by):
        return None
    if x.device.type == "meta":
        return None
    with torch.no_grad():
        x = _lowered(x) if autocast else x
        parts = _parts(x, memory_order(x), codec, dict(options))
    return Packed(parts, codec, tuple(options.items()), x.dtype)


def by_mode(training: bool, in_training: Any, in_eval: Any) -> Any:
    """One of two constants: what a traced model's own ``if self.training`` chose between."""
    if has_torch_function((training,)):
        return handle_torch_function(by_mode, (training,), training, in_training, in_eval)
    return in_training if training else in_eval


def require_mode(training: bool, traced: bool, where: str) -> None:
    """Raises RuntimeError where a graph that knows one mode is run in the other."""
    if has_torch_function((training,)):
        return handle_torch_function(require_mode, (training,), training, traced, where)
    if training != traced:
        names = ("eval", "training")
        raise RuntimeError(
            f"this graph was captured in {names[traced]} mode and differs in {names[training]}"
            f" mode from {where} on. Call .{('eval', 'train')[traced]}() first, or transform the"
            f" model in {names[training]} mode."
        )
    return None


class _Entry(NamedTuple):
    """How one operand is held between forward and backward, in plain values for Dynamo's sake."""

    operand: str
    codec: str  # 'keep': the dense tensor
    options: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    tensors: int  # in save_for_backward


def _entry(operand: str, packed: Packed) -> _Entry:
    return _Entry(operand, packed.codec, packed.options, packed.dtype, len(packed.parts))


DERIVED = "derived"
_Layout = tuple[Any, ...]  # shape, strides, memory order, dtype, device


def derived(
    rule_name: str, args: tuple[Any, ...], packs: Mapping[str, Packed | None], like: Tensor
) -> Packed | None:
    """The result of a row's call, to be made again from packed operands when it is read.

    Args:
        rule_name: A row with ``derive``.
        args: All its arguments, in the order of its signature. Tensors that are not in ``packs``
            are held as they are (parameters, statistics).
        packs: Operand -> its packed form; also of what the call made inside (statistics).
        like: The result itself, or what has its layout; nothing else is read of it.

    Returns:
        None where one of ``packs`` is: nothing will read it.
    """
    tensors = [a for a in (*args, like) if isinstance(a, Tensor)]
    if not _transformed() and has_torch_function(tensors):
        if _overrides(tensors):
            return None
        return handle_torch_function(derived, tensors, rule_name, args, packs, like)
    entries: list[_Entry] = []
    layouts: list[_Layout] = []
    parts: list[Tensor] = []
    named = dict(zip(inputs_of(DERIVABLE[rule_name]), args, strict=True))
    plain = tuple(None if isinstance(a, Tensor) else a for a in args)
    for name in dict.fromkeys((*named, *packs)):
        value = named.get(name)
        packed = packs.get(name)
        if name in packs and packed is None:
            return None
        if packed is None and isinstance(value, Tensor):
            packed = Packed((value.detach(),), "keep", (), value.dtype)
        if packed is None:
            continue
        entries.append(_entry(name, packed))
        layouts.append(_layout(value if isinstance(value, Tensor) else packed.parts[0]))
        parts += packed.parts
    recipe = (rule_name, plain, tuple(entries), tuple(layouts), _layout(like))
    return Packed(tuple(parts), DERIVED, (("recipe", recipe),), like.dtype)


def _value(entry: _Entry, parts: tuple[Tensor, ...], layout: _Layout) -> Tensor:
    """The dense tensor (or the slopes) that an entry stands for, in its layout."""
    shape, _, order, _, _ = layout
    if entry.codec == "keep":
        return parts[0].to(entry.dtype)
    if entry.codec == DERIVED:
        flat = _derive(dict(entry.options)["recipe"], parts).to(entry.dtype)
        return unflatten(flat, shape, order)
    numel = 1
    for size in shape:
        numel = numel * size
    options, codec = dict(entry.options), CODEC[entry.codec]
    if not options.get("by_channel"):
        return unflatten(codec.unpack(parts, options, numel, entry.dtype), shape, order)
    *codes, mean, deviation = parts
    if parts[0].is_cuda and codec.unpack_channels is not None:
        given = tuple(codes), mean.view(-1), deviation.view(-1), _run(shape, order)
        return unflatten(codec.unpack_channels(*given, options, numel, entry.dtype), shape, order)
    value = unflatten(codec.unpack(tuple(codes), options, numel, entry.dtype), shape, order)
    return value.mul_(deviation).add_(mean)


def unpack(packed: Packed, like: Tensor) -> Tensor:
    """What was packed, read back in the shape and the memory order of ``like``."""
    return _value(_entry("x", packed), packed.parts, _layout(like))


def _derive(recipe: tuple[Any, ...], parts: tuple[Tensor, ...]) -> Tensor:
    """Makes a derived value again: 1-D, in the memory order of the tensor that it stands for."""
    rule_name, plain, entries, layouts, (_, _, order, _, _) = recipe
    rule = DERIVABLE[rule_name]
    assert rule.derive is not None
    values, at = dict(zip(inputs_of(rule), plain, strict=True)), 0
    for entry, layout in zip(entries, layouts, strict=True):
        values[entry.operand] = _value(entry, parts[at : at + entry.tensors], layout)
        at += entry.tensors
    return _in_order(rule.derive(**values), order)


def _rounded(entry: _Entry) -> bool:
    if entry.codec == DERIVED:
        return any(map(_rounded, dict(entry.options)["recipe"][2]))
    return not CODEC[entry.codec].lossless(dict(entry.options))


class _SavedTensors(backwards.Saved):
    """Operand -> dense tensor, unpacked when read; operands that nobody saved are blank memory."""

    def __init__(self, ctx: Any) -> None:
        self._slots: dict[str, tuple[_Entry, tuple[Tensor, ...]]] = {}
        tensors, at = ctx.saved_tensors, 0
        for entry in ctx.entries:
            self._slots[entry.operand] = entry, tensors[at : at + entry.tensors]
            at += entry.tensors
        self._layouts = ctx.layouts

    def __getitem__(self, operand: str) -> Tensor:
        layout = self._layouts[operand]
        shape, strides, _, dtype, device = layout
        if operand in self._slots:
            value = _value(*self._slots[operand], layout)
            # what other readers share may be packed before autocast lowers it for this one
            return value.to(dtype) if value.is_floating_point() else value
        # a formula asks for its shape only: the gradients that read its values are not wanted
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def masked(self, operand: str, grad: Tensor, off: float = 0.0) -> Tensor:
        """As the base class says."""
        (shape, _, order, _, _), (_, parts) = self._layouts[operand], self._slots[operand]
        out = torch.ops.dropit.apply_mask(parts[0], _in_order(grad, order), off)
        return unflatten(out, shape, order)

    def rounded(self, operand: str) -> bool:
        """As the base class says."""
        return operand in self._slots and _rounded(self._slots[operand][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def _layout(x: Tensor) -> _Layout:
    return tuple(x.shape), tuple(x.stride()), memory_order(x), x.dtype, x.device


_Held = tuple[str, str, tuple[tuple[str, Any], ...]]  # operand, codec, options


class PackedFunction(torch.autograd.Function):
    """Runs a row: its own forward, its formula in the backward, packed tensors in between.

    ``apply(rule, needs, held, given, *args, *parts)``: ``held`` says how each operand that the op
    makes itself is kept, ``given`` lists how the trailing ``parts`` belong to operands.
    """

    @staticmethod
    def forward(
        rule_name: str,
        needs: tuple[str, ...],
        held: tuple[_Held, ...],
        given: tuple[_Entry, ...],
        *flat: Any,
    ) -> Any:
        """Runs the row; what it makes itself is packed here and returned behind the result."""
        rule = RULES[rule_name]
        args = flat[: len(flat) - sum(e.tensors for e in given)]
        out, made = (rule.run_saving or _no_more(rule))(*args)
        given_made = dict(zip(inputs_of(rule), args, strict=True)) | {"result": out} | made
        extra: list[Tensor] = []
        for operand, codec, options in held:
            if _is_kept_whole(rule, operand, codec):
                continue
            value = given_made[operand]
            if codec == "keep":
                extra.append(value)
            else:
                order = memory_order(_shaped_like(rule, operand, args, out))
                extra += _parts(value, order, codec, dict(options))
        return (_no_view(out, args), *extra)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Saves packed parts, and whole what is named so."""
        rule_name, needs, held, given, *flat = inputs
        rule = RULES[rule_name]
        count = sum(e.tensors for e in given)
        args, parts = flat[: len(flat) - count], flat[len(flat) - count :]
        out, made = output[0], output[1:]
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        named = dict(zip(inputs_of(rule), args, strict=True))
        tensors = {n: a for n, a in named.items() if isinstance(a, Tensor)}
        entries = list(given)
        saved = [*parts]
        layouts = {"result": _layout(out)} | {n: _layout(a) for n, a in tensors.items()}
        at = 0
        for operand, codec, options in held:
            if _is_kept_whole(rule, operand, codec):
                tensor = out if operand == "result" else tensors[operand]
                entries.append(_Entry(operand, "keep", (), tensor.dtype, 1))
                saved.append(tensor)
                continue
            buffers = _buffers(codec, options)
            like = made[at] if codec == "keep" else _shaped_like(rule, operand, args, out)
            layouts[operand] = _layout(like)
            if _is_wanted(rule, operand, needs):  # it may be made for others alone
                entries.append(_Entry(operand, codec, options, like.dtype, buffers))
                saved += made[at : at + buffers]
            at += buffers
        ctx.save_for_backward(*saved)
        ctx.rule_name, ctx.needs, ctx.entries, ctx.layouts = rule_name, needs, entries, layouts
        device = out.device.type  # a row that runs as it is does so in the backward too
        ctx.autocast = torch.get_autocast_dtype(device) if autocast_on(device) else None
        ctx.plain = {n: None if n in tensors else a for n, a in named.items()}
        ctx.parts = count

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> Any:
        """Runs the row's formula, which unpacks what it reads."""
        if grad is not None:
            _refuse_second_derivatives(grad, ctx.rule_name)
        rule = RULES[ctx.rule_name]
        grads: backwards.Grads = {}
        if grad is not None:
            tensors = {n: lay for n, lay in ctx.layouts.items() if n in ctx.plain}
            call = backwards.Call(
                rule,
                ctx.plain,
                {n: shape for n, (shape, _, _, _, _) in tensors.items()},
                {n: strides for n, (_, strides, _, _, _) in tensors.items()},
                {n: dtype for n, (_, _, _, dtype, _) in tensors.items()},
                frozenset(ctx.needs),
            )
            formula = rule.backward or backwards.vjp
            if any(e.codec != DERIVED and CODEC[e.codec].slope for e in ctx.entries):
                formula = backwards.slopes
            dtype = ctx.autocast
            with torch.autocast(
                grad.device.type, dtype, enabled=dtype is not None, cache_enabled=False
            ):
                grads = formula(grad, _SavedTensors(ctx), call)
        by_argument = [grads.get(n) if n in ctx.needs else None for n in ctx.plain]
        return (None, None, None, None, *by_argument, *[None] * ctx.parts)


def _refuse_second_derivatives(grad: Tensor, rule_name: str) -> None:
    """Raises where the gradient is to be differentiated again; a compiler is not asked."""
    if torch.is_grad_enabled() and type(grad) is Tensor and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"packed_{rule_name}: double backward (create_graph=True) is not supported,"
            " since the packed tensors are constants to autograd. Where a loss differentiates a"
            " gradient, call the original, dense model, which shares its parameters with the"
            " packed one (of what torch.compile returns, the model that it was given)."
        )


class _Once(torch.autograd.Function):
    """``apply(x, rule_name)``: ``x``, whose gradient is not to be differentiated again."""

    @staticmethod
    def forward(x: Tensor, rule_name: str) -> Tensor:
        out: Tensor = unsafe_view(x, x.shape)  # no view to autograd: it may be written in place
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rule_name = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second_derivatives(grad, ctx.rule_name)
        return grad, None


# What Dynamo inlines runs without gradients, whoever asks for them: behind it, this op in its graph
# is told. Where AOTAutograd traces the graph, nothing is left of it.
_LIBRARY: Any = torch.library.Library("dropit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("once(Tensor x, str rule_name) -> Tensor")
_LIBRARY.impl("once", _Once.apply, "CompositeImplicitAutograd")


# Called inside of a compiled function, it would be compiled as a piece of code of its own: for that
# nobody asks which mode it runs in.
dynamo_skips(PackedFunction.backward)
dynamo_skips(_Once.backward)


def _is_kept_whole(rule: OpRule, operand: str, codec: str) -> bool:
    """Whether an argument, or the result, is kept as it is: it is there without being made."""
    return codec == "keep" and (operand == "result" or operand in inputs_of(rule))


def _is_wanted(rule: OpRule, operand: str, needs: tuple[str, ...]) -> bool:
    """Whether a gradient that is asked for reads an operand of a row."""
    read = rule.read(operand)
    return read is not None and read.use != "shape" and any(n in needs for n in read.needed_by)


def _buffers(codec: str, options: Sequence[tuple[str, Any]]) -> int:
    """How many tensors a packed operand is: the statistics of its channels may be two of them."""
    return CODEC[codec].buffers + 2 * bool(dict(options).get("by_channel"))


def _parts(
    x: Tensor, order: list[int] | None, codec: str, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What a codec keeps of ``x``, whose elements are taken in ``order``."""
    if not options.get("by_channel"):
        with annotate(PACKING):
            return CODEC[codec].pack(_in_order(x, order), options)
    parts, *statistics = _pack_by_channel(x, CODEC[codec], options)
    return (*parts, *statistics)


def is_complex(values: Sequence[Any]) -> bool:
    """Whether there is a complex tensor among ``values``: formulas and codecs are for real ones."""
    return any(isinstance(v, Tensor) and v.is_complex() for v in values)


def _no_view(out: Tensor, args: Sequence[Any]) -> Tensor:
    """``out`` as a tensor that may be written in place, where it is a view of a temporary one.

    Autograd forbids that for views made inside a custom function.
    """
    if torch.compiler.is_dynamo_compiling() or not is_view(out):
        return out
    if any(isinstance(a, Tensor) and storage_id(a) == storage_id(out) for a in args):
        return out
    again: Tensor = unsafe_view(out, out.shape)
    return again if again.stride() == out.stride() else out


def _shaped_like(rule: OpRule, operand: str, args: Sequence[Any], out: Tensor) -> Tensor:
    """The argument or result that has the shape of what the op makes under the name ``operand``."""
    read = rule.read(operand)
    assert read is not None
    like: Tensor = out if read.like == "result" else args[inputs_of(rule).index(read.like)]
    return like


def _no_more(rule: OpRule) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    return lambda *args: (rule.run(*args), {})


def _packed_op(rule: OpRule) -> Callable[..., Any]:
    def packed_op(
        *args: Any, packed: Mapping[str, Any], gives: tuple[str, ...] = (), **kwargs: Any
    ) -> Any:
        bound = bind(rule, args, kwargs)
        assert bound is not None, f"packed_{rule.name}: {args} {kwargs}"
        values = tuple(bound.values())
        overrides = not _transformed() and has_torch_function(values) and _overrides(values)
        if not _transformed() and has_torch_function(values) and not overrides:
            return handle_torch_function(
                packed_op, values, *args, packed=packed, gives=gives, **kwargs
            )
        needs = tuple(n for n, a in bound.items() if isinstance(a, Tensor) and a.requires_grad)
        derived_for_nobody = packed.get("result", "") is None
        dense = overrides or _transformed() or _on_meta(values) or rule.obstacle(bound)
        if (
            not torch.is_grad_enabled()
            or not needs
            or derived_for_nobody
            or is_complex(values)
            or dense
        ):
            plain = rule.run(*bound.values())
            return (plain, *[None] * len(gives)) if gives else plain
        exact, as_it_is = bound, runs_as_it_is(rule)
        if under_autocast(bound) and not as_it_is:
            bound = cast_operands(rule, bound)
        held: list[_Held] = []
        given: list[_Entry] = []
        parts: list[Tensor] = []
        for read in rule.reads:
            operand = read.operand
            wanted = _is_wanted(rule, operand, needs)
            statistic = operand not in bound and read.exact  # formulas ask for its shape
            if not (wanted or operand in gives or statistic):
                continue
            is_tensor = operand not in bound or isinstance(bound[operand], Tensor)
            if operand not in packed and is_tensor:
                raise ValueError(
                    f"packed_{rule.name}: packed= does not say how {operand!r} is kept, which the"
                    f" gradients of {', '.join(read.needed_by)} read"
                )
            # None: who makes the copy has made none, since it asks for no gradient itself
            how: Any = packed.get(operand) or ("keep", {})
            if isinstance(how, Packed):
                given.append(_entry(operand, how))
                parts += how.parts
            elif how[0] != "keep" or operand not in bound:
                held.append((operand, how[0], tuple(how[1].items())))
            elif (
                isinstance(exact[operand], nn.Parameter)
                and exact[operand] is not bound[operand]
                and rule.autocast == "lower"
            ):
                # a parameter stays anyway: it is kept in the place of autocast's copy
                given.append(_Entry(operand, "keep", (), bound[operand].dtype, 1))
                parts.append(exact[operand].detach())
            elif is_tensor:
                held.append((operand, "keep", ()))
        device = next(a.device.type for a in bound.values() if isinstance(a, Tensor))
        with nullcontext() if as_it_is else torch.autocast(device, enabled=False):
            out, *kept = PackedFunction.apply(
                rule.name, needs, tuple(held), tuple(given), *bound.values(), *parts
            )
        if torch.compiler.is_dynamo_compiling():
            out = torch.ops.dropit.once(out, rule.name)
        if not gives:
            return out
        copies: dict[str, Packed] = {}
        for operand, codec, options in held:
            if _is_kept_whole(rule, operand, codec):
                continue
            count = _buffers(codec, options)
            mine, kept = tuple(kept[:count]), kept[count:]
            dtype = mine[0].dtype if codec == "keep" else out.dtype
            copies[operand] = Packed(mine, codec, options, dtype)
        return (out, *[copies.get(name) for name in gives])

    packed_op.__name__ = packed_op.__qualname__ = f"packed_{rule.name}"
    packed_op.__doc__ = (
        f"``{rule.name}``, exact in the forward, with the operands in ``packed`` kept packed."
    )
    return packed_op


def stand_in(x: Tensor, packed: Packed | None) -> Tensor:
    """What a checkpointed region reads for its input ``x``: ``x`` made again from ``packed``.

    The partitioner puts ``x`` itself in its place in the forward (``partition.KeepPacked``). The
    gradient goes to ``x``.
    """
    if packed is None:
        return x
    again: Tensor = _StandIn.apply(x, _entry("x", packed), *packed.parts)
    return again


class _StandIn(torch.autograd.Function):
    """``apply(x, entry, *parts)``: the value of ``parts``, with the gradient of ``x``."""

    @staticmethod
    def forward(x: Tensor, entry: _Entry, *parts: Tensor) -> Tensor:
        return _value(entry, parts, _layout(x)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.parts = len(inputs) - 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, None, *[None] * ctx.parts)


def packed_checkpoint(
    body: fx.GraphModule, *inputs: Any, packed: Mapping[str, Packed | None], **options: Any
) -> Any:
    """A checkpointed region that is made again from packed inputs, for a compiler to partition.

    Args:
        body: The region; behind its own inputs it takes those in ``packed``, as a ``stand_in``.
        inputs: Its inputs.
        packed: ``inputs.<index>`` -> its packed form.
        options: Of ``torch.utils.checkpoint.checkpoint``.
    """
    return CHECKPOINT.run(body, *inputs, *packed.values(), **options)


def checkpointed(
    body: fx.GraphModule,
    *inputs: Any,
    packed: Mapping[str, Packed | None] | None = None,
    once: bool = True,
    **options: Any,
) -> Any:
    """As ``packed_checkpoint``, for graphs that run as they are.

    The region is made again with the random numbers of its forward; PyTorch's own op for it draws
    new ones unless AOTAutograd traces it.

    Args:
        body: As for ``packed_checkpoint``, which has the next two as well.
        inputs: Its inputs.
        packed: The packed forms of some.
        once: What it writes into is written by the forward alone, as in compiled code; in eager
            mode a norm in a checkpointed region counts its batch twice.
        options: Of ``torch.utils.checkpoint.checkpoint``.
    """
    if torch.compiler.is_dynamo_compiling():  # made again from what it was given, packed or not
        no_copies = [None] * len(packed or {})
        return checkpoint(body, *inputs, *no_copies, **options | {"use_reentrant": False})
    if CHECKPOINT_CONTEXT in body.meta:
        options["context_fn"] = body.meta[CHECKPOINT_CONTEXT]
    kept: list[Any] = list(inputs)
    parts: list[Tensor] = []
    exact: dict[int, Tensor] = {}
    entries: dict[int, tuple[_Entry, _Layout]] = {}
    for operand, copy in (packed or {}).items():
        if copy is not None:
            at = int(operand.rpartition(".")[2])
            exact[at], kept[at] = inputs[at], None
            entries[at] = _entry(operand, copy), _layout(inputs[at])
            parts += copy.parts
    # what the region writes into (a norm's statistics, an average) is written once, and read again
    # as it was
    before = {
        at: inputs[at].detach().clone() if once else inputs[at]
        for at in written_inputs(body)
        if isinstance(inputs[at], Tensor) and not inputs[at].requires_grad
    }
    for at in before:
        exact[at], kept[at] = inputs[at], None
    no_stand_ins = [None] * len(packed or {})
    count = len(inputs)  # the region outlives the forward: it must not hold the inputs themselves

    def region(*given: Any) -> Any:
        values, rest = list(given[:count]), given[count:]
        for at, buffer in before.items():
            values[at] = exact[at] if exact else buffer.clone() if once else buffer
        for at, (entry, layout) in entries.items():
            mine, rest = rest[: entry.tensors], rest[entry.tensors :]
            if exact:
                values[at] = exact[at]
            else:
                with torch.no_grad():
                    values[at] = _value(entry, mine, layout).to(layout[3])
                values[at].requires_grad_()
        return body(*values, *no_stand_ins)

    try:
        return checkpoint(region, *kept, *parts, **options | {"use_reentrant": False})
    finally:
        exact.clear()


def run_regions(graph_module: fx.GraphModule) -> None:
    """Has the checkpoints of a graph run as they are: see :func:`checkpointed`."""
    for part in graph_module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.target in (*CHECKPOINT.targets, packed_checkpoint):
                    node.target = checkpointed
            part.recompile()


_NORMS = ("batch_norm", "instance_norm")  # which write into their statistics


_VIEWS = (
    *("getitem", "view", "reshape", "flatten", "unflatten", "t", "transpose", "permute"),
    *(
        "squeeze",
        "unsqueeze",
        "select",
        "narrow",
        "expand",
        "detach",
        "contiguous",
        "chunk",
        "split",
    ),
)


def _name(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    return name.partition(".")[0]  # without the overload


def _writes(node: fx.Node) -> bool:
    return _name(node) == "setitem" or is_inplace(node, node.kwargs)


def written_inputs(body: fx.GraphModule) -> tuple[int, ...]:
    """The inputs of a region that it writes into, by their place."""
    inputs = body.graph.find_nodes(op="placeholder")
    written: dict[fx.Node, None] = {}
    for node in body.graph.nodes:
        into: list[Any] = []
        if _name(node).removeprefix("packed_") in _NORMS:
            statistics = slice(3, 5) if isinstance(node.target, OpOverload) else slice(1, 3)
            into = [
                *node.args[statistics],
                *(node.kwargs.get(f"running_{n}") for n in ("mean", "var")),
            ]
        elif _writes(node):
            into = [*node.args[:1], node.kwargs.get("input")]
        for value in into:
            while isinstance(value, fx.Node):
                written[value] = None
                same_memory = _writes(value) or _name(value) in _VIEWS
                value = value.args[0] if same_memory and value.args else None
    return tuple(i for i, n in enumerate(inputs) if n in written)


def _cache_version() -> str:
    """Hash of every formula and kernel: what compile caches do not look into, and must key on."""
    root = Path(__file__).parent.parent
    files = [root / "private_names.py"]
    for room in ("codecs", "kernels", "ops", "runtime"):
        files += sorted(p for p in (root / room).rglob("*") if p.suffix in (".py", ".c", ".json"))
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


CACHE_VERSION = _cache_version()
PACKED_OPS: dict[str, Callable[..., Tensor]] = {}
VERSIONS: dict[str, str] = {}  # of each packed op, for compile caches


def add_row(rule: OpRule, version: str = "") -> None:
    """Makes the function of a row, under the name that graphs print: packed_linear, ..."""
    op = PACKED_OPS[rule.name] = _packed_op(rule)
    globals()[f"packed_{rule.name}"] = op
    VERSIONS[rule.name] = version


for _rule in OP_RULES:
    add_row(_rule)
PACKED_OPS[CHECKPOINT.name] = packed_checkpoint
