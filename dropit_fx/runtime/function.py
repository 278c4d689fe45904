"""The autograd function that runs every row: packed tensors between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropit_fx.codecs import CODEC, DERIVED
from dropit_fx.ops import backwards
from dropit_fx.ops.autocasting import autocast_as, autocast_dtype
from dropit_fx.ops.rule import OpRule, Read
from dropit_fx.ops.table import RULES
from dropit_fx.private import (
    base_of,
    dynamo_skips,
    is_legacy_batchedtensor,
    storage_id,
    unsafe_view,
)
from dropit_fx.runtime.copies import (
    Kept,
    is_rounded,
    kept_rows,
    kept_samples,
    parts_of,
    read_back,
    shared_out,
)
from dropit_fx.runtime.offload import brought_back
from dropit_fx.runtime.tensor_spec import TensorSpec, in_order, spec_of, unflatten

Slots = Sequence[tuple[Kept, tuple[Tensor, ...]]]  # how each operand is kept, and what holds it


class _SavedTensors(backwards.Saved):
    """Operand -> dense tensor, unpacked when read; operands that nobody saved are blank memory."""

    def __init__(self, slots: Slots, specs: Mapping[str, TensorSpec]) -> None:
        self._slots = {kept.operand: (kept, parts) for kept, parts in slots}
        self._specs = specs

    def __getitem__(self, operand: str) -> Tensor:
        spec = self._specs[operand]
        if operand in self._slots:
            value = read_back(*self._slots[operand], spec)
            # what other readers share may be packed before autocast lowers it for this one
            casts = value.dtype != spec.dtype and value.is_floating_point()
            return value.to(spec.dtype) if casts else value
        # a formula asks for its shape only: the gradients that read its values are not wanted
        return self.blank(operand)

    def blank(self, operand: str) -> Tensor:
        """As the base class says."""
        spec = self._specs[operand]
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)

    def masked(self, operand: str, grad: Tensor) -> Tensor:
        """As the base class says."""
        spec, (_, parts) = self._specs[operand], self._slots[operand]
        out = torch.ops.dropit.apply_mask(parts[0], in_order(grad, spec.order), 0.0)
        return unflatten(out, spec.shape, spec.order)

    def by_row(self, operand: str, grad: Tensor) -> tuple[Tensor, Tensor]:
        """As the base class says."""
        if operand in self._slots:
            rows = kept_rows(*self._slots[operand], self._specs[operand], grad)
            if rows is not None:
                return rows
        return super().by_row(operand, grad)

    def by_sample(self, operand: str, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """As the base class says."""
        if operand not in self._slots:
            return None
        return kept_samples(*self._slots[operand], self._specs[operand], grad)

    def rounded(self, operand: str) -> bool:
        """As the base class says."""
        return operand in self._slots and is_rounded(self._slots[operand][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


class PackedFunction(torch.autograd.Function):
    """Runs a row: its own forward, its formula in the backward, packed tensors in between.

    ``apply(rule, needs, to_keep, packed, *args, *parts)``: ``to_keep`` says how each operand is
    kept that the call keeps by itself, ``packed`` to which operands the trailing ``parts`` belong.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rule_name: str,
        needs: tuple[str, ...],
        to_keep: tuple[Kept, ...],
        packed: tuple[Kept, ...],
        *flat: Any,
    ) -> Any:
        """Runs the row, and saves packed parts, and whole what is named so.

        What the row makes itself is packed here and returned behind the result.
        """
        rule = RULES[rule_name]
        count = len(flat) - sum(k.tensors for k in packed)
        args, saved = flat[:count], list(flat[count:])  # a tuple
        out, inside = rule.run_saving(*args) if rule.run_saving else (rule.run(*args), {})
        out = _no_view(out, args)
        named = dict(zip(rule.inputs, args, strict=True))
        tensors = {n: a for n, a in named.items() if isinstance(a, Tensor)}
        specs = {"result": spec_of(out)} | {n: spec_of(a) for n, a in tensors.items()}
        all_kept = list(packed)
        made: list[Tensor] = []
        for kept in to_keep:
            operand = kept.operand
            value = inside[operand] if operand in inside else named.get(operand, out)
            if not kept.tensors:
                all_kept.append(Kept(operand, "keep", dtype=value.dtype))
                saved.append(value)
                continue
            whole = kept.codec == "keep"
            spec = spec_of(value) if whole else _spec_inside(rule, operand, args, out)
            own = (value,) if whole else parts_of(value, spec.order, kept.codec, dict(kept.options))
            specs[operand] = spec
            made += own
            read = rule.read(operand)
            if read is not None and is_wanted_by(read, needs):  # it may be made for others alone
                all_kept.append(Kept(operand, kept.codec, kept.options, spec.dtype, len(own)))
                saved += own
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.rule_name, ctx.needs, ctx.kept, ctx.specs = rule_name, needs, all_kept, specs
        # a row that runs as it is does so in the backward too
        ctx.autocast = autocast_dtype(out.device.type)
        ctx.plain = {n: None if n in tensors else a for n, a in named.items()}
        ctx.parts = len(flat) - count
        return (out, *made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> Any:
        """Runs the row's formula, which unpacks what it reads."""
        if grad is not None:
            check_grad(grad, f"packed_{ctx.rule_name}")
        grads: backwards.Grads = {}
        if grad is not None:
            slots = shared_out(ctx.kept, brought_back(ctx.saved_tensors))
            grads = gradients(ctx, grad, slots, ctx.needs)
        by_argument = [grads.get(n) if n in ctx.needs else None for n in ctx.plain]
        return (None, None, None, None, *by_argument, *[None] * ctx.parts)


def gradients(ctx: Any, grad: Tensor, slots: Slots, needs: tuple[str, ...]) -> backwards.Grads:
    """What a row's formula makes of ``slots``: by argument, for those in ``needs``.

    Args:
        ctx: The node of a ``PackedFunction``.
        grad: Of its result.
        slots: How its operands are kept, and the tensors that hold them.
        needs: Arguments whose gradients are wanted.
    """
    rule = RULES[ctx.rule_name]
    tensors = {n: spec for n, spec in ctx.specs.items() if n in ctx.plain}
    call = backwards.Called(
        rule,
        ctx.plain,
        {n: spec.shape for n, spec in tensors.items()},
        {n: spec.stride for n, spec in tensors.items()},
        {n: spec.dtype for n, spec in tensors.items()},
        frozenset(needs),
    )
    formula = rule.backward or backwards.vjp
    if any(k.codec != DERIVED and CODEC[k.codec].slope for k, _ in slots):
        formula = backwards.slopes
    with autocast_as(ctx.autocast, grad.device.type):
        return formula(grad, _SavedTensors(slots, ctx.specs), call)


def check_grad(grad: Tensor, function: str) -> None:
    """Raises for a gradient that is to be differentiated again, and for many that come as one.

    A compiler is not asked.
    """
    if type(grad) is not Tensor or torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise twice_refused(function)
    if is_legacy_batchedtensor(grad):
        raise RuntimeError(
            f"{function}: many gradients at once (is_grads_batched=True, vectorize=True) are not"
            " supported, since packed tensors are unpacked for one. Take them one by one, by"
            f" torch.func.vjp or jacrev, which run packed models dense, or {_DENSE}."
        )


def twice_refused(function: str) -> RuntimeError:
    """What is said where a gradient that ``function`` computes is differentiated again."""
    return RuntimeError(
        f"{function}: double backward (create_graph=True) is not supported,"
        " since the packed tensors are constants to autograd. Where a loss differentiates a"
        f" gradient, {_DENSE}."
    )


_DENSE = (
    "call the original, dense model, which shares its parameters with the packed one (of what"
    " torch.compile returns, the model that it was given)"
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
        check_grad(grad, f"packed_{ctx.rule_name}")
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


def is_wanted_by(read: Read, needs: tuple[str, ...]) -> bool:
    """Whether a gradient that is asked for makes one of a row's reads."""
    return read.use != "shape" and any(n in needs for n in read.needed_by)


def _no_view(out: Tensor, args: Sequence[Any]) -> Tensor:
    """``out`` as a tensor that may be written in place, where it is a view of a temporary one.

    Autograd forbids that for views made inside a custom function.
    """
    if torch.compiler.is_dynamo_compiling() or base_of(out) is None:
        return out
    own = storage_id(out)
    if any(isinstance(a, Tensor) and storage_id(a) == own for a in args):
        return out
    again: Tensor = unsafe_view(out, out.shape)
    return again if again.stride() == out.stride() else out


def _spec_inside(rule: OpRule, operand: str, args: Sequence[Any], out: Tensor) -> TensorSpec:
    """The spec of what the op makes under the name ``operand``: of its shape, or as it says."""
    read = rule.read(operand)
    assert read is not None
    if read.shape is None:
        spec = spec_of(out if read.like == "result" else args[rule.inputs.index(read.like)])
        return TensorSpec(*spec[:3], out.dtype, spec.device) if read.instead else spec
    shape = read.shape(dict(zip(rule.inputs, args, strict=True)))
    strides = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * shape[d + 1]
    return TensorSpec(shape, tuple(strides), list(range(len(shape))), out.dtype, out.device)
