"""Inductor's options, and its schedules without a GPU, as far as their names are private.

As ``private.py``, of which it is a part: ``private_names.py`` has a line for each name.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from dropit_fx.private import STRIDES, VALUE, FakeTensorMode, expected, has, schema
from dropit_fx.private_lookup import look_up

PARTITIONER = "custom_partitioner_fn"
PRE_PASS = "post_grad_custom_pre_pass"
POST_PASS = "post_grad_custom_post_pass"
CACHEABLE = "unsafe_marked_cacheable_functions"
INNER_COMPILE = "inner_compile"

# What inductor is told where it fuses packing. How many operations and reads a value may take
# before it is written to memory for several readers: its own limits are 30, 4 and 8; unpacking is
# some fifty operations and three reads, but of fewer bytes than what would be written. And that
# loops are compared by the places that they read, in whatever shape a tensor is: so those over
# blocks join.
FUSING = {
    "realize_opcount_threshold": 200,
    "realize_reads_threshold": 8,
    "realize_acc_reads_threshold": 16,
    "loop_ordering_after_fusion": False,
}

# And where it compiles a backward so, which unpacks and hardly packs: that loops over the same
# elements take one order. The sum over a sample's rows and the loop that writes these are then one.
ORDERING = {"loop_ordering_after_fusion": True}

# What inductor is told of the memory of a step. It holds what is free for a later buffer of the
# same shape, as long as its estimate of the peak stays the same; there, buffers that a loop works
# on in place or does without count as more memory, so that it holds several for whole layers. This
# way each goes back to the allocator behind its last reader.
FREEING = {"allow_buffer_reuse": False}


def inductor_has(option: str) -> bool:
    """Whether inductor's config has an option."""
    return has(f"torch._inductor.config.{option}")


def takes_several_passes() -> bool:
    """Whether inductor's option for a pass takes a list of them."""
    return has("torch._inductor.custom_graph_pass.get_custom_graph_passes")


def inductor_config(**values: Any) -> AbstractContextManager[Any]:
    """Sets options of inductor's for the time of a block."""
    return _patched("torch._inductor.config", **values)


def written_as(value: fx.Node) -> fx.Node:
    """``value`` as a node that inductor writes to memory once, however many calls read views of it.

    It is made where its graph inserts nodes; ``value`` itself where inductor has no such op.
    """
    name = "torch._inductor.inductor_prims.force_stride_order"
    if not has(name):
        return value
    made = value.graph.call_function(look_up(name), (value, value.meta[VALUE].stride()))
    made.meta = dict(value.meta)
    return made


def wants_memory(user: fx.Node) -> bool:
    """Whether inductor calls an op with tensors in memory, so that it writes what this op reads.

    False where inductor does not tell.
    """
    name = "torch._inductor.lowering.needs_realized_inputs"
    return has(name) and user.target in look_up(name)


def decides_layout(graph: fx.Graph, is_inference: bool) -> bool:
    """Whether inductor lays out the convolutions of a graph channels-last: its own decision."""
    name = "torch._inductor.graph.GraphLowering.decide_layout_opt"
    if not expected(name):
        return False
    module = SimpleNamespace(graph=graph)  # nothing else of a module is read
    return bool(look_up(name)(module, is_inference=is_inference))


def memory_budget() -> float:
    """The share of what a compiled model saves that it may save; 1 without a budget."""
    return float(getattr(look_up("torch._functorch.config"), "activation_memory_budget", 1))


def at_memory_budget(share: float) -> AbstractContextManager[Any]:
    """Sets :func:`memory_budget` for the time of a block."""
    if not has("torch._functorch.config.activation_memory_budget"):
        return nullcontext()
    return _patched("torch._functorch.config", activation_memory_budget=share)


def backwards_at_once() -> AbstractContextManager[Any] | None:
    """AOTAutograd compiles backwards with their forwards meanwhile; None where it cannot be told.

    One that is compiled when it first runs may not run while Dynamo compiles: its metrics clash.
    """
    if not has("torch._functorch.config.force_non_lazy_backward_lowering"):
        return None
    return _patched("torch._functorch.config", force_non_lazy_backward_lowering=True)


def recompiling(limit: int, in_all: int) -> AbstractContextManager[Any]:
    """Sets how often Dynamo compiles one piece of code, and how often in all."""
    limits = {"recompile_limit": limit, "accumulated_recompile_limit": in_all}
    known = {k: v for k, v in limits.items() if has(f"torch._dynamo.config.{k}")}
    return _patched("torch._dynamo.config", **known)


