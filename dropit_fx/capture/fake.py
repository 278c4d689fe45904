"""Fake tensors: graphs run on them to tell shapes and what autograd keeps, at no cost."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dropit_fx.holders import stays_with_caller
from dropit_fx.private import (
    EXAMPLE_VALUE,
    FakeTensor,
    FakeTensorMode,
    NormBase,
    OpOverload,
    ShapeEnv,
    TorchDispatchMode,
    assert_scalar,
    conv_backend,
    disable_current_modes,
    embedding_bag,
    free_unbacked_symbols,
    functional_batch_norm,
    hint,
    pytree,
    reparametrize_module,
    schema,
    storage_id,
)
from dropit_fx.runtime.overrides import has_own_ops
from dropit_fx.runtime.regions import name_of

log = logging.getLogger(__name__)


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode:
    """The mode of the first fake tensor among ``values``, or a new one."""
    found = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    return found or FakeTensorMode(allow_non_fake_inputs=True)


def concrete_fakes(values: Iterable[Any]) -> tuple[Any, ...]:
    """Fresh fake tensors of the same layout, with hints in the place of symbolic sizes.

    What runs on them leaves no guards in the compiler's shape environment, and every size is a
    number, those that depend on values too (:class:`FakeRun`).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)

    def concrete(value: Any) -> Any:
        if isinstance(value, Tensor):
            if is_made_of_tensors(value):
                return made_of({n: concrete(t) for n, t in inner_tensors(value).items()}, value)
            with mode:
                fake = torch.empty_strided(
                    [_number(s) for s in value.shape],
                    [_number(s) for s in value.stride()],
                    dtype=value.dtype,
                    device=value.device,
                )
            return _differentiable_as(value, fake)
        return _number(value) if isinstance(value, torch.SymInt) else value

    return tuple(concrete(v) for v in values)


def is_made_of_tensors(value: Tensor) -> bool:
    """Whether it consists of others, and its class has a say in what ops do: a quantised weight."""
    return hasattr(value, "__tensor_flatten__") and has_own_ops((value,))


def inner_tensors(value: Any) -> dict[str, Tensor]:
    """What such a tensor consists of, by name."""
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}


def made_of(inner: Mapping[str, Tensor], like: Any) -> Tensor:
    """One like ``like``, made of other tensors."""
    size, stride = ([_number(s) for s in sizes] for sizes in (like.shape, like.stride()))
    meta = like.__tensor_flatten__()[1]
    made: Tensor = type(like).__tensor_unflatten__(inner, meta, size, stride)
    return made


def fakes_of(values: Iterable[Any]) -> tuple[Any, ...]:
    """Fake tensors for real ones, and for fake ones in their own mode; other values as they are."""
    values = tuple(values)
    mode = fake_mode_of(values)

    def fake(value: Tensor) -> Tensor:
        leaf = value.detach()
        return _differentiable_as(
            value, leaf if isinstance(leaf, FakeTensor) else mode.from_tensor(leaf)
        )

    return tuple(fake(v) if isinstance(v, Tensor) else v for v in values)


def _differentiable_as(value: Tensor, fake: Tensor) -> Tensor:
    """``fake``, requiring a gradient as ``value`` does: as a leaf, or as what an op has made."""
    fake.requires_grad_(value.requires_grad)
    if value.is_leaf:
        return fake
    return fake.view_as(fake) if stays_with_caller(value) else as_activation(fake)


def as_activation(leaf: Tensor) -> Tensor:
    """The same as the result of an op: such a tensor stays after a forward for autograd alone."""
    with torch.enable_grad():
        return leaf.clone()


