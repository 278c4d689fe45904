"""The inner backends: what compiles a graph that the pipeline has rewritten."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import fx

from dropit_fx.capture.fake import switching_back
from dropit_fx.compile.fuse import FusePacking
from dropit_fx.compile.lookups import AddLookups
from dropit_fx.compile.partition import KeepPacked
from dropit_fx.compile.record import CompiledGraph
from dropit_fx.compile.returned import ReturnInputsAsTheyAre, in_turn
from dropit_fx.config import ConfigError
from dropit_fx.private import lookup_backend
from dropit_fx.private_inductor import (
    CACHEABLE,
    FREEING,
    FUSING,
    INNER_COMPILE,
    ORDERING,
    PARTITIONER,
    POST_PASS,
    PRE_PASS,
    inductor_config,
    inductor_has,
)
from dropit_fx.runtime.linear_loss import LOSSES
from dropit_fx.runtime.packed_call import (
    CACHE_VERSION,
    PACKED_OPS,
    VERSIONS,
    derived,
    pack,
    unless_changed,
)
from dropit_fx.runtime.regions import run_regions, stand_in
from dropit_fx.words import did_you_mean

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]

_OURS = {f.__name__: f for f in (pack, unless_changed, derived, stand_in, *LOSSES)}


class Job(NamedTuple):
    """What an inner backend compiles."""

    graph_module: fx.GraphModule
    inputs: list[Any]
    mode: str | None
    options: dict[str, Any]
    record: CompiledGraph | None
    fuse: bool
    lower: Callable[..., Any] | None = None

    def guard(self, base: Callable[..., Any] | None) -> KeepPacked:
        """The partitioner guard, which reads what is saved into the record."""
        if self.record is None:
            return KeepPacked(base)
        return KeepPacked(base, self.record.partitions.append, self.record.report.dense_bytes)


def inner_backend(name: str) -> Callable[[Job], Compiled]:
    """The inner backend of that name: one of ``INNER``, or any that torch.compile knows.

    Raises:
        ConfigError: There is none.
    """
    if name in INNER:
        return INNER[name]
    known = (*INNER, *torch.compiler.list_backends(exclude_tags=()))
    if name in ("dropit", "dropit_eager") or name not in known:
        raise ConfigError(f"no inner backend {name!r}.{did_you_mean(name, known)}")

    def foreign(job: Job) -> Compiled:
        log.warning(
            "inner backend %r partitions by itself: packed tensors may not be what it saves", name
        )
        return lookup_backend(name)(job.graph_module, job.inputs)

    return foreign


def patched(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller changes of inductor's config."""
    from dropit_fx.private import list_mode_options

    patches = dict(list_mode_options(mode)) if mode else {}
    return patches | {k.replace("-", "_"): v for k, v in options.items()}


def inductor(job: Job) -> Compiled:
    """PyTorch's own compiler, with what holds packed tensors together added to its passes."""
    from dropit_fx.private import compile_fx, compile_fx_inner

    given = patched(job.mode, job.options)
    patches = dict(given)
    if job.record is not None:
        patches = {k: v for k, v in FREEING.items() if inductor_has(k)} | patches
    patches[PARTITIONER] = job.guard(patches.get(PARTITIONER))
    if inductor_has(PRE_PASS):
        patches[PRE_PASS] = in_turn(patches.get(PRE_PASS), AddLookups())
        if job.fuse:
            patches[PRE_PASS] = in_turn(patches[PRE_PASS], FusePacking())
            patches = {k: v for k, v in FUSING.items() if inductor_has(k)} | patches
    if inductor_has(POST_PASS):
        patches[POST_PASS] = in_turn(patches.get(POST_PASS), ReturnInputsAsTheyAre())
    # our functions are safe to cache under a version that changes with the formulas and kernels
    names = {
        f"{op.__module__}.{op.__name__}": CACHE_VERSION + VERSIONS.get(name, "")
        for name, op in {**_OURS, **PACKED_OPS}.items()
    }
    if inductor_has(CACHEABLE):
        patches[CACHEABLE] = names | dict(patches.get(CACHEABLE) or {})
    lower: dict[str, Any] = {INNER_COMPILE: job.lower} if job.lower is not None else {}
    if job.fuse:
        lower[INNER_COMPILE] = _in_one_order(job.lower or compile_fx_inner, given)
    compiled: Compiled = compile_fx(job.graph_module, job.inputs, config_patches=patches, **lower)  # type: ignore[assignment]
    return compiled


def _in_one_order(lower: Callable[..., Any], given: Mapping[str, Any]) -> Callable[..., Any]:
    """``lower``, which compiles graphs behind the cut, with `ORDERING` for backwards.

    ``given``: what the caller says of inductor's options, which holds for all graphs.
    """
    options = {k: v for k, v in ORDERING.items() if inductor_has(k) and k not in given}

    def ordered(graph: fx.GraphModule, inputs: Any, **how: Any) -> Any:
        with inductor_config(**options) if how.get("is_backward") else nullcontext():
            return lower(graph, inputs, **how)

    return ordered


def aot(
    decompose: bool, compiler: Callable[[fx.GraphModule, list[Any]], Compiled] | None = None
) -> Callable[[Job], Compiled]:
    """AOTAutograd as inner backend; ``compiler``: of forwards and backwards, None: as they are."""

    def compile_aot(job: Job) -> Compiled:
        from dropit_fx.private import (
            aot_autograd,
            boxed_nop,
            min_cut_rematerialization_partition,
        )

        extra: dict[str, Any] = {}
        if decompose:
            from dropit_fx.private import (
                lowering,  # noqa: F401  the decomposition of max_pool2d needs it
                select_decomp_table,
            )

            extra["decompositions"] = select_decomp_table
        base = None if decompose else min_cut_rematerialization_partition
        return aot_autograd(
            fw_compiler=compiler or boxed_nop,
            bw_compiler=compiler or boxed_nop,
            partition_fn=job.guard(base),
            keep_inference_input_mutations=True,
            **extra,
        )(job.graph_module, job.inputs)

    return compile_aot


def eager(job: Job) -> Compiled:
    """The graph as it is."""
    run_regions(job.graph_module)

    def run(*args: Any) -> Any:
        with switching_back(job.graph_module):
            return job.graph_module.forward(*args)

    return run


DECOMPOSED = ("inductor", "aot_eager_decomp_partition")
INNER: dict[str, Callable[[Job], Compiled]] = {
    "inductor": inductor,
    "aot_eager": aot(decompose=False),
    "aot_eager_decomp_partition": aot(decompose=True),
    "eager": eager,
}
