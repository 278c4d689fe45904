"""The Triton code that inductor makes of a graph for a GPU that is not there, told what it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.scheduler as scheduler
import torch.utils._pytree as pytree
from compiled_kernels import Figures, build
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CAPABILITY = 90
_H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=CAPABILITY // 10,
    minor=CAPABILITY % 10,
    multi_processor_count=132,
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
_GPU = torch.device("cuda", 0)


@contextmanager
def told_of_a_gpu() -> Iterator[None]:
    """PyTorch and Triton take it that there is an H100; nothing may run on it."""
    target = GPUTarget("cuda", CAPABILITY, 32)
    active = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
    )
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *args, **kwargs: _H100,
        "current_device": lambda: 0,
    }
    present = {"device_count": lambda: 1, "is_available": lambda: True}
    with ExitStack() as stack:

        def answer(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, value in {**answers, **present}.items():
            answer(torch.cuda, name, value)
            answer(CudaInterface, name, staticmethod(value))
        for name, value in answers.items():
            answer(CudaInterface.Worker, name, staticmethod(value))
        answer(torch.cuda, "get_device_capability", lambda *args: (_H100.major, _H100.minor))
        answer(torch.cuda, "_lazy_init", lambda: None)
        answer(CudaInterface, "get_compute_capability", staticmethod(lambda *args: CAPABILITY))
        answer(driver, "_active", active)
        answer(fake_tensor, "init_gpu_context", lambda device: None)
        answer(scheduler, "has_triton", lambda *args: True)
        answer(triton_helpers, "set_driver_to_gpu", lambda: None)
        yield


def code_of(graph: fx.GraphModule, prepare: Callable[[fx.Graph], None]) -> str:
    """What inductor writes for a forward or backward of the CPU, on a GPU.

    Args:
        graph: behind the cut, with ``meta["val"]`` of its inputs; it is left as it is.
        prepare: a pass in front of inductor's own.
    """
    graph = copy.deepcopy(graph)
    with told_of_a_gpu():
        mode, inputs = _moved(graph)
        prepare(graph.graph)
        graph.recompile()
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            post_grad_passes(graph, False)
            lowering = GraphLowering(graph, example_inputs=inputs, is_inference=False)
            with V.set_graph_handler(lowering):
                lowering.run(*inputs)
                wrapper, _ = lowering.codegen()
    return str(wrapper.value)


def _moved(graph: fx.GraphModule) -> tuple[FakeTensorMode, list[Any]]:
    """Puts a graph on the GPU; its inputs there."""
    mode, inputs = FakeTensorMode(allow_non_fake_inputs=True), []

    def move(value: Any) -> Any:
        return _GPU if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            if isinstance(value, Tensor):
                with mode:
                    kind = {"dtype": value.dtype, "device": _GPU}
                    value = torch.empty_strided(value.shape, value.stride(), **kind)
            inputs.append(value)
        node.args = pytree.tree_map(move, node.args)
        node.kwargs = pytree.tree_map(move, dict(node.kwargs))
    with mode:
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    return mode, inputs


def sources(code: str) -> dict[str, str]:
    """The source of each kernel, by its name."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S))


def launches(code: str) -> list[tuple[str, str]]:
    """Each launch of a kernel, in order, with its arguments."""
    return re.findall(r"^\s+(triton_\w+)\.run\((.*), stream=", code, re.MULTILINE)


def compiled(source: str, name: str) -> Figures:
    """A kernel as its first configuration is compiled."""
    with told_of_a_gpu():
        tuner = getattr(PyCodeCache.load(source), name)
        config = tuner.configs[0]
        signature = tuner.triton_meta["signature"]
        constants = {**tuner.triton_meta["constants"], **config.kwargs}
        return build(
            tuner.fn,
            {n: kind for n, kind in signature.items() if n not in constants},
            constants,
            [n for n, kind in signature.items() if kind.startswith("*")],
            CAPABILITY,
            num_warps=config.num_warps,
        )
