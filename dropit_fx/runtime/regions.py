"""Checkpointed regions of a graph that runs: made again from packed inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from dropit_fx.kernels.dispatch import define
from dropit_fx.ops.rule import OpRule
from dropit_fx.ops.table import CHECKPOINT, add_row
from dropit_fx.private import CHECKPOINT_CONTEXT, OpOverload, get_proxy_mode, schema, storage_id
from dropit_fx.runtime.copies import Kept, Packed, kept_as, read_back, shared_out
from dropit_fx.runtime.offload import brought_back
from dropit_fx.runtime.overrides import transformed
from dropit_fx.runtime.tensor_spec import TensorSpec, copied_to, laid_out, spec_of, stays


def _value(value: Tensor, x: Tensor) -> Tensor:
    """A copy with the strides of ``x``: views of both are views alike."""
    return copied_to(value, x.stride())


define("stands_for(Tensor value, Tensor x) -> Tensor", _value, _value, triton=False)
STANDS_FOR = torch.ops.dropit.stands_for.default


def stand_in(x: Tensor, packed: Packed | None) -> Tensor:
    """What a checkpointed region reads for its input ``x``: ``x`` made again from ``packed``.

    The partitioner puts ``x`` itself in its place in the forward (``partition.KeepPacked``), for
    which a joint graph says what it stands for. The gradient goes to ``x``.
    """
    if packed is None:
        return x
    again: Tensor = _StandIn.apply(x, kept_as("x", packed), *packed.parts)
    return again


class _StandIn(torch.autograd.Function):
    """``apply(x, kept, *parts)``: the value of ``parts``, with the gradient of ``x``."""

    @staticmethod
    def forward(x: Tensor, kept: Kept, *parts: Tensor) -> Tensor:
        again = read_back(kept, tuple(brought_back(parts)), spec_of(x)).to(x.dtype)
        value: Tensor = STANDS_FOR(laid_out(again, x.stride()), x)
        return value

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
    **options: Any,
) -> Any:
    """As ``packed_checkpoint``, for graphs that run as they are.

    The region is made again with the random numbers of its forward; PyTorch's own op for it draws
    new ones unless AOTAutograd traces it. And it keeps its inputs without the graphs behind them,
    which PyTorch's checkpoint holds, with all that they have saved, also where the region only
    compares an input or detaches it.

    Args:
        body: As for ``packed_checkpoint``, which has the next two as well.
        inputs: Its inputs.
        packed: The packed forms of some.
        options: Of ``torch.utils.checkpoint.checkpoint``.
    """
    if torch.compiler.is_dynamo_compiling():  # made again from what it was given, packed or not
        no_copies = [None] * len(packed or {})
        return checkpoint(body, *inputs, *no_copies, **options | {"use_reentrant": False})
    if CHECKPOINT_CONTEXT in body.meta:
        options["context_fn"] = body.meta[CHECKPOINT_CONTEXT]
    handed_on: list[Any] = list(inputs)  # what the region is made again from
    in_forward: dict[int, Tensor] = {}  # and what its forward reads in its place
    copies: dict[int, tuple[Kept, TensorSpec]] = {}
    parts: list[Tensor] = []
    for operand, copy in (packed or {}).items():
        if copy is not None:
            at = place_of(operand)
            in_forward[at], handed_on[at] = inputs[at], None
            copies[at] = kept_as(operand, copy), spec_of(inputs[at])
            parts += copy.parts
    # what the region writes into (a norm's statistics, an average) is read again as it was, and
    # written by the forward alone, as in compiled code; or as eager mode does, which counts twice
    before = {
        at: inputs[at]
        for at in body.meta.get(WRITTEN, range(len(inputs)))  # not known yet: any of them
        if isinstance(inputs[at], Tensor) and not inputs[at].requires_grad
    }
    copied = dict if EACH_TIME in body.meta else _copies
    before = copied(before)
    for at in before:
        in_forward[at], handed_on[at] = inputs[at], None
    for at, x in enumerate(handed_on):
        # part of a parameter stays what it is: in the forward and when the region is made again,
        # its readers keep the parameter in the place of autocast's copy; and nothing is behind it
        if isinstance(x, Tensor) and not x.is_leaf and not stays(x):
            in_forward[at], handed_on[at] = x, x.detach().requires_grad_()
    no_stand_ins = [None] * len(packed or {})
    count = len(inputs)  # the region outlives the forward: it must not hold the inputs themselves

    def region(*given: Any) -> Any:
        values = list(given[:count])
        if in_forward:
            for at, value in in_forward.items():
                values[at] = value
            return body(*values, *no_stand_ins)
        for at, buffer in copied(before).items():
            values[at] = buffer
        held = shared_out([kept for kept, _ in copies.values()], brought_back(given[count:]))
        for (at, (_, spec)), (kept, own) in zip(copies.items(), held, strict=True):
            with torch.no_grad():
                again = read_back(kept, own, spec).to(spec.dtype)
                values[at] = laid_out(again, spec.stride)
            values[at].requires_grad_()
        return body(*values, *no_stand_ins)

    try:
        return checkpoint(region, *handed_on, *parts, **options | {"use_reentrant": False})
    finally:
        in_forward.clear()


def computed(body: fx.GraphModule, *inputs: Any) -> Tensor:
    """A weight that is computed, of which its own backward keeps ``inputs`` alone.

    It has the bits of its ops where they stood, forward and backward: they run again on the very
    tensors, which nothing may write to in between, and draw no random numbers. Readers of the
    result make it again likewise (``derive`` of its row).

    Args:
        body: Its ops, with one result.
        inputs: Parameters, and what is small beside the weight.
    """
    made: Tensor
    if transformed():
        made = body(*inputs)
    elif get_proxy_mode() is not None:  # a joint graph is traced: its partitioner makes it again
        made = CHECKPOINT.run(body, *inputs, use_reentrant=False)
    else:
        made = checkpoint(body, *inputs, use_reentrant=False, preserve_rng_state=False)
    return made


COMPUTED = OpRule(
    name="computed",
    targets=(computed,),
    reads=(),
    run=computed,
    derive=lambda body, *inputs: body(*inputs),
    repeats=True,
)
add_row(COMPUTED)


def _copies(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    """A copy of each; those that share memory are views of one copy, as they are of one tensor."""
    sharing = Counter(map(storage_id, tensors.values()))
    storages: dict[int, torch.UntypedStorage] = {}
    made: dict[int, Tensor] = {}
    for at, x in tensors.items():
        shared = storage_id(x)
        if sharing[shared] == 1:
            made[at] = copied_to(x.detach(), x.stride())
            continue
        if shared not in storages:
            storages[shared] = x.untyped_storage().clone()  # type: ignore[no-untyped-call]
        place = storages[shared], x.storage_offset(), x.shape, x.stride()
        made[at] = torch.empty(0, dtype=x.dtype, device=x.device).set_(*place)
    return made


def place_of(operand: str) -> int:
    """The place of a region's input among all of them: 2 for ``inputs.2``."""
    return int(operand.rpartition(".")[2])


