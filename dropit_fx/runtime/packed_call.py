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
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dropit_fx.codecs import CODEC, DERIVED
from dropit_fx.kernels.dtypes import NUMBER
from dropit_fx.ops.autocasting import (
    autocast_dtype,
    autocast_on,
    cast_operands,
    runs_as_it_is,
    under_autocast,
    without_autocast,
)
from dropit_fx.ops.rule import OpRule
from dropit_fx.ops.table import CHECKPOINT, DERIVABLE, OP_RULES, bind
from dropit_fx.runtime.copies import (
    DROP,
    KEEP,
    SAMPLES,
    WIDTH,
    Kept,
    Packed,
    Recipe,
    buffers_of,
    kept_as,
    parts_of,
    shared_out,
    width_of,
)
from dropit_fx.runtime.function import PackedFunction, is_wanted_by
from dropit_fx.runtime.overrides import has_own_ops, stays_dense, transformed
from dropit_fx.runtime.regions import checkpointed as checkpointed  # as pickles name it
from dropit_fx.runtime.regions import packed_checkpoint
from dropit_fx.runtime.regions import stand_in as stand_in  # as pickles name it
from dropit_fx.runtime.tensor_spec import (
    TensorSpec,
    is_view,
    memory_order,
    shares_all,
    shows_all,
    spec_of,
    stays,
)


def _lowered(x: Tensor) -> Tensor:
    """``x`` in the dtype of autocast, where it is on."""
    device = x.device.type
    if not autocast_on(device) or x.dtype not in NUMBER:
        return x
    return x.to(torch.get_autocast_dtype(device))


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
    if transformed():
        return None
    if has_torch_function((x, *needed_by)):
        if has_own_ops((x, *needed_by)):
            return None
        return handle_torch_function(
            pack, (x, *needed_by), x, needed_by, codec, options, autocast=autocast
        )
    asked = [t is not None and t.requires_grad for t in needed_by]
    wanted = torch.is_grad_enabled() and any(asked)
    if not wanted or stays_dense((x,)):
        return None
    with torch.no_grad():
        x = _lowered(x) if autocast else x
        order, known = memory_order(x), dict(options)
        if CODEC[codec].contract is not None:  # of rows as they lie in memory
            last = x.shape[order[-1]] if order else 1
            known[WIDTH] = width_of(x.shape, order) if known.get(SAMPLES) else last
        parts = parts_of(x, order, codec, known)
    return Packed(parts, codec, tuple(known.items()), x.dtype)


def unless_changed(
    packed: Packed | None, views: tuple[tuple[bool | None, Tensor, Tensor], ...]
) -> Packed | None:
    """A packed copy for a reader that sees the same elements through ``views``.

    Args:
        packed: The copy, in memory order.
        views: What an op on the way gave, behind what it looked at; and whether it may give a part
            (a slice, ``expand``), else a copy (``reshape``); None: a graph of its own, either.
            All showed the same elements when the graph was traced.

    Returns:
        None where one does not any more, for inputs of another layout or other sizes: the reader
        keeps what it sees.
    """
    tensors = [t for _, *pair in views for t in pair]
    if has_torch_function(tensors) and not has_own_ops(tensors):
        return handle_torch_function(unless_changed, tensors, packed, views)
    if all(_SEEN[part](made, x) for part, made, x in views):
        return packed
    return None


_SEEN = {True: shows_all, False: is_view, None: shares_all}


def by_mode(training: bool, in_training: Any, in_eval: Any) -> Any:
    """One of two constants: what a traced model's own ``if self.training`` chose between."""
    if has_torch_function((training,)):
        return handle_torch_function(by_mode, (training,), training, in_training, in_eval)
    return in_training if training else in_eval


def in_mode(
    training: bool,
    traced: bool,
    block: Callable[..., Any],
    inputs: tuple[Any, ...],
    otherwise: tuple[Any, ...],
) -> Any:
    """What a traced model computes without gradients in one mode alone, as it updates its buffers.

    Args:
        training: The mode.
        traced: That in which it does.
        block: What it does.
        inputs: Of that.
        otherwise: What stands for the results in the other mode.
    """
    if has_torch_function((training,)):
        return handle_torch_function(
            in_mode, (training,), training, traced, block, inputs, otherwise
        )
    if training != traced:
        return otherwise
    with torch.no_grad():
        return block(*inputs)


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
    if not transformed() and has_torch_function(tensors):
        if has_own_ops(tensors):
            return None
        return handle_torch_function(derived, tensors, rule_name, args, packs, like)
    rule = DERIVABLE[rule_name]
    named = dict(zip(rule.names(len(args)), args, strict=True))
    kept: list[Kept] = []
    specs: list[TensorSpec] = []
    parts: list[Tensor] = []
    for name in dict.fromkeys((*named, *packs)):
        value, packed = named.get(name), packs.get(name)
        if name in packs and packed is None:
            return None
        if packed is None and isinstance(value, Tensor):
            packed = Packed((value.detach(),), "keep", (), value.dtype)
        if packed is None:
            continue
        kept.append(kept_as(name, packed))
        whole = packed.parts[0] if packed.codec == "keep" else like  # of what the op made itself
        specs.append(spec_of(value if isinstance(value, Tensor) else whole))
        parts += packed.parts
    plain = tuple(None if isinstance(a, Tensor) else a for a in args)
    autocast = autocast_dtype(like.device.type) if rule.repeats else None
    recipe = Recipe(rule_name, plain, tuple(kept), tuple(specs), spec_of(like), autocast)
    return Packed(tuple(parts), DERIVED, (("recipe", recipe),), like.dtype)