def blank_as(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the same layout, requiring a gradient as that does."""
    return _differentiable_as(tensor, blank(tensor).detach())


def held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by one name for each module that holds them.

    PyTorch's own names are either one for each tensor, or one for each way to a module: with these,
    ``functional_call`` leaves its tensors in a module that is reached by two ways.
    """
    return {
        name: tensor
        for path, part in module.named_modules()
        for tensors in (part.named_parameters, part.named_buffers)
        for name, tensor in tensors(path, recurse=False, remove_duplicate=False)
    }


def blank(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the same layout; a leaf that requires a gradient where it can."""
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return made.requires_grad_() if tensor.is_floating_point() else made


@contextmanager
def fake_state(
    module: nn.Module, mode: FakeTensorMode, real: Collection[str] = ()
) -> Iterator[dict[int, bool]]:
    """Fake parameters and buffers for the time of a run, but those that are named to stay ``real``.

    Yields the storage of each, and whether it is a parameter.
    """
    fakes: dict[str, Tensor] = {}
    kinds: dict[int, bool] = {}
    for name, tensor in held(module).items():
        if name in real:
            continue
        fakes[name] = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
        if fakes[name] is not tensor:  # the mode has one fake for each tensor: of earlier runs too
            fakes[name].grad = None
        inner = inner_tensors(fakes[name]) if is_made_of_tensors(fakes[name]) else {}
        for part in (fakes[name], *inner.values()):
            kinds[storage_id(part)] = isinstance(tensor, nn.Parameter)
    with reparametrize_module(module, fakes, tie_weights=False), _numbered_momentum(module):
        yield kinds


@contextmanager
def _numbered_momentum(module: nn.Module) -> Iterator[None]:
    """A batch norm with a cumulative average reads its count as a number, which no fake one has.

    What autograd keeps does not depend on the momentum.
    """
    norms = [m for m in module.modules() if isinstance(m, NormBase) and m.momentum is None]
    try:
        for norm in norms:
            norm.momentum = 0.5
        yield
    finally:
        for norm in norms:
            norm.momentum = None


@contextmanager
def leaving_blocks(run: fx.Interpreter) -> Iterator[None]:
    """After an error, the autocasts and inference modes that a graph had entered are left again.

    And what it switches is switched back.
    """
    with switching_back(run.module):
        try:
            yield
        except BaseException:
            for node, value in reversed(list(run.env.items())):
                for user in node.users:
                    if user not in run.env and name_of(user)[:6] == "_exit_":
                        user.target(value)
            raise


# gradients, saved-tensor hooks, attention's kernels: one node off, one on again
_SWITCHES = ("_set_grad_enabled", "_saved_tensors_hooks_", "_backend_from_string", "_sdpa_kernel")


@contextmanager
def switching_back(graph_module: nn.Module) -> Iterator[None]:
    """After an error, all that a graph of Dynamo's switches is as it is at the end of the graph."""
    try:
        yield
    except BaseException:
        made: dict[fx.Node, Any] = {}
        graphs = (m.graph for m in graph_module.modules() if isinstance(m, fx.GraphModule))
        for node in (n for graph in graphs for n in graph.nodes if n.op == "call_function"):
            if name_of(node).startswith(_SWITCHES):
                made[node] = node.target(*map_arg(node.args, made.__getitem__))
        raise


class RealStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """For the time of a block, what ops make is as large in memory as it is on real tensors.

    Fake tensors are as large as their shape says. A few ops shrink a tensor that was larger, the
    backward of LSTMs reads a workspace of which only the library knows the size, and norms under
    autocast have statistics in more bits.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(func, OpOverload):  # one with graphs among its arguments
            return result
        real = _REAL_STORAGES.get(func.overloadpacket)
        if real:
            return real(result, func, args)
        return _reduced(result, func, args, kwargs) if _is_reduced_loss(func, result) else result


def _is_reduced_loss(func: Any, result: Any) -> bool:
    scalar = isinstance(result, Tensor) and not result.dim() and result.device.type == "cpu"
    return scalar and any(a.name == "reduction" for a in schema(func).arguments)


def _reduced(result: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Some losses are computed element by element, and reduced in the memory of the elements."""
    with disable_current_modes():
        blank = pytree.tree_map_only(Tensor, _one_zero, (args, kwargs or {}))
        real = func(*blank[0], **blank[1])
    count = real.untyped_storage().nbytes() // real.itemsize
    return result.new_empty(count).resize_(()) if count > 1 else result


def _one_zero(fake: Tensor) -> Tensor:
    """Of the same shape, in no memory."""
    return torch.zeros((), dtype=fake.dtype).expand(fake.shape)


def _with_workspace(result: Any, func: Any, args: Any) -> Any:
    *rest, empty = result
    with disable_current_modes():
        workspace = func(*pytree.tree_map_only(Tensor, _zeros, args))[-1]
    if workspace is None:  # there will be no backward
        return result
    return *rest, empty.new_empty(workspace.numel())


def _with_one_bag_more(result: Any, func: Any, args: Any) -> Any:
    """On CPU there is memory for one bag more, and for a size behind the last offset."""
    out, bags, sizes, *rest = result
    if out.device.type == "cpu":
        bags = bags.new_empty(bags.numel() + 1).resize_(bags.shape) if bags.numel() else bags
        sizes = sizes.new_empty(args[2].numel()).resize_(sizes.shape) if sizes.numel() else sizes
    return out, bags, sizes, *rest


def _as_large_as_its_input(result: Tensor, func: Any, args: Any) -> Tensor:
    """PyTorch's own transposed convolution in three dimensions begins with a copy of its input."""
    slow = args[0].device.type == "cpu" and conv_backend(*args).endswith("SlowTranspose3d")
    return torch.empty_like(args[0]).resize_(result.shape) if slow else result


def _mixed_statistics(result: Any, func: Any, args: Any) -> Any:
    """On CPU a norm of mixed dtypes (autocast's) has its statistics in that of its weight."""
    out, *statistics = result
    weights = [a for a in args[1:] if isinstance(a, Tensor)]
    if out.device.type == "cpu" and weights:
        statistics = [t.to(weights[0].dtype) for t in statistics]
    return out, *statistics


_REAL_STORAGES = {
    torch.ops.aten.native_layer_norm: _mixed_statistics,
    torch.ops.aten.native_group_norm: _mixed_statistics,
    torch.ops.aten.native_batch_norm: _mixed_statistics,
    functional_batch_norm: _mixed_statistics,
    torch.ops.aten.mkldnn_rnn_layer: _with_workspace,
    embedding_bag: _with_one_bag_more,
    torch.ops.aten.convolution: _as_large_as_its_input,
}


def real_result(op: OpOverload, args: Any, kwargs: Any) -> Any:
    """What an op makes, as large in memory as on real tensors; None where fake ones tell it."""
    if getattr(op, "overloadpacket", None) not in _REAL_STORAGES:
        return None
    leaves, spec = pytree.tree_flatten((args, kwargs))
    fakes = concrete_fakes(leaves)
    args, kwargs = pytree.tree_unflatten(list(fakes), spec)
    with disable_current_modes(), fake_mode_of(fakes), RealStorages(), torch.no_grad():
        return op(*args, **kwargs)


def _zeros(fake: Tensor) -> Tensor:
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)


class FakeRun(fx.Interpreter):
    """Runs a graph on fake tensors, with numbers for sizes that depend on values.

    A mask's rows are told by nothing but a real run: that many are :data:`SOME`. An op that does
    not take such numbers (they do not add up) has what Dynamo noted of its result.

    Attributes:
        by_values: The nodes that make or read something in such a size.
        stood_in: Those of them that did not run.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        self.by_values = {n for n in graph_module.graph.nodes if sized_by_values(n)}
        self.stood_in: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """What a node makes."""
        if n.target is assert_scalar.default:  # on sizes
            return None
        if n not in self.by_values:
            return super().run_node(n)
        try:
            with _unlogged():
                result = super().run_node(n)
        except Exception as error:
            if n.op == "output" or EXAMPLE_VALUE not in n.meta:
                raise
            log.info("%s does not run with numbers for its sizes: %s", n.name, error)
            self.stood_in.add(n)
            operands = [self.env[m] for m in n.all_input_nodes]
            result = pytree.tree_map(lambda v: _like(v, operands), n.meta[EXAMPLE_VALUE])
        return pytree.tree_map(lambda v: _like(v, [v]) if _by_values(v) else v, result)


@contextmanager
def _unlogged() -> Iterator[None]:
    """For the time of a block, PyTorch does not log what does not run on fake tensors."""
    theirs = logging.getLogger(FakeTensor.__module__)
    before, theirs.disabled = theirs.disabled, True
    try:
        yield
    finally:
        theirs.disabled = before


SOME = 2  # elements: one might be broadcast


def sized_by_values(node: fx.Node, itself: bool = False) -> bool:
    """Whether a node of Dynamo's makes (``itself``) or reads what depends on values in its size."""
    asked = [node] if itself else [node, *node.all_input_nodes]
    return any(_by_values(n.meta.get(EXAMPLE_VALUE)) for n in asked)


def _by_values(value: Any) -> bool:
    return bool(free_unbacked_symbols(value))


def _number(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not _by_values(size):
        return int(hint(size))
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, SOME)))


