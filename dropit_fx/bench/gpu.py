"""``dropit-fx bench gpu`` and ``make gpu``: what is worth knowing on a GPU, in nine minutes.

First the tests that need a GPU, then the figures, the most wanted first: models' training steps
dense, packed, recomputed and offloaded, and the kernels beside a copy. Before each row the clock is
asked whether there is time for it; after each row the file is written. A row that fails says why. A
second run measures what the first had no time for, and again what an older tree measured.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from dropit_fx.bench import gpu_rows
from dropit_fx.bench.device import find_device
from dropit_fx.bench.gpu_models import MODELS
from dropit_fx.bench.gpu_rows import Row
from dropit_fx.bench.gpu_tables import key, label, line_of_tests, said, tables
from dropit_fx.bench.gpu_worker import Worker, run_tests
from dropit_fx.config import ConfigError
from dropit_fx.words import did_you_mean, matches, unmatched

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path("examples/figures")
START_SECONDS = 20  # of a worker: Python, PyTorch, the libraries of models
NO_FIGURES = ("gpu.py", "gpu_tables.py", "gpu_worker.py", "plot.py", "page.py", "palette.py")
GRACE = 15  # seconds for writing and drawing at the end
# Guesses, until a row of the same model and mode has been measured.
GUESS = {"kernel": 2.0, "eager": 10.0, "compiled": 40.0, gpu_rows.GRAPHS: 40.0}
LARGE = {"llama": 2.0, "lora": 2.0, "vit_l": 1.5}  # times the guess

# What is measured ---------------------------------------------------------------------------------


def plan(models: Sequence[str] = (), variants: Sequence[str] = ()) -> list[Row]:
    """The rows to measure, the most wanted first.

    Args:
        models: Globs on names of ``gpu_models.MODELS``, or ``kernels``; empty: all.
        variants: Globs on ``eager dense``, ``compiled budget=0.5`` and so on, or only the variant;
            empty: all. The dense row of a mode that is asked for is there too.

    Raises:
        ConfigError: A glob that matches nothing.
    """
    every = [f"{mode} {v}" for mode, names in gpu_rows.MODES.items() for v in names]
    known = [*MODELS, "kernels"], [*every, *(name.partition(" ")[2] for name in every)]
    for globs, legal in zip((models, variants), known, strict=True):
        for glob in unmatched(globs, legal):
            raise ConfigError(f"nothing to measure matches {glob!r}.{did_you_mean(glob, legal)}")
    models, variants = models or ("*",), variants or ("*",)

    def wanted(row: Row) -> bool:
        if row["kind"] == "kernel":
            return matches("kernels", models)
        names = (f"{row['mode']} {row['variant']}", row["variant"])
        return matches(row["model"], models) and any(matches(n, variants) for n in names)

    def rows(models: Sequence[str], mode: str, *variants: str) -> Iterator[Row]:
        for model in models:
            for v in (v for v in variants if v != gpu_rows.NO_LOGITS or MODELS[model].language):
                yield {"kind": "model", "model": model, "mode": mode, "variant": v}

    first = ("deit_s", "resnet50", "gpt2")
    rest = tuple(name for name in MODELS if name not in first)
    budgets = tuple(v for v in gpu_rows.MODES["compiled"] if v.startswith("budget"))
    found = [
        *rows(first, "eager", "dense", "balanced", "no logits"),
        *rows(first, "compiled", "dense", "balanced", "fused", "no logits"),
        *({"kind": "kernel", "name": name} for name in gpu_rows.kernels()),
        *rows(first, gpu_rows.GRAPHS, "dense", "balanced", "fused", "no logits"),
        *rows(first, "eager", "checkpoint"),
        *rows(rest, "eager", "dense", "balanced", "no logits", "checkpoint"),
        *rows(first, "eager", "save_on_cpu", "max", "lossless", "dropit"),
        *rows(("deit_s", "gpt2"), "compiled", "checkpoint", *budgets),
        *rows(rest, "eager", "save_on_cpu", "max", "lossless", "dropit"),
        *rows(("llama",), "compiled", "dense", "balanced", "no logits"),
        *rows(tuple(MODELS), "compiled", *gpu_rows.MODES["compiled"]),
        *rows(tuple(MODELS), gpu_rows.GRAPHS, *gpu_rows.MODES[gpu_rows.GRAPHS]),
    ]
    unique = {key(row): row for row in reversed(found)}
    ordered = [unique.pop(key(row)) for row in found if key(row) in unique]
    chosen = [row for row in ordered if wanted(row)]
    modes = {(r["model"], r["mode"]) for r in chosen if r["kind"] == "model"}
    return [
        row
        for row in ordered
        if row in chosen
        or (row.get("variant") == gpu_rows.DENSE and (row["model"], row["mode"]) in modes)
    ]


# The run ------------------------------------------------------------------------------------------


def bench_gpu(
    out: str | None = None,
    minutes: float = 9,
    models: Sequence[str] = (),
    variants: Sequence[str] = (),
    device: str = "cuda",
    inner: str | None = None,
    rehearse: bool = False,
    copy_to: str | None = None,
    tests: str | None = None,
) -> Row:
    """Runs the tests and measures rows until the time is up; see the module.

    Args:
        out: The file; None: ``examples/figures/gpu_<card>.json``. What is in it stays, unless it is
            measured again.
        minutes: For everything; no row begins that is not expected to end by then, and one that
            does not is ended.
        models: See :func:`plan`.
        variants: See :func:`plan`.
        device: Where rows are measured.
        inner: What compiles; None: inductor, or in a rehearsal what is quicker to compile with.
        rehearse: Small models on the CPU: tests this script, measures nothing worth reading.
        copy_to: A folder that gets a copy of the file whenever it is written.
        tests: A folder of tests to run first, where pytest is installed.

    Returns:
        What the file holds: ``rows`` (see ``gpu_rows``), each with the ``sources`` that it was
        measured with; ``left_out``; ``tests``; and the machine.

    Raises:
        ConfigError: A glob that matches nothing.
        FileNotFoundError: A folder is missing.
        SpecError: There is no such device.
    """
    end = time.monotonic() + 60 * minutes
    device = "cpu" if rehearse else device
    find_device(device)
    inner = inner or ("aot_eager_decomp_partition" if rehearse else "inductor")
    jobs = plan(models, variants)
    about = machine(device) | {"inner": inner, "rehearsal": rehearse}
    slug = re.sub(r"[^a-z0-9]+", "_", about["card"].lower()).strip("_")  # nvidia_h100_80gb_hbm3
    path = Path(out) if out else FIGURES / f"gpu_{slug}.json"
    copies = [path, *([Path(copy_to) / path.name] if copy_to else [])]
    for place in copies:
        if not place.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder to write {place} into")
    result: Row = {"tests": None, "rows": []} | _before(path, about) | about
    console = Console(width=160, highlight=False)
    if tests:
        result["tests"] = run_tests(tests, rehearse, min(240, 0.4 * 60 * minutes))
        console.print(line_of_tests(result["tests"]))
        write(result, copies)
    jobs = _in_order(jobs, result["rows"], about["sources"])
    worker = Worker(device, inner, rehearse)
    left_out: list[str] = []
    took: dict[tuple[str, ...], float] = {}
    try:
        for number, job in enumerate(jobs):
            left = end - GRACE - time.monotonic()
            expected = _expected(job, took) + (START_SECONDS if worker.process is None else 0)
            if rehearse:
                expected = min(expected, 1)
            if expected > left:
                left_out.append(label(job))
                continue
            limit, start = max(1, min(left, 4 * expected + 60)), time.monotonic()
            row = job | worker.measure(job, limit)
            row.setdefault("seconds", time.monotonic() - start)
            if "failed" in row and row["seconds"] >= left:  # by the clock: no fault of its own
                left_out.append(label(job))
                continue
            row["sources"] = about["sources"]
            took[_like(job)] = max(row["seconds"], took.get(_like(job), 0) / 2)
            measured = {key(r): r for r in (*result["rows"], row)}  # in the place of an earlier one
            result["rows"] = list(measured.values())
            result["left_out"] = [*left_out, *map(label, jobs[number + 1 :])]
            write(result, copies)
            left = max(0, end - time.monotonic())
            console.print(f"{label(job)}: {said(row)}; {row['seconds']:.0f} s, {left:.0f} s left")
    finally:
        worker.end()
    result["left_out"] = left_out
    write(result, copies)
    _draw(result, copies)
    for table in tables(result):
        console.print(table)
    if left_out:
        console.print(f"no time for {len(left_out)} rows; run it again for: {'; '.join(left_out)}")
    console.print(f"written: {', '.join(map(str, copies))}")
    return result


def _before(path: Path, about: Row) -> Row:
    """What an earlier run on the same card wrote; nothing where it was another, or a rehearsal."""
    if not path.exists():
        return {}
    old: Row = json.loads(path.read_text())
    same = all(old.get(k) == about[k] for k in ("card", "rehearsal", "inner", "torch"))
    return {k: old[k] for k in ("rows", "tests") if k in old} if same else {}


def _in_order(jobs: Sequence[Row], rows: Sequence[Row], sources: str) -> list[Row]:
    """First what has no figures, then what failed, then what other sources measured."""
    done = {key(row): row for row in rows}

    def state(job: Row) -> int:
        row = done.get(key(job))
        if row is None:
            return 0
        if "failed" in row:
            return 1
        return 2 if row["sources"] != sources else 3

    return [job for job in sorted(jobs, key=state) if state(job) < 3]


def _like(job: Row) -> tuple[str, ...]:
    return key(job)[:1] if job["kind"] == "kernel" else key(job)[:3]


def _expected(job: Row, took: dict[tuple[str, ...], float]) -> float:
    """Seconds that a row is expected to take: as the last one like it did, or a guess."""
    mode = job.get("mode", "kernel")
    return took.get(_like(job), GUESS[mode] * LARGE.get(job.get("model", ""), 1.0)) * 1.1


def write(result: Row, paths: Sequence[Path]) -> None:
    """Writes JSON so that whoever looks finds a whole file, the old or the new."""
    for path in paths:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(path)


def begun(path: Path | None, about: Row, nothing: Row) -> Row:
    """What a run that was cut has written, if it was about the same; else ``nothing`` yet."""
    found = json.loads(path.read_text()) if path is not None and path.exists() else {}
    same = all(found.get(k) == v for k, v in about.items())
    return found if same else about | nothing


def _draw(result: Row, paths: Sequence[Path]) -> None:
    """A picture beside each file, where matplotlib is installed and there is something to draw."""
    from dropit_fx.bench import plot

    for path in paths:
        try:
            plot.gpu_picture(result, path.with_suffix(".png"))
        except (ModuleNotFoundError, ValueError) as error:
            print(f"no picture: {error}")
            return


# The machine --------------------------------------------------------------------------------------


def machine(device: str) -> Row:
    """What the figures depend on."""
    place = torch.device(device)
    cuda = place.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(place) if cuda else platform.machine(),
        "device": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("triton", "timm", "transformers")},
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "sources": sources(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def sources() -> str:
    """A digest of the package's own sources: two runs with the same ones measured the same."""
    digest = hashlib.sha256()
    for path in sorted(p for p in ROOT.rglob("*") if p.suffix in (".py", ".c", ".yaml")):
        if path.name not in NO_FIGURES:  # they measure nothing
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
