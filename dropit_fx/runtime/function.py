"""The autograd function that runs every row: packed tensors between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dropit_fx.codecs import CODEC
from dropit_fx.ops import backwards
from dropit_fx.ops.autocasting import autocast_on
from dropit_fx.ops.rule import OpRule
from dropit_fx.ops.table import RULES, inputs_of
from dropit_fx.private import dynamo_skips, is_view, storage_id, unsafe_view
from dropit_fx.runtime.copies import DERIVED, Entry, buffers_of, is_rounded, parts_of, value_of
from dropit_fx.runtime.tensor_spec import in_order, layout_of, memory_order, unflatten


class _SavedTensors(backwards.Saved):
    """Operand -> dense tensor, unpacked when read; operands that nobody saved are blank memory."""

    def __init__(self, ctx: Any) -> None:
        self._slots: dict[str, tuple[Entry, tuple[Tensor, ...]]] = {}
        tensors, at = ctx.saved_tensors, 0
        for entry in ctx.entries:
            self._slots[entry.operand] = entry, tensors[at : at + entry.tensors]
            at += entry.tensors
        self._layouts = ctx.layouts

    def __getitem__(self, operand: str) -> Tensor:
        layout = self._layouts[operand]
        shape, strides, _, dtype, device = layout
        if operand in self._slots:
            value = value_of(*self._slots[operand], layout)
            # what other readers share may be packed before autocast lowers it for this one
            return value.to(dtype) if value.is_floating_point() else value
        # a formula asks for its shape only: the gradients that read its values are not wanted
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def masked(self, operand: str, grad: Tensor, off: float = 0.0) -> Tensor:
        """As the base class says."""
        (shape, _, order, _, _), (_, parts) = self._layouts[operand], self._slots[operand]
        out = torch.ops.dropit.apply_mask(parts[0], in_order(grad, order), off)
        return unflatten(out, shape, order)

    def rounded(self, operand: str) -> bool:
        """As the base class says."""
        return operand in self._slots and is_rounded(self._slots[operand][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


Held = tuple[str, str, tuple[tuple[str, Any], ...]]  # operand, codec, options


class PackedFunction(torch.autograd.Function):
    """Runs a row: its own forward, its formula in the backward, packed tensors in between.

    ``apply(rule, needs, held, given, *args, *parts)``: ``held`` says how each operand that the op
    makes itself is kept, ``given`` lists how the trailing ``parts`` belong to operands.
    """

    @staticmethod
    def forward(
        rule_name: str,
        needs: tuple[str, ...],
        held: tuple[Held, ...],
        given: tuple[Entry, ...],
        *flat: Any,
    ) -> Any:
        """Runs the row; what it makes itself is packed here and returned behind the result."""
        rule = RULES[rule_name]
        args = flat[: len(flat) - sum(e.tensors for e in given)]
        out, made = (rule.run_saving or _no_more(rule))(*args)
        given_made = dict(zip(inputs_of(rule), args, strict=True)) | {"result": out} | made
        extra: list[Tensor] = []
        for operand, codec, options in held:
            if is_kept_whole(rule, operand, codec):
                continue
            value = given_made[operand]
            if codec == "keep":
                extra.append(value)
            else:
                order = memory_order(_shaped_like(rule, operand, args, out))
                extra += parts_of(value, order, codec, dict(options))
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
        layouts = {"result": layout_of(out)} | {n: layout_of(a) for n, a in tensors.items()}
        at = 0
        for operand, codec, options in held:
            if is_kept_whole(rule, operand, codec):
                tensor = out if operand == "result" else tensors[operand]
                entries.append(Entry(operand, "keep", (), tensor.dtype, 1))
                saved.append(tensor)
                continue
            buffers = buffers_of(codec, options)
            like = made[at] if codec == "keep" else _shaped_like(rule, operand, args, out)
            layouts[operand] = layout_of(like)
            if is_wanted(rule, operand, needs):  # it may be made for others alone
                entries.append(Entry(operand, codec, options, like.dtype, buffers))
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


def is_kept_whole(rule: OpRule, operand: str, codec: str) -> bool:
    """Whether an argument, or the result, is kept as it is: it is there without being made."""
    return codec == "keep" and (operand == "result" or operand in inputs_of(rule))


def is_wanted(rule: OpRule, operand: str, needs: tuple[str, ...]) -> bool:
    """Whether a gradient that is asked for reads an operand of a row."""
    read = rule.read(operand)
    return read is not None and read.use != "shape" and any(n in needs for n in read.needed_by)


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
