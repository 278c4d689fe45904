"""Checks many random models, on several processes: ``make fuzz``, or ``python tests/fuzz.py``.

Prints a count for each way of packing, and the smallest program for each kind of failure. The exit
status is 1 where any program failed, in a run that was interrupted too. The same seed draws the
same programs; one that was drawn before in its task is not checked again, and not counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import io
import linecache
import logging
import multiprocessing
import os
import queue
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

CHUNK = 100  # programs of one task, drawn by Hypothesis in one go
DRAWS = 3  # as many at most for each of them: some are drawn again and again
TOLD = 100  # a line for so many programs, where there is no terminal for a progress bar
COUNTED = 4  # bytes are counted for one program in so many: that takes as long as the rest
LONGEST = {"inductor": 300}  # seconds of processor for one program; 60 for other ways
WAITING = 10  # times as long by the clock: what waits for ever ends, what is given little time not
SHRINKING = 90  # seconds for one failure
DEATHS = 20  # of workers: those that die after that are not replaced
CONFIGS = {
    "aot": ("formulas", "balanced"),
    "inductor": ("balanced",),
    "transform": ("formulas", "exact", "balanced"),
    "dropit_eager": ("exact", "balanced"),
}


@dataclass(frozen=True)
class Task:
    """Programs of one seed, and the ways in which each of them is checked."""

    ways: tuple[str, ...]
    seed: int
    graphs: int


@dataclass(frozen=True)
class Message:
    """What a worker tells: of a program (``counts``), of one to show (``text``), of an end."""

    kind: str  # "program", "failure", "rounded", "end"
    worker: int
    counts: tuple[tuple[str, str, str], ...] = ()  # way, outcome, why
    key: str = ""
    text: str = ""
    program: int = 0  # a number for its source


def main() -> int:
    """Runs the command line; the exit status."""
    options = _options()
    tasks = list(_tasks(options))
    run = Run(tasks, options.workers)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run.all()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("interrupted: this is what was found so far")
    run.tell(options)
    return 1 if run.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=10_000, help="transform and dropit_eager")
    parser.add_argument("--aot", type=int, default=300, help="compiled with aot_eager")
    parser.add_argument("--inductor", type=int, default=300, help="compiled with inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    for ways, graphs in (
        (("transform", "dropit_eager"), options.graphs),
        (("aot",), options.aot),
        (("inductor",), options.inductor),
    ):
        for at in range(0, graphs, CHUNK):
            seed = options.seed * 1_000_003 + at // CHUNK
            yield Task(ways, seed, min(CHUNK, graphs - at))


# The process that counts --------------------------------------------------------------------------


@dataclass
class Run:
    """All tasks, the workers that do them, and what they found."""

    tasks: list[Task]
    workers: int
    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)  # the shortest program of each kind
    programs: int = 0
    distinct: set[int] = field(default_factory=set)
    start: float = field(default_factory=time.time)

    @property
    def failed(self) -> bool:
        """Whether anything is wrong, be it shown as a small program yet or not."""
        return bool(self.failures) or any(o == "failed" for _, o in self.counts)

    def all(self) -> None:
        """Does every task; a worker that dies is replaced, up to a number of them."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, refresh_per_second=2) as progress:
            shown = progress.add_task("programs", total=sum(t.graphs for t in self.tasks))
            context = multiprocessing.get_context("spawn")
            todo = context.Queue()
            for task in self.tasks:
                todo.put(task)
            for _ in range(self.workers):
                todo.put(None)
            told = context.Queue()

            def started(number: int) -> Any:
                process = context.Process(target=work, args=(number, todo, told), daemon=True)
                process.start()
                return process

            alive, deaths = {n: started(n) for n in range(self.workers)}, 0
            while alive:
                try:
                    message = told.get(timeout=5)
                except queue.Empty:
                    for number, process in list(alive.items()):
                        if not process.is_alive() and process.exitcode != 0:
                            self.failures[f"died {number} {time.time():.0f}"] = (
                                f"a worker died with exit code {process.exitcode}, while it ran:\n"
                                + _last_program(number)
                            )
                            deaths += 1
                            if deaths <= DEATHS:
                                alive[number] = started(number)
                            else:
                                del alive[number]
                    continue
                if self.note(message):
                    progress.console.rule()
                    progress.console.print(
                        message.text, markup=False, highlight=False, soft_wrap=True
                    )
                if message.kind == "program":
                    progress.advance(shown)
                    if not progress.console.is_terminal and not self.programs % TOLD:
                        minutes = (time.time() - self.start) / 60
                        print(f"{self.programs} programs, {minutes:.0f} minutes", flush=True)
                    faults = (
                        f", [red]{len(self.failures)} kinds of failure" if self.failures else ""
                    )
                    progress.update(shown, description=f"programs{faults}")
                elif message.kind == "end":
                    alive.pop(message.worker, None)

    def note(self, message: Message) -> bool:
        """Whether it tells of a failure, of a new kind or with a smaller program."""
        new = False
        if message.kind == "program":
            self.programs += 1
            self.distinct.add(message.program)
        elif message.kind == "failure":
            kept = self.failures.get(message.key)
            new = kept is None or len(message.text) < len(kept)
            if new:
                self.failures[message.key] = message.text
        elif message.kind == "rounded":
            kept = self.rounded.get(message.key)
            if kept is None or len(message.text) < len(kept):
                self.rounded[message.key] = message.text
        for way, outcome, why in message.counts:
            self.counts[way, outcome] += 1
            if why:
                self.reasons[f"{way} {outcome}: {why}"] += 1
        return new

    def tell(self, options: argparse.Namespace) -> None:
        """The kinds of failure, the reasons of what was refused, and the counts."""
        from rich.console import Console
        from rich.table import Table

        console = Console(soft_wrap=True)
        console.rule()
        for key, program in self.rounded.items():
            console.print(f"rounded, {key}:\n{program}", markup=False, highlight=False)
        for key in self.failures:
            console.print(key, markup=False, highlight=False)
        others = [r for r in self.reasons.most_common() if " rounded: " not in r[0]]
        rounded = [r for r in self.reasons.most_common() if " rounded: " in r[0]]
        for reason, count in rounded + others[:20]:
            console.print(f"{count:6} {reason}", markup=False, highlight=False)
        ways = list(dict.fromkeys(way for way, _ in self.counts))
        table = Table("", *OUTCOMES, box=None)
        for way in ways:
            table.add_row(way, *(str(self.counts[way, outcome]) for outcome in OUTCOMES))
        console.print(table)
        minutes = (time.time() - self.start) / 60
        console.print(
            f"{self.programs} programs, {len(self.distinct)} of them distinct, seed {options.seed},"
            f" {minutes:.1f} minutes: {len(self.failures)} kinds of failure"
        )