def run_regions(graph_module: fx.GraphModule) -> None:
    """Has the checkpoints of a graph run as they are: see :func:`checkpointed`."""
    for part in graph_module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.target in (*CHECKPOINT.targets, packed_checkpoint):
                    node.target = checkpointed
            part.recompile()


def name_of(node: fx.Node) -> str:
    """The name of what a node calls, without the overload."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def with_users(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes, and all that is made of them."""
    found, todo = set[fx.Node](), [*nodes]
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            todo += node.users
    return found


def bodies_of(graph_module: nn.Module, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs among the arguments of a node: those of the regions that it calls."""
    targets = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    parts = [getattr(graph_module, target, None) for target in targets]
    return [part for part in parts if isinstance(part, fx.GraphModule)]


def overload_name(node: Any) -> str:
    """``aten::add`` of a node that calls an overload of it; ``""`` of any other."""
    target = getattr(node, "target", None)
    return schema(target).name if isinstance(target, OpOverload) else ""


def written_unseen(node: fx.Node) -> list[Any]:
    """What a node writes into though no version tells of it: statistics, and lists of tensors."""
    name = name_of(node).removeprefix("packed_")
    if name.startswith("_foreach_") and name.endswith("_"):
        return list(node.args[:1])
    if name not in ("batch_norm", "instance_norm"):
        return []
    places = slice(3, 5) if isinstance(node.target, OpOverload) else slice(1, 3)
    return [*node.args[places], *(node.kwargs.get(f"running_{n}") for n in ("mean", "var"))]


WRITTEN = "dropit_written"  # in a region's meta: the inputs that it writes into, by their place
EACH_TIME = "dropit_each_time"  # in a region's meta: it writes when it is made again, too
DECIDES = "dropit_decides"  # in a region's meta: whether it keeps indices made of such inputs