def _patched(config: str, **values: Any) -> AbstractContextManager[Any]:
    patch: AbstractContextManager[Any] = look_up(config).patch(**values)
    return patch


# Schedules ----------------------------------------------------------------------------------------

ORIGINAL_OP = "original_aten"


@contextmanager
def told_of_a_gpu(capability: int = 90, processors: int = 132) -> Iterator[None]:
    """PyTorch and Triton take it that there is a GPU; nothing may run on it.

    Args:
        capability: Of its instruction set: 90 of an H100.
        processors: How many streaming multiprocessors it has.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", capability, 32)
    active = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
    )
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name="NVIDIA GPU",
        major=major,
        minor=minor,
        multi_processor_count=processors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )
    interface: Any = look_up("torch._dynamo.device_interface.CudaInterface")
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *args, **kwargs: properties,
        "current_device": lambda: 0,
    }
    present = {"device_count": lambda: 1, "is_available": lambda: True}
    with ExitStack() as stack:

        def answer(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        def answer_named(name: str, value: Any) -> None:
            owner, _, last = name.rpartition(".")
            answer(look_up(owner), last, value)

        for name, value in {**answers, **present}.items():
            answer(torch.cuda, name, value)
            answer(interface, name, staticmethod(value))
        for name, value in answers.items():
            answer(interface.Worker, name, staticmethod(value))
        answer(torch.cuda, "get_device_capability", lambda *args: (major, minor))
        answer_named("torch.cuda._lazy_init", lambda: None)
        answer(interface, "get_compute_capability", staticmethod(lambda *args: capability))
        answer(driver, "_active", active)
        answer_named("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        answer_named("torch._inductor.scheduler.has_triton", lambda *args: True)
        answer_named("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", lambda: None)
        yield


@contextmanager
def compiling_afresh() -> Iterator[None]:
    """Compiles without caches, and each backward together with its forward."""
    config = look_up("torch._functorch.config")
    with (
        warnings.catch_warnings(),
        config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        inductor_config(force_disable_caches=True),
    ):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # as asked
        yield


@contextmanager
def lowered(graph: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Iterator[Any]:
    """What inductor makes of a forward or backward behind the cut: its graph of loops and calls.

    Args:
        graph: With ``meta["val"]`` of each node; inductor's passes rewrite it in place.
        inputs: Fake, of ``mode``.
        mode: Of all its values.
    """
    context = look_up("torch._inductor.virtualized.V")
    debug = look_up("torch._inductor.debug.DebugContext")()
    with context.set_fake_mode(mode), context.set_debug_handler(debug):
        (out,) = graph.graph.find_nodes(op="output")
        results = out.args[0] if isinstance(out.args[0], list | tuple) else out.args
        values = [n.meta.get(VALUE) if isinstance(n, fx.Node) else None for n in results]
        out.meta.setdefault(
            STRIDES, [v.stride() if isinstance(v, Tensor) else None for v in values]
        )
        look_up("torch._inductor.fx_passes.post_grad.post_grad_passes")(graph, False)
        made = look_up("torch._inductor.graph.GraphLowering")(
            graph, example_inputs=inputs, is_inference=False
        )
        with context.set_graph_handler(made), context.set_extern_kernel_nodes([]):
            made.run(*inputs)
            yield made


def written(made: Any) -> str:
    """The code that inductor writes of what it has lowered."""
    wrapper, _ = made.codegen()
    return str(getattr(wrapper, "value", wrapper))


def schedule(made: Any) -> list[Any]:
    """The kernels of what inductor has lowered, in the order of their launches."""
    made.init_wrapper_code()
    made._update_scheduler()
    return list(made.scheduler.nodes)


def accesses(kernel: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a kernel of a schedule reads, and that it writes, of each buffer.

    By inductor's count, each byte once and nothing of what does not outlive the kernel; but of a
    buffer of which only a part is read, that part, where inductor counts all of it; and nothing is
    read of one that loops only write into, where inductor has it come first.
    """
    both, writes = (
        kernel.get_read_write_buffer_accesses(include_reads=reads, include_writes=True)
        for reads in (True, False)
    )  # asked for reads alone, it counts those of what stays inside
    parts = _parts_of_operands(kernel) if kernel.is_extern() else _parts_of_loops(kernel)
    reads = {
        name: min(int(nbytes), parts.get(name, int(nbytes)))
        for name, nbytes in both.items()
        if nbytes and name not in writes and name not in _only_written(kernel)
    }
    return reads, {name: int(n) for name, n in writes.items() if n}


