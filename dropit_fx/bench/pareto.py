"""``dropit-fx bench pareto``: memory against time of a compiled step, dense, recomputed and packed.

The rivals lose nothing: the dense step, ``torch.utils.checkpoint`` for each block, and PyTorch's
``activation_memory_budget``. Ours are the presets, also checkpointed and under budgets. The verdict
names every pair in which a rival takes less memory *and* less time than one of ours.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import fx, nn

from dropit_fx.bench.plot import label_points
from dropit_fx.bench.step import Rows, Runs, Task, table, take_turns
from dropit_fx.compile import backend
from dropit_fx.config import ConfigError, presets
from dropit_fx.private import lookup_backend
from dropit_fx.private_inductor import at_memory_budget, recompiling
from dropit_fx.report.palette import SERIES
from dropit_fx.report.plot import INK, MIB, figure_class, finish
from dropit_fx.words import did_you_mean, matches, unmatched

BUDGETS = (0.5, 0.3, 0.1)
MEMORY = ("saved", "peak")
CHECKPOINTING = ("set_grad_checkpointing", "gradient_checkpointing_enable")  # timm, transformers


@dataclass
class Variant:
    """One way to take the step.

    Attributes:
        name: As in tables and for ``--variants``.
        preset: Of ours; None: a rival.
        budget: ``activation_memory_budget`` while it is compiled.
        checkpoint: Whether the model recomputes each of its blocks.
        drop_logits: As a config has it.
        fuse: As an option of the plug-in's has it.
        graphs: How many graphs were compiled for it.
    """

    name: str
    preset: str | None = None
    budget: float = 1
    checkpoint: bool = False
    drop_logits: bool = False
    fuse: bool = False
    graphs: int = field(default=0, compare=False)

    def options(self, inner: str) -> dict[str, Any]:
        """What the plug-in is given, where it is one of ours."""
        config = {"preset": self.preset, "drop_logits": self.drop_logits}
        return {"config": config, "inner": inner, "fuse": self.fuse}

    def compiled(self, model: nn.Module, inner: str) -> Callable[..., Any]:
        """``model`` compiled this way: nothing is shared with what was compiled another way."""

        def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self.graphs += 1
            with at_memory_budget(self.budget):
                if self.preset is None:
                    return lookup_backend(inner)(gm, inputs)
                return backend.dropit(gm, inputs, options=self.options(inner))

        compiled: Callable[..., Any] = torch.compile(model, backend=compile_graph)
        return compiled


def variants() -> tuple[Variant, ...]:
    """Every variant, the dense step first."""
    return (
        Variant("dense"),
        Variant("checkpoint", checkpoint=True),
        *(Variant(f"budget={b}", budget=b) for b in BUDGETS),
        *(Variant(preset, preset) for preset in presets()),
        Variant("balanced+checkpoint", "balanced", checkpoint=True),
        *(Variant(f"balanced+budget={b}", "balanced", b) for b in BUDGETS),
    )


def bench_pareto(
    model: str = "timm:deit_tiny_patch16_224",
    batch: int = 16,
    size: int | None = None,
    only: Sequence[str] = (),
    inner: str = "inductor",
    rounds: int = 7,
    device: str = "cpu",
    json_path: str | None = None,
    plot_path: str | None = None,
) -> dict[str, Any]:
    """Measures the variants of one model's training step, prints and draws them.

    Args:
        model: A spec as for ``dropit-fx report``.
        batch: Batch size.
        size: Height and width of images; None: the model's own.
        only: Globs on the names of variants; empty: all. The dense one is always there.
        inner: The backend that compiles all of them: ``inductor``, or one built on AOTAutograd.
        rounds: Steps of each variant that are counted.
        device: Where they run.
        json_path: Where to write the result.
        plot_path: Where to draw it; the suffix says the format.

    Returns:
        ``variants``: name -> what :func:`~dropit_fx.bench.step.bench_step` tells, with ``ours`` and
        ``lossless``; ``skipped``: name -> reason; ``beaten``: see :func:`beaten`; the settings.

    Raises:
        ConfigError: A glob that matches no variant.
        FileNotFoundError: The folder of a path is missing.
        ModuleNotFoundError: matplotlib is missing.
        RuntimeError: A variant ran without having been compiled.
        SpecError: There is no such model or device.
    """
    chosen = choose(only)
    for path in filter(None, (json_path, plot_path)):  # not after minutes of compiling
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder to write {path} into")
    if plot_path is not None:
        figure_class()
    task = Task.of_spec(model, batch, size, device)
    runs: Runs = {}
    skipped: dict[str, str] = {}
    for variant in chosen:
        module = copy.deepcopy(task.model)
        reason = checkpoint_blocks(module) if variant.checkpoint else ""
        if reason:
            skipped[variant.name] = reason
            continue
        runs[variant.name] = module, variant.compiled(module, inner)
    # all of them compile the same code: without this, the ninth would run as it is
    with recompiling(8 * len(runs), 256 * len(runs)):
        rows = take_turns(task, runs, rounds, lambda _: "dense")
    for variant in chosen:
        if variant.name in rows:
            if not variant.graphs:
                raise RuntimeError(f"the variant {variant.name!r} ran without being compiled")
            rows[variant.name]["ours"] = variant.preset is not None
            rows[variant.name]["lossless"] = variant.preset in (None, "lossless")
    result: dict[str, Any] = {
        "model": model,
        "batch": batch,
        "size": size,
        "inner": inner,
        "rounds": rounds,
        "device": device,
        "threads": torch.get_num_threads(),
        "variants": rows,
        "skipped": skipped,
        "beaten": beaten(rows),
    }
    console = Console()
    console.print(table(f"{task.title}, {inner}", rows))
    for line in (*left_out(result), *verdict(result)):
        console.print(line, highlight=False, soft_wrap=True)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2))
    if plot_path is not None:
        draw(result, plot_path)
    return result


def choose(only: Sequence[str], every: Sequence[Variant] | None = None) -> tuple[Variant, ...]:
    """Of ``every`` (None: of :func:`variants`), those that some glob matches, and the dense one.

    All for no globs.
    """
    every = variants() if every is None else every
    names = [v.name for v in every]
    for glob in unmatched(only, names):
        raise ConfigError(f"no variant matches {glob!r}.{did_you_mean(glob, names)}")
    wanted = ("dense", *only) if only else ("*",)
    return tuple(v for v in every if matches(v.name, wanted))


def checkpoint_blocks(model: nn.Module) -> str:
    """Has ``model`` recompute each of its blocks, or says why it cannot."""
    for name in CHECKPOINTING:
        switch_on = getattr(model, name, None)
        if callable(switch_on):
            try:
                switch_on()
            except (AssertionError, NotImplementedError, ValueError) as error:
                return f"{name}: {error}"
            return ""
    return f"{type(model).__name__} has neither {' nor '.join(CHECKPOINTING)}"


def beaten(rows: Rows) -> list[dict[str, str]]:
    """Where a rival that loses nothing takes less memory and less time than one of ours.

    Args:
        rows: Name -> ``saved_bytes``, ``peak_bytes``, ``ratio`` (time, of dense), ``ours``.

    Returns:
        For each such pair ``memory`` (``"saved"`` or ``"peak"``), ``rival`` and ``ours``.
    """
    return [
        {"memory": memory, "rival": rival, "ours": mine}
        for memory in MEMORY
        for mine, ours in rows.items()
        for rival, theirs in rows.items()
        if ours["ours"]
        and not theirs["ours"]
        and theirs[f"{memory}_bytes"] < ours[f"{memory}_bytes"]
        and theirs["ratio"] < ours["ratio"]
    ]


def left_out(result: dict[str, Any]) -> list[str]:
    """The variants of ``result["skipped"]`` in words, a line for each."""
    return [f"{name} is left out: {reason}" for name, reason in result["skipped"].items()]


def verdict(result: dict[str, Any]) -> list[str]:
    """The pairs of ``result["beaten"]`` in words, a line for each; or that there are none."""
    lines = []
    for memory in MEMORY:
        pairs = [p for p in result["beaten"] if p["memory"] == memory]
        if not pairs:
            lines.append(f"{memory}: no lossless rival takes less, in less time, than one of ours")
        for pair in pairs:
            rival, ours = (_figures(result, pair[side], memory) for side in ("rival", "ours"))
            lines.append(f"{memory}: {rival} beats {ours}")
    return lines


def _figures(result: dict[str, Any], name: str, memory: str) -> str:
    row = result["variants"][name]
    return f"{name} ({row[f'{memory}_bytes'] / MIB:.1f} MiB, {row['ratio']:.2f}x)"


def draw(result: dict[str, Any], path: str | PathLike[str]) -> None:
    """Two panels, saved bytes and peak memory over time; down and left is better.

    Args:
        result: What :func:`bench_pareto` returns.
        path: Its suffix says the format.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    kinds = (
        ("loses nothing: dense, recomputed", INK, "s", {"ours": False}),
        ("loses nothing: packed", SERIES[1], "s", {"ours": True, "lossless": True}),
        ("approximate gradients: packed", SERIES[0], "o", {"lossless": False}),
    )
    rows = result["variants"]
    figure = figure_class()(figsize=(15, 6.5), layout="constrained")
    for axes, memory in zip(figure.subplots(1, 2), MEMORY, strict=True):
        places = {name: (r["ratio"], r[f"{memory}_bytes"] / MIB) for name, r in rows.items()}
        for label, colour, marker, kind in kinds:
            mine = [places[n] for n, r in rows.items() if kind.items() <= r.items()]
            if mine:
                axes.scatter(*zip(*mine, strict=True), c=colour, marker=marker, s=46, label=label)
        unit = {"saved": "saved for the backward", "peak": "peak of forward and backward"}
        finish(axes, f"{unit[memory]}, MiB", "")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda mib, _: f"{mib:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("time of a step, of dense")
        axes.grid(color="#eceef0")
        axes.set_axisbelow(True)
        axes.margins(0.16)
        label_points(axes, places)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 1.02))
    figure.suptitle(
        f"{result['model']}, batch {result['batch']}, compiled by {result['inner']}", color=INK
    )
    figure.savefig(path, dpi=110)
