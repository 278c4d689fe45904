"""Where a bench runs: the device of a name, its clock, and what its allocator has given out."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dropit_fx.bench.model_spec import SpecError

PINNED = 24 * 2**30  # bytes of pinned memory with which a process is replaced


def find_device(name: str) -> torch.device:
    """The device of that name, with its index.

    Raises:
        SpecError: It is no device, or this machine has none of that kind or number.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"--device {name}: write cpu, cuda, or cuda:1 for the second") from error
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise SpecError(
            f"--device {name}: PyTorch {torch.__version__} sees no CUDA device on this machine;"
            " leave --device out to run on the CPU"
        )
    index = torch.cuda.current_device() if device == torch.device("cuda") else device.index
    if index >= count:
        raise SpecError(f"--device {name}: the devices here are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, with all that it leaves for the device to do."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result  # freeing is no part of it
    return elapsed


def busy_seconds(run: Callable[[], Any], device: torch.device, rounds: int = 2) -> float | None:
    """Seconds of a call in which a GPU works; of the rest it waits for the host. None elsewhere."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(rounds):
            run()
        synchronize(device)
    micros: float = sum(event.self_device_time_total for event in seen.key_averages())
    return micros / 1e6 / rounds


def seconds(run: Callable[[], Any], device: torch.device, warm: int, rounds: int) -> list[float]:
    """Seconds of each call after ``warm`` others: between events on CUDA, by the clock elsewhere.

    On CUDA the calls are put into the stream one after another, as in training: what the host needs
    to launch them counts where the device has to wait for it.
    """
    for _ in range(warm):
        run()
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(rounds):
            run()
            times.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(times)]
    event_class: Any = torch.cuda.Event
    events = [event_class(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def allocated(device: torch.device, reset: bool = False) -> int | None:
    """Bytes that the allocator has given out; ``reset``: its peak starts anew from here."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_of(device: torch.device) -> int | None:
    """The most bytes that the allocator had given out since its peak started anew."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def clean_up(device: torch.device) -> dict[str, Any]:
    """Frees what a row left on the device.

    Returns:
        ``left_bytes``, and ``broken``: why the process is to be replaced. After an illegal access
        every call fails; and pinned memory, which is cached in powers of two, is not given back.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return {}
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:  # after an illegal access every call fails
        return {"broken": str(error).splitlines()[0]}
    row: dict[str, Any] = {"left_bytes": torch.cuda.memory_allocated(device)}
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    return row | ({"broken": f"{pinned >> 30} GiB are pinned"} if pinned > PINNED else {})
