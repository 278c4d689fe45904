"""The kernels of a training step as inductor schedules them, counted without running anything.

A model is compiled on the CPU up to inductor's graphs of forward and backward. These are moved to a
GPU that need not be there, and inductor schedules them for it: what is counted are the kernels that
it would launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils.flop_counter import flop_registry

from dropit_fx.capture.fake import fake_mode_of
from dropit_fx.compile.fuse import ATTENTION
from dropit_fx.kernels import attention as attention_kernel
from dropit_fx.private import VALUE, FakeTensorMode, OpOverload, make_boxed_func, pytree, schema
from dropit_fx.private_inductor import (
    ORIGINAL_OP,
    accesses,
    calls,
    compiling_afresh,
    lowered,
    origins,
    schedule,
    spelling,
    told_of_a_gpu,
)

GPU = torch.device("cuda", 0)
Backend = Callable[[fx.GraphModule, list[Any], Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a step.

    Attributes:
        phase: ``"forward"`` or ``"backward"``.
        name: The ops that it computes: ``"mm"``, ``"gelu, native_layer_norm"``.
        extern: Whether it is a call of a library or a custom op, not written by inductor.
        read_bytes: Of all its inputs, each once: what a kernel at its best reads.
        write_bytes: Of what outlives it.
        flops: Of matrix products, convolutions and attention, a multiplication and an addition as
            two; pointwise arithmetic is not counted.
        dtype: That of the operands of its products; None where it has none.
    """

    phase: str
    name: str
    extern: bool
    read_bytes: int
    write_bytes: int
    flops: int = 0
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it reads and writes."""
        return self.read_bytes + self.write_bytes


def kernels_of_step(
    model: nn.Module,
    args: Sequence[Any],
    backend: Backend,
    device: str = "cuda",
    *,
    capability: int = 90,
    processors: int = 132,
    autocast: torch.dtype | None = None,
) -> list[Kernel]:
    """The kernels of a forward and its backward, in the order of their launches.

    Neither is run: the forward returns memory that nobody has written into. Buffers that a forward
    updates are lost, so that ``model`` is to be a copy.

    Args:
        model: On the CPU, in training mode.
        args: Its positional inputs.
        backend: Compiles a graph of Dynamo's: called with it, its inputs, and what compiles a graph
            behind the cut in the place of inductor's own.
        device: ``"cuda"``: as scheduled for a GPU; ``"cpu"``: for this machine.
        capability: Of the GPU's instruction set, times ten.
        processors: How many streaming multiprocessors it has.
        autocast: The dtype that the forward runs in under autocast; None: without.

    Raises:
        ModuleNotFoundError: ``device`` is ``"cuda"`` and Triton is not installed.
        RuntimeError: Nothing was compiled.
    """
    found: list[Kernel] = []

    def lower(graph: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Callable[..., Any]:
        results = [n.meta[VALUE] if isinstance(n, fx.Node) else n for n in _results(graph)]
        phase = "backward" if how.get("is_backward") else "forward"
        with scheduled_for(graph, inputs, device, capability, processors) as made:
            found.extend(kernels(schedule(made), phase))
        return _stand_in(results)

    def compile_graph(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return backend(graph, inputs, lower)

    with ExitStack() as stack:
        stack.enter_context(compiling_afresh())
        if device != "cpu":  # the one formula that asks for its device
            stack.enter_context(mock.patch.object(attention_kernel, "RUNS", False))
        stack.enter_context(torch.autocast("cpu", autocast, enabled=autocast is not None))
        torch.compile(model, backend=compile_graph, dynamic=False)(*args)
    if not found:
        raise RuntimeError(f"nothing of {type(model).__name__} was compiled")
    return found


@contextmanager
def scheduled_for(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    device: str,
    capability: int = 90,
    processors: int = 132,
) -> Iterator[Any]:
    """What inductor makes of a forward or backward of the CPU, there or on a GPU.

    Args:
        graph: Behind the cut, with ``meta["val"]`` of its inputs; it is rewritten in place.
        inputs: Its inputs, fake.
        device: ``"cpu"`` or ``"cuda"``.
        capability: As of :func:`kernels_of_step`.
        processors: As of :func:`kernels_of_step`.
    """
    with ExitStack() as stack:
        if device == "cpu":
            mode = fake_mode_of(inputs)
        else:
            stack.enter_context(told_of_a_gpu(capability, processors))
            mode, inputs = move_to_gpu(graph)
        yield stack.enter_context(lowered(graph, inputs, mode))


def move_to_gpu(graph: fx.GraphModule) -> tuple[FakeTensorMode, list[Any]]:
    """Puts a graph on the GPU, in place; the mode of its values, and its inputs there.

    Its constants become inputs, behind the others.
    """
    given = graph.graph.find_nodes(op="placeholder")
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, str(node.target), None)
        if isinstance(value, Tensor):
            with graph.graph.inserting_before(first):
                constant = graph.graph.placeholder(node.name)
            constant.meta[VALUE] = value
            node.replace_all_uses_with(constant)
            graph.graph.erase_node(node)
            given.append(constant)
    values = [n.meta[VALUE] for n in given]
    mode = fake_mode_of(values)
    with mode:
        inputs = [_there(v) for v in values]
        for node in graph.graph.nodes:
            node.args = pytree.tree_map(_device_there, node.args)
            node.kwargs = pytree.tree_map(_device_there, dict(node.kwargs))
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    graph.recompile()
    return mode, inputs


def _there(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)


def _device_there(value: Any) -> Any:
    return GPU if isinstance(value, torch.device) else value


def _results(graph: fx.GraphModule) -> Sequence[Any]:
    results: Sequence[Any] = graph.graph.find_nodes(op="output")[0].args[0]
    return results


def _stand_in(results: Sequence[Any]) -> Callable[..., Any]:
    """What is called in the place of a compiled graph: results of the right kind, of no values."""
    made = [(tuple(r.shape), r.stride(), r.dtype) if isinstance(r, Tensor) else r for r in results]

    def run(*_: Any) -> list[Any]:
        return [
            torch.empty_strided(one[0], one[1], dtype=one[2]) if isinstance(one, tuple) else one
            for one in made
        ]

    boxed: Callable[..., Any] = make_boxed_func(run)
    return boxed


# What a kernel takes ------------------------------------------------------------------------------


def kernels(nodes: Sequence[Any], phase: str) -> Iterator[Kernel]:
    """The kernels of inductor's schedule: ``nodes`` of it, in the order of their launches."""
    for node in nodes:
        reads, writes = (sum(buffers.values()) for buffers in accesses(node))
        if not reads + writes:
            continue
        called, ops = calls(node), origins(node)
        product = max(ops, key=flops_of) if called and ops else None
        flops = flops_of(product) if product is not None else 0
        yield Kernel(
            phase=phase,
            name=called or _name(ops),
            extern=bool(called),
            read_bytes=reads,
            write_bytes=writes,
            flops=flops,
            dtype=_dtype(product) if product is not None and flops else None,
        )


