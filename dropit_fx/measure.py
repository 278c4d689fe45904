"""What a training step really keeps and what it really allocates, in bytes.

Two figures, measured and not predicted, of eager and compiled models alike:

* :func:`saved_bytes`: what autograd keeps from the forward to the backward. Two saved tensors that
  share a storage are counted once, and a view counts as the whole storage that it keeps alive.
* :func:`peak_memory`: the most that a forward and its backward have allocated at one time.

They differ: gradients, workspaces and temporary results are part of the peak and are not saved.
Neither counts what existed before the call: parameters, buffers, inputs, and whatever else the
caller holds. An argument that is itself the result of an op is no such input: what made it lets it
go, and it is kept for the backward alone, as inside of a model. Reports count it too.

Measuring leaves no trace: random number generators, buffers (BatchNorm statistics) and ``.grad``
are put back. The function is called twice, the first time so that compiled code is compiled and
lazy modules are built; its other side effects happen twice.

A compiled function runs *eagerly* under a user's ``TorchDispatchMode``; then the figures are the
eager ones.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from dropit_fx.holders import (
    Box,
    alive,
    grad_fn_of,
    kept_by,
    next_sequence_number,
    nodes_behind,
    plain_parts,
    reused_memory,
    stays_with_caller,
    storages_alive,
    tensors_in,
)
from dropit_fx.private import (
    FakeTensor,
    buffers,
    dynamo_skips,
    memory_events,
    pytree,
    storage_id,
    unsafe_preserve_version_counter,
)
from dropit_fx.private_hooks import held_by_region, region_class

__all__ = ["SavedTensor", "peak_memory", "saved_bytes", "saved_tensors"]


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """One storage that autograd keeps from forward to backward.

    Attributes:
        shape: Of the first tensor that was saved in this storage; a view of it may have been saved
            as well.
        dtype: Of the same tensor.
        nbytes: The size of the whole storage.
        saved_by: The autograd nodes that keep it, each with the name under which it does
            (``"AddmmBackward0.mat1"``); only the node for Python functions and compiled graphs.
            Empty for C++ extensions.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    saved_by: tuple[str, ...]