def _packed_op(rule: OpRule) -> Callable[..., Any]:
    def packed_op(
        *args: Any, packed: Mapping[str, Any], gives: tuple[str, ...] = (), **kwargs: Any
    ) -> Any:
        bound = bind(rule, args, kwargs)
        assert bound is not None, f"packed_{rule.name}: {args} {kwargs}"
        values = tuple(bound.values())
        as_torch = transformed() or (has_torch_function(values) and has_own_ops(values))
        if not as_torch and has_torch_function(values):
            return handle_torch_function(
                packed_op, values, *args, packed=packed, gives=gives, **kwargs
            )
        needs = tuple([n for n, a in bound.items() if isinstance(a, Tensor) and a.requires_grad])
        derived_for_nobody = packed.get("result", "") is None
        unasked = not torch.is_grad_enabled() or not needs or derived_for_nobody
        dense = as_torch or stays_dense(values)
        if unasked or dense or rule.obstacle(bound):
            plain = rule.run(*bound.values())
            return (plain, *[None] * len(gives)) if gives else plain
        uncast, cast = bound, under_autocast(bound) and not runs_as_it_is(rule)
        if cast:
            bound = cast_operands(rule, bound)
        to_keep, copied, parts = _what_is_kept(rule, bound, uncast, needs, packed, gives)
        with without_autocast(_device_of(bound)) if cast else nullcontext():
            out, *own_parts = PackedFunction.apply(
                rule.name, needs, to_keep, copied, *bound.values(), *parts
            )
        if torch.compiler.is_dynamo_compiling():
            out = torch.ops.dropit.once(out, rule.name)
        if not gives:
            return out
        copies: dict[str, Packed] = {}
        for kept, own in shared_out(to_keep, own_parts):
            if own:
                dtype = own[0].dtype if kept.codec == "keep" else out.dtype
                copies[kept.operand] = Packed(own, kept.codec, kept.options, dtype)
        return (out, *[copies.get(name) for name in gives])

    packed_op.__name__ = packed_op.__qualname__ = f"packed_{rule.name}"
    packed_op.__doc__ = (
        f"``{rule.name}``, exact in the forward, with the operands in ``packed`` kept packed."
    )
    return packed_op


def _device_of(bound: Mapping[str, Any]) -> str:
    """The type of device that a call runs on, which has a tensor."""
    return next(a.device.type for a in bound.values() if isinstance(a, Tensor))


def _what_is_kept(
    rule: OpRule,
    bound: Mapping[str, Any],
    uncast: Mapping[str, Any],
    needs: tuple[str, ...],
    packed: Mapping[str, Any],
    gives: tuple[str, ...],
) -> tuple[tuple[Kept, ...], tuple[Kept, ...], list[Tensor]]:
    """What one call keeps, as ``packed=`` says and as far as a gradient in ``needs`` reads it.

    That is what it keeps by itself, what comes packed already, and the parts of that. ``uncast``
    are the arguments ``bound`` as they were before autocast.
    """
    to_keep: list[Kept] = []
    copied: list[Kept] = []
    parts: list[Tensor] = []
    for read in (r for r in rule.reads if r.is_of(bound)):
        operand = read.operand
        wanted = is_wanted_by(read, needs)
        statistic = operand not in bound and read.exact  # formulas ask for its shape
        if not (wanted or operand in gives or statistic):
            continue
        value = bound.get(operand)
        is_tensor = operand not in bound or isinstance(value, Tensor)
        if operand not in packed and is_tensor:
            raise ValueError(
                f"packed_{rule.name}: packed= does not say how {operand!r} is kept, which the"
                f" gradients of {', '.join(read.needed_by)} read"
            )
        # None: who makes the copy has made none, since it asks for no gradient itself
        how: Any = packed.get(operand) or KEEP
        if read.beside and how == DROP:
            continue
        if isinstance(how, Packed):
            copied.append(kept_as(operand, how))
            parts += how.parts
        elif how[0] != "keep" or operand not in bound:
            codec, options = how[0], tuple(how[1].items())
            count = 0 if codec == "keep" and operand == "result" else buffers_of(codec, options)
            to_keep.append(Kept(operand, codec, options, tensors=count))
        elif rule.autocast == "lower" and uncast[operand] is not value and stays(uncast[operand]):
            # a parameter stays anyway: it is kept in the place of autocast's copy
            copied.append(Kept(operand, "keep", dtype=bound[operand].dtype))
            parts.append(uncast[operand].detach())
        elif is_tensor:
            to_keep.append(Kept(operand, "keep", tensors=0))
    return tuple(to_keep), tuple(copied), parts


def _cache_version() -> str:
    """Hash of every formula and kernel: what compile caches do not look into, and must key on."""
    root = Path(__file__).parent.parent
    files = [root / "private_names.py"]
    for room in ("codecs", "kernels", "ops", "runtime"):
        files += sorted(
            p for p in (root / room).rglob("*") if p.suffix in (".py", ".c", ".h", ".json")
        )
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
