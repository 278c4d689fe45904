"""What each op takes for itself while it runs, above what it is given: measured in one real step.

A convolution copies its weight into another layout, an attention makes room for its sums: that is
there before the op returns, and fake tensors do not tell of it. In one step, each op is recorded
beside what PyTorch's CPU allocator gives out meanwhile. Ops are known again by their name and the
shapes and dtypes of their tensors. Scratch memory that libraries allocate by themselves is not seen
here, nor in ``measure.peak_memory``.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, get_num_threads, nn
from torch.profiler import record_function

from dropit_fx.holders import tensors_in
from dropit_fx.measure import cpu_profile
from dropit_fx.planner.step import Step
from dropit_fx.private import (
    OpOverload,
    TorchDispatchMode,
    memory_events,
    pytree,
    schema,
    spans,
)

Spec = tuple[Any, ...]  # of a call: the op, and its tensors' shapes and dtypes
Workspaces = Mapping[Spec, int]  # bytes at most above what there is when the op begins

_PREFIX = "dropit_fx op "
_NUMBERS = {float: 8, int: 8, bool: 1, complex: 16}  # bytes of a tensor of one


def spec_of_call(func: Any, args: Any, kwargs: Any) -> Spec:
    """What two calls have in common that take the same room."""
    leaves = pytree.tree_leaves((args, kwargs or {}))
    return (str(func), *((tuple(t.shape), t.dtype) for t in leaves if isinstance(t, Tensor)))


def wrapped_bytes(func: Any, args: Any) -> int:
    """Bytes of the tensors that PyTorch makes of numbers where an op takes tensors."""
    if not isinstance(func, OpOverload) or not any(type(a) in _NUMBERS for a in args):
        return 0
    pairs = zip(args, schema(func).arguments, strict=False)
    return sum(_NUMBERS.get(type(a), 0) for a, takes in pairs if str(takes.type) == "Tensor")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every op under a number."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Spec, int]] = []  # and what its numbers take a second time here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((spec_of_call(func, args, kwargs), wrapped_bytes(func, args)))
        with record_function(f"{_PREFIX}{len(self.calls) - 1}"):
            return func(*args, **(kwargs or {}))


def measured_with(step: Step, module: nn.Module) -> str:
    """With how many threads workspaces are measured; attention takes room for each.

    Returns:
        As people read it; ``""`` where nothing is measured: on other devices than CPU.
    """
    tensors = tensors_in((step.args, step.kwargs, list(module.parameters())))
    if any(t.device.type != "cpu" for t in tensors):
        return ""
    count = get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def measure_workspaces(step: Step, module: nn.Module) -> dict[Spec, int]:
    """What the ops of a step of ``module``, in the place of its model, take for themselves.

    On other devices than CPU nothing is measured.

    Raises:
        RuntimeError: The profiler is already running.
    """
    if not measured_with(step, module):
        return {}
    with step.real() as (args, kwargs), cpu_profile() as profiler, _Recorder() as recorder:
        step.loss_of(module(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]
    events = sorted(memory_events(profiler), key=lambda event: event[0])
    times = [time for time, _ in events]
    levels = [0, *itertools.accumulate(nbytes for _, nbytes in events)]
    found: dict[Spec, int] = {}
    for name, start, end in spans(profiler, _PREFIX):
        first, last = bisect.bisect_left(times, start), bisect.bisect_right(times, end)
        call, again = recorder.calls[int(name.removeprefix(_PREFIX))]
        most = max(levels[first : last + 1]) - levels[first] - again
        if most > found.get(call, 0):
            found[call] = most
    return found