def saved_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Counts the bytes that autograd keeps for the backward of ``fn(*args, **kwargs)``.

    Args:
        fn: A module, a compiled module or function, a closure. It is called with gradients enabled,
            and its result is what would be differentiated; it may be any structure of tensors.
        *args: Passed on to `fn`.
        **kwargs: Passed on to `fn`.

    Returns:
        Bytes, 0 where nothing requires a gradient. Counted by storage. Not counted: whatever
        existed before the call, but for arguments that ops have made; parameters, what is freed
        before `fn` returns, and what autograd does not know of: a mask that the function of a
        checkpointed region closes over.

    Raises:
        TypeError: `fn` cannot be called.
    """
    _check_callable(fn, "saved_bytes")
    return sum(saved.nbytes for saved in saved_tensors(fn, *args, **kwargs))


def saved_tensors(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[SavedTensor]:
    """Lists what :func:`saved_bytes` counts, one entry per storage, in the order of saving.

    Args:
        fn: As in :func:`saved_bytes`.
        *args: Passed on to `fn`.
        **kwargs: Passed on to `fn`.

    Raises:
        TypeError: `fn` cannot be called.
    """
    _check_callable(fn, "saved_tensors")
    held: list[weakref.ref[Box]] = []

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor.detach())
        held.append(weakref.ref(box))
        return box

    dynamo_skips(pack)  # it runs in the middle of models that are compiled in pieces
    with leaving_no_trace():
        # Not under the hooks: they would be there while Dynamo traces.
        fn(*args, **kwargs)
        before = storages_alive()
        for tensor in tensors_in((args, kwargs)):
            if not stays_with_caller(tensor):
                before.pop(storage_id(tensor), None)
        start = next_sequence_number()
        with saved_tensors_hooks(pack, lambda box: box.tensor):
            result = fn(*args, **kwargs)

    # A box that is gone was freed with its graph, before `fn` returned.
    boxes = [box for box in (ref() for ref in held) if box is not None]
    return _held(nodes_behind(result, start), before, [box.tensor for box in boxes])


class Watch:
    """What autograd holds of one batch, told when its loss is there: nothing runs a second time.

    Made before the batch is computed: what existed then is not counted, but for memory of the host
    that packed bytes are offloaded to, step after step. No hook is in force meanwhile: a compiler
    would trace it, and ``torch.func`` refuses it. What C++ extensions hold is not seen; the inputs
    of checkpointed regions are.
    """

    def __init__(self) -> None:
        self._before = storages_alive()
        for memory in (memory for told in reused_memory for memory in told()):
            self._before.pop(storage_id(memory), None)
        self._regions = alive(region_class())

    def saved_bytes(self, loss: Any) -> int:
        """Bytes that the autograd graph behind `loss` holds, counted by storage."""
        known = set(map(id, self._regions))
        regions = [one for one in alive(region_class()) if id(one) not in known]
        inputs = tensors_in([list(held_by_region(one)) for one in regions])
        return sum(saved.nbytes for saved in _held(nodes_behind(loss, 0), self._before, inputs))


def _held(
    nodes: list[Node], before: Mapping[int, object], seen: Sequence[Tensor] = ()
) -> list[SavedTensor]:
    """What autograd nodes hold, by storage: not parameters, nor what existed `before`.

    `seen` is what hooks have seen them hold, in the order of saving.
    """
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    parameters = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]  # FSDP makes them anew
    excluded = {storage_id(part) for p in parameters for part in plain_parts(p)} | before.keys()
    found: dict[int, Tensor] = {}  # by storage
    readers: dict[int, dict[str, None]] = {}
    for tensor in (part for one in seen for part in plain_parts(one)):
        found.setdefault(storage_id(tensor), tensor)
    for node in nodes:
        for name, tensor in kept_by(node):
            for part in plain_parts(tensor):
                found.setdefault(storage_id(part), part)
                readers.setdefault(storage_id(part), {})[name] = None
    return [
        SavedTensor(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            nbytes=tensor.untyped_storage().nbytes(),
            saved_by=tuple(readers.get(key, ())),
        )
        for key, tensor in found.items()
        if key not in excluded
    ]


def peak_memory(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Measures the peak of the memory that a forward and its backward allocate.

    ``fn(*args, **kwargs)`` is called with gradients enabled, then its result is differentiated: its
    ``loss`` if it has one (as Hugging Face outputs do), otherwise the sum of all its floating-point
    tensors that require a gradient. Where there are none, only the forward is measured.

    Args:
        fn: A module, a compiled module or function, a closure. It must not call ``backward`` on
            what it returns.
        *args: Passed on to `fn`.
        **kwargs: Passed on to `fn`.

    Returns:
        Bytes above the level at the call. The parameters' gradients are part of it, as they are
        after ``zero_grad()``. On CUDA, the peak of PyTorch's allocator over all devices in use,
        whose peak statistics are reset. On CPU, the peak of PyTorch's allocations, as the profiler
        reports them: without the scratch memory that libraries such as oneDNN allocate for
        themselves.

    Raises:
        TypeError: `fn` cannot be called.
        ValueError: An argument has a history: the backward would run through it and free it.
        NotImplementedError: The tensors are neither on CPU nor on CUDA.
        RuntimeError: The profiler is already running, or the result cannot be differentiated.
    """
    _check_callable(fn, "peak_memory")
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (node := grad_fn_of(leaf)) is not None:
            raise ValueError(
                f"peak_memory runs the backward, and an argument of shape {tuple(leaf.shape)} is "
                f"itself the result of {node.name()}, whose graph the backward would free. "
                "Pass `x.detach().requires_grad_()` in its place."
            )

    with leaving_no_trace():
        start = next_sequence_number()
        devices = _devices((fn, args, kwargs)) | _run_step(fn, args, kwargs, start)
        if others := {d.type for d in devices} - {"cpu", "cuda", "meta"}:
            raise NotImplementedError(
                "peak_memory reads the allocators of CPU and CUDA; found tensors on "
                + ", ".join(sorted(others))
            )
        gc.collect()  # what the first run left in cycles would be freed somewhere in the second
        if cuda := [d for d in devices if d.type == "cuda"]:
            return _peak_on_cuda(cuda, lambda: _run_step(fn, args, kwargs, start))
        return _peak_on_cpu(lambda: _run_step(fn, args, kwargs, start))