# passed: in all configs; rounded: of these, a gradient differs in its last bits in one of them, or
# most of it is dropped; skipped: the dense model itself raises, or keeps what is overwritten
OUTCOMES = ("passed", "rounded", "failed", "refused", "skipped")


# A process that checks ----------------------------------------------------------------------------


def _note_file(number: int) -> str:
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"dropit_fx_fuzz_{os.getppid()}_{number}.py")


def _last_program(number: int) -> str:
    import tempfile

    name = f"dropit_fx_fuzz_{os.getpid()}_{number}.py"
    try:
        with open(os.path.join(tempfile.gettempdir(), name)) as file:
            return file.read()
    except OSError:
        return "(nothing yet)"


def work(number: int, todo: Any, told: Any) -> None:
    """Does tasks until there are no more."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    # PyTorch notes the stack in each fake mode and each seed, and looks at the file of each line;
    # at each op on fakes it asks for a GPU, whose driver is searched for
    linecache.checkcache = lambda filename=None: None
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    worker = Worker(number, told)
    while (task := todo.get()) is not None:
        worker.do(task)
    with contextlib.suppress(OSError):
        os.remove(_note_file(number))
    told.put(Message("end", number))


class Worker:
    """Draws and checks programs, and makes the first of each kind of failure small."""

    def __init__(self, number: int, told: Any) -> None:
        import torch
        import torch._dynamo
        import torch._inductor.config

        torch.set_num_threads(1)
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
        torch._inductor.config.compile_threads = 1
        self.number, self.told = number, told
        self.known: set[str] = set()
        self.checked = 0

    def do(self, task: Task) -> None:
        """One task, and then its failures of new kinds again, to make them small."""
        failures: list[tuple[str, Any]] = []  # the program's text, the fault
        seen: set[str] = set()

        def check(program: Any) -> None:
            if len(seen) == task.graphs:
                raise Enough
            if program.source in seen:
                return
            seen.add(program.source)
            number = zlib.crc32(program.source.encode())
            verdict = self.check(program, task.ways, CONFIGS, number % COUNTED == 0)
            counts = tuple(_counts(verdict, task.ways))
            self.told.put(Message("program", self.number, counts, program=number))
            for way, config, why in verdict.rounded:
                key = f"{way}, {config}: {why}"
                self.told.put(Message("rounded", self.number, key=key, text=repr(program)))
            for fault in verdict.faults:
                failures.append((program.source, fault))
                if fault.key not in self.known:  # as it is, should the run end before it is small
                    self.told.put(self.failure(task, repr(program), fault))

        _draw(task, check, shrink=False)
        for source, fault in failures:
            if fault.key not in self.known:
                self.known.add(fault.key)
                self.told.put(self.smallest(task, source, fault))

    def failure(self, task: Task, text: str, fault: Any) -> Message:
        """A program, with what is wrong with it as comments."""
        why = f"# {fault.way}, config '{fault.config}': {fault.kind}: {fault.detail}\n"
        why = why.replace("\n", "\n# ").rstrip("# ")
        seed = f"\n# seed {task.seed} of {' and '.join(task.ways)}\n"
        return Message("failure", self.number, key=fault.key, text=f"{why}\n{text}{seed}")

    def check(
        self, program: Any, ways: tuple[str, ...], configs: Any, count_bytes: bool = False
    ) -> Any:
        import fuzz_check

        self.checked += 1
        if self.checked % 25 == 10:  # what is there by now is not looked through for each program
            gc.collect()
            gc.freeze()
        with open(_note_file(self.number), "w") as file:
            file.write(repr(program))
        longest = max(LONGEST.get(way, 60) for way in ways)
        with _no_longer_than(longest), contextlib.redirect_stderr(io.StringIO()):
            return fuzz_check.check(program, ways, configs, count_bytes)

    def smallest(self, task: Task, source: str, fault: Any) -> Message:
        """The same programs are drawn again, up to the failing one, which Hypothesis shrinks."""
        end = time.time() + SHRINKING
        best: list[tuple[Any, Any]] = []

        def check(program: Any) -> None:
            if (not best and program.source != source) or time.time() > end:
                return
            configs = {fault.way: (fault.config,)}
            verdict = self.check(program, (fault.way,), configs, fault.kind == "bytes")
            for again in verdict.faults:
                if again.key == fault.key:
                    if not best or len(program.source) <= len(best[0][0].source):
                        best[:] = [(program, again)]
                    raise Failing

        with contextlib.suppress(BaseException):  # its own reports of what fails, and of flakiness
            _draw(task, check, shrink=True)
        program, again = best[0] if best else (source, fault)
        return self.failure(task, repr(program) if best else source, again)


class Enough(BaseException):
    """A task has its programs; no error, so Hypothesis lets it through."""


class Failing(Exception):
    """The program still fails."""


def _draw(task: Task, check: Callable[[Any], None], shrink: bool) -> None:
    import fuzz_programs
    from hypothesis import HealthCheck, Phase, given, seed, settings

    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]

    @seed(task.seed)
    @settings(
        max_examples=DRAWS * task.graphs,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(fuzz_programs.programs())
    def each(program: Any) -> None:
        check(program)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
        each()


def _counts(verdict: Any, ways: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """One for each way."""
    for way in ways:
        refused = [why for w, _, why in verdict.refused if w == way]
        if verdict.skipped:
            yield way, "skipped", verdict.skipped
        elif any(fault.way == way for fault in verdict.faults):
            kinds = sorted({f"{f.kind} ({f.config})" for f in verdict.faults if f.way == way})
            yield way, "failed", ", ".join(kinds)
        elif refused:
            yield way, "refused", refused[0]
        else:
            yield way, "passed", ""
            kinds = sorted({f"{why} ({config})" for w, config, why in verdict.rounded if w == way})
            if kinds:
                yield way, "rounded", ", ".join(kinds)


@contextlib.contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, WAITING * seconds),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    try:
        for timer, longest in timers.values():
            signal.setitimer(timer, longest)
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


if __name__ == "__main__":
    sys.exit(main())
