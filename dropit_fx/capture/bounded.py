"""A bound on what is spent in sympy: ``torch.export`` of some models does not come back from it.

With every dimension dynamic, the sizes of a model that pads and cuts images into windows grow into
expressions that sympy simplifies for minutes or hours. Only what is spent in sympy counts: a large
model may take long and be well.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 0.05  # s between two looks at the thread
_FRAMES = 40  # from the innermost on, among which the code for sizes is looked for


class TooLong(Exception):
    """The bound is reached."""


class _Stop(BaseException):
    """Raised from outside in the thread that is bounded: nothing on the way catches it."""


@contextmanager
def sympy_bounded(seconds: float) -> Iterator[None]:
    """Ends the block with :class:`TooLong` when it has spent so many seconds in sympy.

    Works in any thread. A second thread looks now and then at where the first one is, and counts
    the CPU time that it spends where sympy is; it interrupts it there only, so that no lock and no
    mode of PyTorch is left half set.
    """
    thread, done, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def watch() -> None:
        spent, before = 0.0, _cpu_time(thread)
        with os.fdopen(os.memfd_create("stack"), "w+b", buffering=0) as out:  # needs no folder
            while not done.wait(_EVERY):
                with lock:
                    now, files = _cpu_time(thread), _files(thread, out.fileno())
                    if not done.is_set() and _simplifies(files):
                        spent += now - before
                        if spent > seconds and "/sympy/" in files[0].replace("\\", "/"):
                            _raise_in(thread, _Stop)
                            spent = seconds - 1  # again, if something has caught it
                    before = now

    watcher = threading.Thread(target=watch, name="sympy_bounded", daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            with lock:
                done.set()
                _raise_in(thread, None)
    except _Stop:
        raise TooLong(f"stopped after {seconds:.0f} s of comparing sizes") from None
    finally:
        done.set()
        watcher.join()


def _files(thread: int, out: int) -> list[str]:
    """The files of what a thread runs, from the innermost frame on; ``out``: a file to write into.

    As Python dumps a crash. Frames of a thread that runs on are not safe to walk: they have ended
    the process.
    """
    os.lseek(out, 0, os.SEEK_SET)
    os.ftruncate(out, 0)
    faulthandler.dump_traceback(out)
    os.lseek(out, 0, os.SEEK_SET)
    dumped = os.read(out, 1 << 20).decode(errors="replace")
    _, _, own = dumped.partition(f"hread 0x{thread:016x} ")
    return re.findall(r'^  File "(.*)", line', own.partition("\n\n")[0], re.MULTILINE)[:_FRAMES]


def _simplifies(files: list[str]) -> bool:
    """Whether sizes are compared or simplified; or the stack is as deep as sympy alone goes."""
    inside = any(file.endswith("symbolic_shapes.py") for file in files)
    return inside or len(files) == _FRAMES


def _cpu_time(thread: int) -> float:
    """CPU seconds of a thread, so that a loaded machine gets as far as an idle one."""
    clock = getattr(time, "pthread_getcpuclockid", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock(thread))


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Has the interpreter raise in a thread; None takes back what has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