def _like(value: Any, operands: list[Any]) -> Any:
    """In numbers what has symbolic sizes: a tensor is made by autograd of the operands."""
    if isinstance(value, torch.SymInt):
        return _number(value)
    if not isinstance(value, Tensor):
        return value
    layout = [*map(_number, value.shape)], [*map(_number, value.stride())]
    made: Tensor = _Made.apply(layout, value.dtype, value.device, *operands)
    return made if value.requires_grad else made.detach()


class _Made(torch.autograd.Function):
    """New memory, of which autograd knows the operands; ``apply(layout, dtype, device, *any)``."""

    @staticmethod
    def forward(
        ctx: Any, layout: Any, dtype: torch.dtype, device: torch.device, *operands: Any
    ) -> Tensor:
        return torch.empty_strided(*layout, dtype=dtype, device=device)


def propagate(graph_module: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Node name -> its value, for fake inputs in the order of the placeholders.

    Up to the first node that does not run: whoever needs them all runs the graph again and says
    what is wrong with it.
    """
    mode = fake_mode_of(inputs)
    with mode, torch.no_grad(), fake_state(graph_module, mode):
        run = FakeRun(graph_module)
        try:
            with leaving_blocks(run):
                run.run(*inputs)
        except Exception as error:
            log.info("on fake tensors: %s", error)
    return {node.name: value for node, value in run.env.items()}