def _name(ops: Sequence[fx.Node]) -> str:
    targets = {n.meta.get(ORIGINAL_OP) or n.target for n in ops}
    return ", ".join(sorted({spelling(t) for t in targets if isinstance(t, OpOverload)}))


def _dtype(node: fx.Node) -> torch.dtype | None:
    values = [n.meta.get(VALUE) for n in node.all_input_nodes]
    return next((v.dtype for v in values if isinstance(v, Tensor)), None)


def flops_of(node: fx.Node) -> int:
    """FLOPs of a product, convolution or attention; 0 of all else.

    By the formulas of ``torch.utils.flop_counter``, but for attention that is causal, of which a
    kernel computes half.
    """
    if not isinstance(node.target, OpOverload):
        return 0
    if ATTENTION in schema(node.target).name:
        return _attention_flops(node)
    count = flop_registry.get(node.target.overloadpacket)
    if count is None:
        return 0
    args, kwargs, out = pytree.tree_map_only(
        fx.Node, lambda n: n.meta[VALUE], (node.args, dict(node.kwargs), node)
    )
    return int(count(*args, **kwargs, out_val=out))


def _attention_flops(node: fx.Node) -> int:
    about = schema(node.target)  # type: ignore[arg-type]
    given = dict(zip((a.name for a in about.arguments), node.args, strict=False)) | node.kwargs
    query, key, value = (given[n].meta[VALUE] for n in ("query", "key", "value"))  # type: ignore[union-attr]
    scores = query.shape[:-1].numel() * key.shape[-2]
    # scores and results; in the backward the scores again, and the gradients of both products
    width = query.shape[-1] + value.shape[-1]
    if "backward" in about.name:
        width = 3 * query.shape[-1] + 2 * value.shape[-1]
    return int(2 * scores * width) // (2 if given.get("is_causal") else 1)
