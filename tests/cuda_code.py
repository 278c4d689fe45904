"""The Triton code that inductor makes of a graph for a GPU that is not there, told what it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

from compiled_kernels import Figures, build
from torch import fx
from torch._inductor.codecache import PyCodeCache

from dropit_fx.bench.schedule import scheduled_for
from dropit_fx.private_inductor import told_of_a_gpu, written

CAPABILITY = 90


def code_of(graph: fx.GraphModule, prepare: Callable[[fx.Graph], None]) -> str:
    """What inductor writes for a forward or backward of the CPU, on a GPU.

    Args:
        graph: behind the cut, with ``meta["val"]`` of its inputs; it is left as it is.
        prepare: a pass in front of inductor's own.
    """
    graph = copy.deepcopy(graph)
    prepare(graph.graph)
    graph.recompile()
    with scheduled_for(graph, (), "cuda", CAPABILITY) as made:
        return written(made)


def sources(code: str) -> dict[str, str]:
    """The source of each kernel, by its name."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S))


def launches(code: str) -> list[tuple[str, str]]:
    """Each launch of a kernel, in order, with its arguments."""
    return re.findall(r"^\s+(triton_\w+)\.run\((.*), stream=", code, re.MULTILINE)


def compiled(source: str, name: str) -> Figures:
    """A kernel as its first configuration is compiled."""
    with told_of_a_gpu(CAPABILITY):
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
