"""Processes of ``bench gpu`` that may die or hang without taking the rest along."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from dropit_fx.bench import gpu_rows
from dropit_fx.bench.device import clean_up, find_device
from dropit_fx.bench.gpu_rows import Row


def _work(pipe: Connection, device_name: str, inner: str, rehearse: bool) -> None:
    """Measures what comes through the pipe, until it is closed: in a process of its own."""
    warnings.filterwarnings("ignore", ".*force_disable_caches")
    os.setpgid(0, 0)  # with whatever inductor starts, to be ended together
    torch.compiler.config.force_disable_caches = True  # cold is cold
    device = find_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    references: dict[tuple[str, str], gpu_rows.Gradients] = {}
    while True:
        try:
            job: Row = pipe.recv()
        except EOFError:
            return
        start = time.monotonic()
        row = _measured(job, device, references, inner, rehearse)
        row |= clean_up(device)  # the frames of an error are gone by now
        pipe.send(row | {"seconds": time.monotonic() - start})


def _measured(job: Row, device: torch.device, references: Any, inner: str, rehearse: bool) -> Row:
    try:
        if job["kind"] == "kernel":
            return gpu_rows.kernel_row(job["name"], device, rehearse)
        where = job["model"], job["mode"], job["variant"]
        return gpu_rows.model_row(*where, device, references, inner, rehearse)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).partition('. ')[0]}"}
    except Exception as error:  # a row may fail in any way, and is one row
        frames = traceback.format_exc()[-2500:]
        return {"failed": f"{type(error).__name__}: {error}"[:600], "traceback": frames}


@dataclass
class Worker:
    """A process that measures rows; a new one takes its place when it dies or is ended.

    An illegal access on a GPU makes every later call of the same process fail, and a hang ends
    never: neither may take the rows behind it along.
    """

    device: str
    inner: str
    rehearse: bool
    process: Any = None
    pipe: Connection | None = field(default=None, repr=False)
    busy: bool = False

    def measure(self, job: Row, limit: float) -> Row:
        """The row, or why it ``failed``; after ``limit`` seconds the process is ended."""
        if self.process is None:
            self._start()
        assert self.pipe is not None
        try:
            self.busy = True
            self.pipe.send(job)
            if not self.pipe.poll(limit):
                self.end()
                return {"failed": f"ended after {limit:.0f} s"}
            row: Row = self.pipe.recv()
            self.busy = False
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.end()
            return {"failed": f"the process died, exit code {code}"}
        if "broken" in row:
            self.end()
        return row

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, self.device, self.inner, self.rehearse)
        )
        self.process.start()
        theirs.close()
        self.busy = False

    def end(self) -> None:
        """Ends the process and what it has started; an idle one has a moment to leave by itself."""
        if self.process is None or self.pipe is None:
            return
        self.pipe.close()
        self.process.join(0 if self.busy else 5)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # before it had a group, or after its end
            self.process.kill()
        self.process.join()
        self.process = self.pipe = None


# The tests ----------------------------------------------------------------------------------------


# Started in the background of a shell, a process ignores what ends its tests in time.
PYTEST = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_tests(folder: str, rehearse: bool, limit: float) -> Row:
    """Runs the tests of a folder with this interpreter; ends them after ``limit`` seconds.

    Returns:
        ``passed``, ``failed``, ``skipped``, ``seconds``, ``failures``: name -> first lines; and
        ``error`` where they could not be run, or not to their end.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"error": "pytest is not installed"}
    command = [sys.executable, "-c", PYTEST, "-q", "-p", "no:cacheprovider", folder, "--tb=short"]
    if importlib.util.find_spec("xdist") and not rehearse:
        processes = max(1, min(8, (os.cpu_count() or 1) // 2))
        command += ["--numprocesses", str(processes), "--dist", "worksteal"]
    environment = os.environ | ({"DROPIT_GPU_REHEARSAL": "1"} if rehearse else {})
    start, result = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command += ["--junitxml", str(report)]
        process = subprocess.Popen(command, env=environment, process_group=0)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            result["error"] = f"ended after {limit:.0f} s"
            _interrupt(process)
        try:
            result |= _from_report(report)
        except (OSError, ElementTree.ParseError):
            result.setdefault("error", f"pytest ended with exit code {process.returncode}")
    return result | {"seconds": time.monotonic() - start}


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, after which pytest still reports; or for good, with what it has started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _from_report(path: Path) -> Row:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = {}
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = next((p for p in case if p.tag in ("failure", "error")), None)
        if wrong is not None:
            failures[f"{case.get('classname')}::{case.get('name')}"] = (wrong.get("message") or "")[
                :400
            ]
        skipped = any(part.tag == "skipped" for part in case)
        counts["failed" if wrong is not None else "skipped" if skipped else "passed"] += 1
    return counts | {"failures": failures}
