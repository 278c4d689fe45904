"""``dropit-fx bench kernels``: the time of packing and unpacking one tensor.

Beside ``clone()``, the least that any copy of the tensor costs, and beside the selection of the
published DropIT. All of them take turns, so that the machine's moods reach all alike. Then, as
``products`` says, the weight gradient that is made of kept rows.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from dropit_fx.bench.device import find_device, timed
from dropit_fx.bench.products import products_table, time_products
from dropit_fx.bench.published import scatter, select
from dropit_fx.kernels import AFFINE, FULL, UNIFORM, Format
from dropit_fx.report.rows import plain_table

FORMATS: dict[str, Format] = {
    "gamma 0.9": Format(1000, 1024),
    "gamma 0.5": Format(5000, 1024),
    "gamma 0.7, 2 bits": Format(3086, 1024, 2),
    "gamma 0.34, 3 bits": Format(6611, 1024, 3),
    "gamma 0.5, 4 bits": Format(5044, 1024, 4),
    "gamma 0, 4 bits": Format(FULL, 1024, 4),
    "gamma 0, 8 bits": Format(FULL, 1024, 8),
    "gamma 0, 4 bits, blocks of 256": Format(FULL, 256, 4),
    "affine, 4 bits": Format(FULL, 256, 4, AFFINE),
    "affine, 5 bits": Format(FULL, 256, 5, AFFINE),
    "affine, 6 bits": Format(FULL, 256, 6, AFFINE),
    "affine, 8 bits": Format(FULL, 256, 8, AFFINE),
    "uniform, 4 bits": Format(FULL, 256, 4, UNIFORM),
    "uniform, 8 bits": Format(FULL, 256, 8, UNIFORM),
    "gamma 0.9, whole tensor": Format(1000, 0),
}
STEPS = {"steps, 1 bit": 1, "steps, 2 bits": 2, "steps, 3 bits": 3, "steps, 4 bits": 4}


def bench_kernels(
    shape: Sequence[int] = (16, 197, 768),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    threads: int | None = None,
    rounds: int = 15,
    device: str = "cpu",
    json_path: str | None = None,
) -> dict[str, Any]:
    """Times the kernels on a normally distributed tensor and prints two tables.

    Args:
        shape: Of the tensor.
        dtypes: Names of torch dtypes.
        threads: For torch and the kernels alike; None: as torch is set.
        rounds: Timed calls of each, after two that are not.
        device: Where the tensor lies.
        json_path: Where to write the result.

    Returns:
        dtype -> name -> ``pack`` and ``unpack``: ``seconds`` (median), ``of_clone`` and
        ``of_published`` (medians of each round's ratio), and ``bits`` an element.

    Raises:
        SpecError: There is no such device.
    """
    place = find_device(device)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    result: dict[str, Any] = {}
    products: dict[str, Any] = {}
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(dtypes) * (rounds + 2))
            for name in dtypes:
                x = torch.randn(math.prod(shape), device=place).to(getattr(torch, name))
                jobs = _jobs(x)
                times: dict[str, list[float]] = {job: [] for job in jobs}
                for number in range(rounds + 2):
                    progress.update(task, description=name, advance=1)
                    for job, run in jobs.items():
                        elapsed = timed(run, x.device)
                        if number >= 2:
                            times[job].append(elapsed)
                result[name] = _summary(times, x)
                products[name] = time_products(x.view(-1, shape[-1]), shape[-1], rounds)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    title = f"{'x'.join(map(str, shape))}, {used} threads, {rounds} rounds"
    for name, rows in result.items():
        Console().print(_table(f"{name}, {title}", rows))
        Console().print(products_table(f"{name}, weight gradient", products[name]))
    if json_path is not None:
        about = {"shape": list(shape), "threads": used, "device": device}
        Path(json_path).write_text(
            json.dumps(about | {"dtypes": result, "products": products}, indent=2)
        )
    return result


def _jobs(x: Tensor) -> dict[str, Callable[[], object]]:
    """Name -> what is timed; "pack" and "unpack" stand before a format's name."""
    values, index = select(x, 0.9)
    jobs: dict[str, Callable[[], object]] = {
        "clone": x.clone,
        "pack published": partial(select, x, 0.9),
        "unpack published": partial(scatter, values, index, x.shape),
    }
    for name, form in FORMATS.items():
        pack = jobs[f"pack {name}"] = partial(torch.ops.dropit.sparsify, x, *form.numbers, False)
        given = *pack(), x.numel(), x.dtype, *form.numbers
        jobs[f"unpack {name}"] = partial(torch.ops.dropit.unsparsify, *given)
    for name, bits in STEPS.items():
        levels = [4 * code / 2**bits - 2 for code in range(2**bits)]
        codes = torch.ops.dropit.encode_steps(x, levels[1:], bits)
        jobs[f"pack {name}"] = partial(torch.ops.dropit.encode_steps, x, levels[1:], bits)
        jobs[f"unpack {name}"] = partial(
            torch.ops.dropit.decode_steps, codes, levels, bits, x.numel(), x.dtype
        )
    return jobs


def _summary(times: dict[str, list[float]], x: Tensor) -> dict[str, Any]:
    def ratio(job: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[job], times[base], strict=True))

    rows: dict[str, Any] = {"clone": {"seconds": statistics.median(times["clone"])}}
    for name in ("published", *FORMATS, *STEPS):
        bits = 0.1 * (x.element_size() * 8 + 32)
        if name in FORMATS:
            bits = FORMATS[name].nbytes(x.numel(), x.element_size()) * 8 / x.numel()
        elif name in STEPS:
            bits = STEPS[name]
        rows[name] = {"bits": bits}
        for way in ("pack", "unpack"):
            job = f"{way} {name}"
            rows[name][way] = {
                "seconds": statistics.median(times[job]),
                "of_clone": ratio(job, "clone"),
                "of_published": ratio(job, f"{way} published"),
            }
    return rows


def _table(title: str, rows: dict[str, Any]) -> Table:
    clone = rows["clone"]["seconds"] * 1e3
    caption = "clones: time of so many clone(); faster: than the published selection"
    about: dict[str, Any] = {"title": f"{title}; clone {clone:.2f} ms", "caption": caption}
    figures = ("bits", "pack ms", "clones", "faster", "unpack ms", "clones", "faster")
    table = plain_table("format", *figures, figures=figures, padding=(0, 1, 0, 0), **about)
    for name, row in rows.items():
        if name == "clone":
            continue
        cells = [f"{row['bits']:.2f}"]
        for way in ("pack", "unpack"):
            r = row[way]
            cells += [
                f"{r['seconds'] * 1e3:.2f}",
                f"{r['of_clone']:.2f}",
                f"{1 / r['of_published']:.1f}x" if name != "published" else "",
            ]
        table.add_row(name, *cells)
    return table