# Running ------------------------------------------------------------------------------------------


def _check_callable(fn: object, caller: str) -> None:
    if not callable(fn):
        raise TypeError(
            f"{caller} measures a function while it runs, and got a {type(fn).__name__}. Pass the "
            f"function and its arguments: {caller}(model, x), or "
            f"{caller}(lambda: loss(model(x), y))."
        )


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Runs a block with gradients enabled; puts back random states and the modules' buffers."""
    with ExitStack() as stack:
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        held = [
            (module, name, buffer, buffer.detach().clone())
            for module in alive(nn.Module)
            for name, buffer in buffers(module).items()
            if buffer is not None
            and not buffer.is_meta
            and not buffer.is_inference()  # can only be written in inference mode
            and not isinstance(buffer, FakeTensor)
        ]
        # With the values, their versions: graphs that have saved a buffer stay valid.
        stack.enter_context(unsafe_preserve_version_counter(tuple(b for _, _, b, _ in held)))
        try:
            yield
        finally:
            for module, name, buffer, value in held:
                # Versions do not tell: batch_norm writes its statistics without counting them up.
                if not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
                buffers(module)[name] = buffer


def _run_step(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], start: int
) -> set[torch.device]:
    """Calls `fn`, differentiates its result, puts ``.grad`` back; gives the result's devices."""
    result = fn(*args, **kwargs)
    devices = _devices(result)
    loss = getattr(result, "loss", None)
    tensors = [
        t
        for t in ([loss] if isinstance(loss, Tensor) else pytree.tree_leaves(result))
        if isinstance(t, Tensor) and t.requires_grad
    ]
    if not tensors:
        return devices
    nodes = nodes_behind(tensors, start)
    leaves = [n.variable for n in nodes if hasattr(n, "variable")]
    leaves += [t for t in tensors if t.is_leaf]
    try:
        with without_gradients(leaves):
            torch.autograd.backward([_summed(t.real if t.is_complex() else t) for t in tensors])
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            error.add_note(
                "peak_memory differentiates what the function returns: it must return the loss, or "
                "its outputs, without having called backward on them."
            )
        raise
    return devices


def _summed(tensor: Tensor) -> Tensor:
    return tensor.sum() if tensor.dim() else tensor


@contextmanager
def without_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Some tensors have no gradient when a block begins, and those of before when it has ended."""
    held = [(tensor, tensor.grad) for tensor in tensors]
    for tensor, _ in held:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, grad in held:
            tensor.grad = grad


def _devices(tree: Any) -> set[torch.device]:
    found = set()
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, nn.Module):
            found |= {p.device for p in leaf.parameters()}
        elif isinstance(leaf, Tensor):
            found.add(leaf.device)
    return found


def _peak_on_cuda(devices: list[torch.device], step: Callable[[], object]) -> int:
    level = {}
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        level[device] = torch.cuda.memory_allocated(device)
    step()
    for device in devices:
        torch.cuda.synchronize(device)
    return sum(torch.cuda.max_memory_allocated(d) - level[d] for d in devices)


def _peak_on_cpu(step: Callable[[], object]) -> int:
    with cpu_profile() as profiler:
        step()
    level = peak = 0
    for _, nbytes in sorted(memory_events(profiler), key=lambda event: event[0]):
        level += nbytes
        peak = max(peak, level)
    return peak


@contextmanager
def cpu_profile() -> Iterator[profile]:
    """A profile of what a block runs and allocates on CPU, to be read when the block has ended."""
    # Kineto reads its log level when it is first used; at the default it reports each start and
    # stop.
    quiet = "KINETO_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
        ) as profiler:
            yield profiler
    finally:
        if quiet:
            del os.environ["KINETO_LOG_LEVEL"]