def _only_written(kernel: Any) -> set[str]:
    """The buffers into which loops write some elements, and of which they load none."""
    if kernel.is_extern():
        return set()
    loaded = {d.name for d in kernel.read_writes.reads if type(d).__name__ == "MemoryDep"}
    return {name for out in kernel.get_outputs() for name in out.get_mutations()} - loaded


def _parts_of_operands(kernel: Any) -> dict[str, int]:
    """Bytes of the operands of a call, by the buffer that each is a view of."""
    given = getattr(kernel.node, "inputs", None) or ()
    flat = [v for one in given for v in (one if isinstance(one, list | tuple) else (one,))]
    views = {
        (v.get_name(), _place(v)): math.prod(map(int, v.get_size())) * v.get_dtype().itemsize
        for v in flat
        if hasattr(v, "get_size") and v.has_tensor_output()
    }
    parts: dict[str, int] = {}
    for (name, _), nbytes in views.items():
        parts[name] = parts.get(name, 0) + nbytes
    return parts


def _place(view: Any) -> str:
    """Where a view begins, how it steps and how far, for telling views of one buffer apart."""
    layout = view.get_layout()
    return f"{getattr(layout, 'offset', 0)} {getattr(layout, 'stride', ())} {view.get_size()}"


def _parts_of_loops(kernel: Any) -> dict[str, int]:
    """Bytes that loops read of each buffer: each index once, as often as it takes other values.

    An index that reads what others read, as that of a neighbour in a byte does, is not counted.
    """
    graph = look_up("torch._inductor.virtualized.V").graph
    found: dict[str, list[Any]] = {}
    whole: set[str] = set()
    for dep in kernel.read_writes.reads:
        if type(dep).__name__ != "MemoryDep" or dep.is_indirect():
            whole.add(dep.name)
        else:
            found.setdefault(dep.name, []).append(dep)
    return {
        name: sum(int(d.get_numel()) for d in _apart(deps)) * graph.get_dtype(name).itemsize
        for name, deps in found.items()
        if name not in whole
    }


def _apart(deps: list[Any]) -> list[Any]:
    """Those of several indices into a buffer that read what no other does, as they begin."""
    if len(deps) == 1:
        return deps
    kept: list[Any] = []
    seen: set[int] = set()
    for places, dep in sorted(
        ((_first_places(d), d) for d in deps), key=lambda pair: -len(pair[0])
    ):
        if not kept or not places <= seen:
            kept.append(dep)
        seen |= places
    return kept


def _first_places(dep: Any, count: int = 512) -> set[int]:
    """What an index is in the first iterations of its loops."""
    import sympy  # type: ignore[import-untyped]  # PyTorch's; slow to import

    functions = {
        "FloorDiv": lambda x, by: x // by,
        "ModularIndexing": lambda x, by, modulus: x // by % modulus,
        "Where": lambda condition, x, y: x if condition else y,
    }
    index = dep.index.expand(identity=True)  # what inductor hides from sympy is printed wrongly
    at = sympy.lambdify(dep.var_names, index, modules=[functions, "math"])
    sizes = [int(n) for n in dep.size]
    rows = itertools.product(*(range(min(n, count)) for n in sizes))  # it holds them all
    return {int(at(*row)) for row in itertools.islice(rows, count)}


def origins(kernel: Any) -> list[fx.Node]:
    """The nodes of the graph that a kernel of a schedule computes, in a fixed order."""
    found = {n for part in kernel.get_nodes() if part.node is not None for n in part.node.origins}
    return sorted(found, key=lambda n: n.name)


def calls(kernel: Any) -> str:
    """What a kernel of a schedule calls of a library: ``"mm"``, ``"dropit.sparsify"``.

    Empty where inductor writes it itself.
    """
    if not kernel.is_extern():
        return ""
    op = getattr(kernel.node, "op_overload", None)
    if op is not None:
        return spelling(op)
    name = getattr(kernel.node, "python_kernel_name", None) or type(kernel.node).__name__
    return str(name).rpartition(".")[2]


def spelling(op: Any) -> str:
    """An op of PyTorch in short: ``"mm"``, ``"dropit.sparsify"``; on a GPU it is the same one."""
    name = schema(op).name.removeprefix("aten::").replace("::", ".")
    return name.replace("_for_cpu", "").removeprefix("_")
