"""What :mod:`conformance` and :mod:`zoo` have in common: many items, one after another.

They run in a process of their own, which is replaced where it dies or hangs. Each result is a line
of a JSON file as soon as it is there: a second run goes on where the first one ended. The module
that checks has ``begin()``, called once in each process, and ``check(item, thorough)``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OUTCOMES = ("passed", "refused", "failed", "stock")
# refused: by a clear error, before anything is touched; stock: PyTorch itself fails
SECONDS = 1800  # for one item, by the clock
RENEWED = 150  # items after which the process is another one: Dynamo keeps some of each


@dataclass
class Result:
    """What came of one item.

    Attributes:
        item: Its name.
        group: What it is counted with: an op, a family.
        outcome: One of ``OUTCOMES``.
        why: Where it did not pass.
        notes: What else is told of it, in sentences or figures.
    """

    item: str
    group: str
    outcome: str
    why: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


def quieten() -> None:
    """As the tests run: one thread, no network, no GPU, no warnings of others."""
    import linecache

    import torch

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    linecache.checkcache = lambda filename=None: None
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)


def _work(module: str, thorough: bool, told: Connection) -> None:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    run = importlib.import_module(module)
    run.begin()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        for done in itertools.count():
            if done in (1, 2) or done % 20 == 0:  # what is there is not looked through each time
                gc.collect()
                gc.freeze()
            told.send([asdict(result) for result in _checked(run.check, told.recv(), thorough)])


def _checked(check: Any, item: str, thorough: bool) -> list[Result]:
    try:
        return list(check(item, thorough))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(where.filename).name}:{where.lineno}"
        return [Result(item, item.split("/")[1], "failed", f"the check itself: {error!r} at {at}")]


class _Process:
    """The process that checks, and the pipe to it."""

    def __init__(self, module: str, thorough: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(module, thorough, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.done = 0

    def check(self, item: str, seconds: int) -> list[Result]:
        """The results of an item; one that says so where the process died, or took too long."""
        self.done += 1
        self.pipe.send(item)
        try:
            if self.pipe.poll(seconds):
                return [Result(**told) for told in self.pipe.recv()]
            why = f"took more than {seconds} seconds"
        except EOFError:
            self.process.join()
            why = f"the process died with exit code {self.process.exitcode}"
        self.end()
        return [Result(item, item.split("/")[1], "failed", why)]

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def run(module: str, items: Sequence[str], given: argparse.Namespace) -> list[Result]:
    """Checks what is not in the file yet; all results, in the order of ``items``.

    When its time is up, results are those that there are.
    """
    from tqdm import tqdm

    file, end = given.file, time.time() + 60 * given.minutes
    file.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, list[Result]] = {}
    if file.exists():
        for line in file.read_text().splitlines():
            told = json.loads(line)
            known[told["of"]] = [Result(**r) for r in told["results"]]
    process: _Process | None = None
    failed = sum(r.outcome == "failed" for results in known.values() for r in results)
    with file.open("a") as out, tqdm(items, smoothing=0.05) as bar:
        for item in bar:
            if item in known:
                continue
            if time.time() > end:
                break
            bar.set_description(f"{item[:40]}, {failed} failed")
            if process is None or process.done >= RENEWED or not process.process.is_alive():
                if process is not None:
                    process.end()
                process = _Process(module, not given.quick)
            known[item] = process.check(item, SECONDS)
            failed += sum(r.outcome == "failed" for r in known[item])
            print(
                json.dumps({"of": item, "results": [asdict(r) for r in known[item]]}),
                file=out,
                flush=True,
            )
    if process is not None:
        process.end()
    return [result for item in items for result in known.get(item, ())]


def options(doc: str | None, file: str) -> argparse.Namespace:
    """The command line that both have."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--only", default="", help="items that have this in their name")
    parser.add_argument("--file", type=Path, default=Path(file), help="where results are kept")
    parser.add_argument("--quick", action="store_true", help="one sample of each, in one position")
    parser.add_argument("--minutes", type=float, default=math.inf, help="when to stop, at most")
    parser.add_argument("--again", action="store_true", help="forget the results that are there")
    given = parser.parse_args()
    if given.again:
        given.file.unlink(missing_ok=True)
    return given


def counts(results: Iterable[Result]) -> Counter[str]:
    return Counter(result.outcome for result in results)


def table(parts: Mapping[str, Sequence[Result]], first: str) -> str:
    """Counts as a Markdown table: a line for each part, and one for all."""
    lines = [f"| {first} | {' | '.join(OUTCOMES)} |", "| --- |" + " --- |" * len(OUTCOMES)]
    everything = [result for results in parts.values() for result in results]
    for name, results in (*parts.items(), ("all", everything)):
        found = counts(results)
        lines.append(f"| {name} | {' | '.join(str(found[o]) for o in OUTCOMES)} |")
    return "\n".join(lines)


def reasons(results: Iterable[Result], outcome: str) -> list[str]:
    """A line for each reason: how often, of which groups."""
    found: dict[str, list[str]] = {}
    for result in results:
        if result.outcome == outcome:
            found.setdefault(result.why, []).append(result.group)
    lines = []
    for why, groups in sorted(found.items(), key=lambda pair: -len(pair[1])):
        names = list(dict.fromkeys(groups))
        shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        lines.append(f"{len(groups)} of {shown}: {why}")
    return lines


def tell(results: Sequence[Result], parts: Mapping[str, Sequence[Result]], first: str) -> int:
    """Prints the summary; the exit status."""
    print(table(parts, first))
    for outcome in OUTCOMES[1:]:
        lines = reasons(results, outcome)
        if lines:
            print(f"\n{outcome}:\n")
        for line in lines:
            print(f"- {line}")
    found = counts(results)
    runs = found.total() - found["stock"]
    print(f"\n{found['passed']} of {runs} that PyTorch runs pass: {found['passed'] / runs:.2%}")
    return 1 if found["failed"] else 0
