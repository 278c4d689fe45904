"""``dropit-fx bench roofline``: what a compiled step costs on a GPU, told without one.

Inductor schedules forward and backward of each variant; a kernel takes as long as its arithmetic at
the card's peak, or as its bytes at the card's bandwidth, whichever is longer. What is predicted is
a step of kernels at their best, launched by a host that keeps up: a bound, of which the ratios of
variants are worth more than the times. The loss outside the model is no part of it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, fx, nn

from dropit_fx.bench.model_spec import SpecError, build, in_dtype
from dropit_fx.bench.pareto import Variant, checkpoint_blocks, choose
from dropit_fx.bench.schedule import Kernel, kernels_of_step
from dropit_fx.compile import backend
from dropit_fx.compile.saved import Partition, read_partition
from dropit_fx.config import make_config
from dropit_fx.planner.cards import GIGA, Card, find_card
from dropit_fx.private import (
    CustomPartitionerFn,
    compile_fx,
    min_cut_rematerialization_partition,
)
from dropit_fx.private_inductor import INNER_COMPILE, PARTITIONER, at_memory_budget
from dropit_fx.report.rows import plain_table

LAUNCH = 0.0  # seconds that a kernel takes beside its work: 0, the host is ahead of the card
COSTLIEST = 5
BUDGETS = (0.5, 0.2)
DENSE, CHECKPOINT, PACKED, FUSED = "dense", "checkpoint", "packed", "fused"
DTYPES = ("bfloat16", "float16", "float32", "autocast")
SCHEDULES = ("cuda", "cpu")
LEGEND = "f: forward, b: backward, o: optimizer; alike ones together"
PHASES = ("forward", "backward", "optimizer")
_SGD = (5, 3)  # of SGD with momentum, an op at a time: reads and writes of each trained element


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one variant's step takes.

    Attributes:
        variant: Its name.
        kernels: In the order of their launches, the forward's first.
        card: On which.
        launch: Seconds of each kernel beside its work.
        saved_bytes: Between forward and backward, as the step is cut; without inputs.
        packed_bytes: Of these, the bytes that are packed.
    """

    variant: str
    kernels: tuple[Kernel, ...]
    card: Card
    launch: float = LAUNCH
    saved_bytes: int = 0
    packed_bytes: int = 0

    @cached_property
    def seconds(self) -> float:
        """Of the step."""
        return sum(map(self.seconds_of, self.kernels))

    @property
    def nbytes(self) -> int:
        """That its kernels read and write."""
        return sum(k.nbytes for k in self.kernels)

    @property
    def flops(self) -> int:
        """Of its products, convolutions and attention."""
        return sum(k.flops for k in self.kernels)

    @property
    def movable_bytes(self) -> int:
        """What ``offload`` would move: what is packed; of a step without packing, all it saves."""
        return self.packed_bytes or self.saved_bytes

    @property
    def hidden(self) -> float:
        """Which share of these goes to the host while the forward computes, and back likewise.

        Both ways are behind one phase each, of which the shorter decides.
        """
        seconds = self.movable_bytes / self.card.host
        shortest = min(self.seconds_in(phase) for phase in PHASES[:2])
        return min(1.0, shortest / seconds) if seconds else 1.0

    @property
    def offloaded_seconds(self) -> float:
        """Of the step, if it waited for the rest of them in each phase."""
        seconds = self.movable_bytes / self.card.host
        late = (seconds - self.seconds_in(phase) for phase in PHASES[:2])
        return self.seconds + sum(max(0.0, s) for s in late)

    def seconds_in(self, phase: str) -> float:
        """Of the kernels of one of :data:`PHASES`."""
        return sum(self.seconds_of(k) for k in self.kernels if k.phase == phase)

    def seconds_of(self, kernel: Kernel) -> float:
        """Of one launch of a kernel."""
        return self.card.seconds(kernel.nbytes, kernel.flops, kernel.dtype) + self.launch

    def costliest(self, beside: Prediction | None = None) -> list[tuple[Kernel, int, float]]:
        """The kernels that cost most, alike ones as one.

        Args:
            beside: Whose kernels are left out, as often as it has them; None: none.

        Returns:
            At most :data:`COSTLIEST` kernels, how often each is launched, and seconds of these
            launches together.
        """
        counts = Counter(self.kernels)
        if beside is not None:
            counts -= Counter(beside.kernels)
        rows = [(k, n, n * self.seconds_of(k)) for k, n in counts.items()]
        return sorted(rows, key=lambda row: -row[2])[:COSTLIEST]

    def added(self, beside: Prediction) -> list[tuple[Kernel, int]]:
        """The kernels that are launched more often, or less often, than in another step.

        Args:
            beside: The other step's.

        Returns:
            Each with how often it is launched more, less than 0 where it is less; the forward's
            first. Their bytes, so often, are the difference of the steps' ``nbytes``.
        """
        counts = Counter(self.kernels)
        counts.subtract(beside.kernels)
        rows = [(k, n) for k, n in counts.items() if n]
        return sorted(rows, key=lambda row: PHASES.index(row[0].phase))


def variants() -> tuple[Variant, ...]:
    """Every variant, the dense step first; those that are packed name no preset yet."""
    return (
        Variant(DENSE),
        Variant(PACKED, PACKED),
        Variant(FUSED, PACKED, fuse=True),
        Variant(CHECKPOINT, checkpoint=True),
        *(Variant(f"budget={b}", budget=b) for b in BUDGETS),
    )


def predict(
    model: nn.Module,
    args: Sequence[Any],
    variant: Variant,
    card: Card,
    *,
    config: Any = None,
    schedule: str = SCHEDULES[0],
    launch: float = LAUNCH,
    autocast: torch.dtype | None = None,
    optimizer: bool = False,
) -> Prediction:
    """Predicts the step of one variant of a model, which stays as it is.

    Args:
        model: On the CPU, in training mode.
        args: Its positional inputs.
        variant: Of :func:`variants`.
        card: What it runs on.
        config: What packs it, as for ``transform``, where the variant packs.
        schedule: ``"cuda"``: the kernels of a GPU; ``"cpu"``: those that inductor makes for this
            machine, where Triton is not installed.
        launch: Seconds of each kernel beside its work.
        autocast: The dtype that the forward runs in under autocast; None: without.
        optimizer: Also count SGD with momentum, as PyTorch runs it: an op at a time.

    Returns:
        The kernels and what they take. For a record of each: ``Prediction.kernels``.

    Raises:
        ConfigError: Of ``config``.
        SpecError: The model cannot recompute its blocks.
        RuntimeError: Nothing was compiled.
    """
    # parameters are read by nobody; buffers are written into
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    reason = checkpoint_blocks(twin) if variant.checkpoint else ""
    if reason:
        raise SpecError(reason)

    partitions: list[Partition] = []

    def compile_graph(
        graph: fx.GraphModule, inputs: list[Any], lower: Callable[..., Any]
    ) -> Callable[..., Any]:
        with at_memory_budget(variant.budget):
            if variant.preset is None:
                inner: dict[str, Any] = {INNER_COMPILE: lower}
                inner["config_patches"] = {PARTITIONER: _Reading(partitions.append)}
                return compile_fx(graph, inputs, **inner)  # type: ignore[return-value]
            options = {"config": config, "fuse": variant.fuse}
            return backend.dropit(graph, inputs, options=options, lower=lower)

    torch.compiler.reset()
    before = len(backend.compiled_graphs())
    kernels = kernels_of_step(
        *(twin, args, compile_graph, schedule),
        capability=card.capability,
        processors=card.processors,
        autocast=autocast,
    )
    partitions += (g.partitions[-1] for g in backend.compiled_graphs()[before:] if g.partitions)
    backend.forget_compiled_graphs(before)
    if optimizer:
        kernels.append(_sgd([p for p in model.parameters() if p.requires_grad]))
    return Prediction(
        variant=variant.name,
        kernels=tuple(kernels),
        card=card,
        launch=launch,
        saved_bytes=sum(p.saved_bytes for p in partitions),
        packed_bytes=sum(p.packed_bytes for p in partitions),
    )


class _Reading(CustomPartitionerFn):
    """Inductor's own partitioner; what it saves is read."""

    def __init__(self, note: Callable[[Partition], object]) -> None:
        self._note = note

    def uuid(self) -> Any:
        """Nothing is cached."""
        return __name__

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        given = {"compiler": "inductor"} | kwargs
        graphs = min_cut_rematerialization_partition(gm, joint_inputs, **given)
        self._note(read_partition(*graphs, kwargs["num_fwd_outputs"]))
        return graphs


def _sgd(trained: Iterable[Tensor]) -> Kernel:
    size = sum(p.nbytes for p in trained)
    reads, writes = _SGD
    return Kernel(
        phase="optimizer",
        name="SGD with momentum",
        extern=True,
        read_bytes=reads * size,
        write_bytes=writes * size,
    )


def bench_roofline(
    model: str,
    batch: int = 16,
    size: int | None = None,
    device: str = "h100",
    only: Sequence[str] = (),
    preset: str | None = None,
    gamma: float | None = None,
    bits: int | None = None,
    dtype: str = DTYPES[0],
    schedule: str | None = None,
    launch: float = LAUNCH * 1e6,
    optimizer: bool = False,
    added: bool = False,
    json_path: str | None = None,
) -> dict[str, Prediction]:
    """Predicts the steps of one model's variants, and prints them.

    Args:
        model: A spec as for ``dropit-fx report``.
        batch: Batch size.
        size: Height and width of images; None: the model's own.
        device: As for :func:`~dropit_fx.planner.cards.find_card`.
        only: Globs on the names of :func:`variants`; empty: all. The dense one is always there.
        preset: What packs it; None: the default.
        gamma: As for ``transform``.
        bits: As for ``transform``.
        dtype: Of parameters and inputs; ``"autocast"``: float32 under autocast to bfloat16.
        schedule: As for :func:`predict`; None: ``"cuda"`` where Triton is installed.
        launch: Microseconds of each kernel beside its work.
        optimizer: As for :func:`predict`.
        added: Also print all kernels by which a step differs from the dense one.
        json_path: Where to write the result.

    Returns:
        Name of the variant -> what is predicted of it.

    Raises:
        ConfigError: A glob that matches no variant, or settings that mean nothing.
        FileNotFoundError: The folder of a path is missing.
        PlanError: There is no such card.
        SpecError: There is no such model.
    """
    card = find_card(device)
    chosen = choose(only, variants())
    config = make_config(None, preset=preset, gamma=gamma, bits=bits)
    schedule = schedule or SCHEDULES[importlib.util.find_spec("triton") is None]
    if json_path is not None and not Path(json_path).absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder to write {json_path} into")
    torch.manual_seed(0)
    module, args = build(model, batch, size)
    settings: dict[str, Any] = {"config": config, "schedule": schedule, "launch": launch / 1e6}
    settings |= {"autocast": torch.bfloat16 if dtype == "autocast" else None}
    if dtype != "autocast":
        args = in_dtype(module, args, getattr(torch, dtype))
    found: dict[str, Prediction] = {}
    skipped: dict[str, str] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(chosen))
        for variant in chosen:
            progress.update(bar, description=f"scheduling: {variant.name}")
            try:
                found[variant.name] = predict(
                    module, args, variant, card, optimizer=optimizer, **settings
                )
            except SpecError as error:
                skipped[variant.name] = str(error)
            progress.advance(bar)
    console = Console()
    title = f"{model}, batch {batch}, {dtype}, {card.name}"
    console.print(table(title, found, schedule))
    console.print(transfers(found))
    for prediction in found.values():
        console.print(costs(prediction, found[DENSE]))
        if added and prediction is not found[DENSE]:
            console.print(changes(prediction, found[DENSE]))
    for name, reason in skipped.items():
        console.print(f"{name} is left out: {reason}", highlight=False)
    if json_path is not None:
        about = {"model": model, "batch": batch, "size": size, "dtype": dtype, "device": device}
        about |= {"schedule": schedule, "preset": config.preset, "gamma": gamma, "bits": bits}
        rows = {name: as_row(one, found[DENSE]) for name, one in found.items()}
        text = json.dumps(about | {"variants": rows, "skipped": skipped}, indent=2)
        Path(json_path).write_text(text)
    return found


def as_row(one: Prediction, dense: Prediction) -> dict[str, Any]:
    """A prediction for JSON: its totals, ratios to the dense step, and a record of each kernel."""
    return {
        "seconds": one.seconds,
        "ratio": one.seconds / dense.seconds,
        "bytes": one.nbytes,
        "bytes_ratio": one.nbytes / dense.nbytes,
        "flops": one.flops,
        "saved_bytes": one.saved_bytes,
        "movable_bytes": one.movable_bytes,
        "hidden": one.hidden,
        "offloaded_seconds": one.offloaded_seconds,
        "kernels": [
            asdict(k) | {"dtype": str(k.dtype or ""), "seconds": one.seconds_of(k)}
            for k in one.kernels
        ],
    }


def table(title: str, found: dict[str, Prediction], schedule: str) -> Table:
    """The variants for people."""
    figures = ("step", "of dense", "GB", "of dense", "TFLOP", "kernels")
    where = {"cuda": "a GPU", "cpu": "the CPU"}[schedule]
    text = plain_table("variant", *figures, figures=figures, title=title, padding=(0, 1, 0, 0))
    dense = found[DENSE]
    for name, one in found.items():
        text.add_row(
            name,
            f"{one.seconds * 1e3:.3f} ms",
            f"{one.seconds / dense.seconds:.3f}x",
            f"{one.nbytes / 1e9:.3f}",
            f"{one.nbytes / dense.nbytes:.3f}x",
            f"{one.flops / 1e12:.3f}",
            str(len(one.kernels)),
        )
    text.caption = f"predicted, not measured: kernels as inductor schedules them for {where}"
    return text


def transfers(found: dict[str, Prediction]) -> Table:
    """What offloading would take: whether the link to the host keeps up with the kernels."""
    figures = ("MB", "to host", "forward", "hidden", "step", "of dense")
    card, dense = found[DENSE].card, found[DENSE]
    title = f"if what is saved waited on the host, at {card.host / GIGA:g} GB/s"
    text = plain_table("variant", *figures, figures=figures, title=title, padding=(0, 1, 0, 0))
    for name, one in found.items():
        text.add_row(
            name,
            f"{one.movable_bytes / 1e6:.1f}",
            f"{one.movable_bytes / card.host * 1e3:.3f} ms",
            f"{one.seconds_in(PHASES[0]) * 1e3:.3f} ms",
            f"{one.hidden:.0%}",
            f"{one.offloaded_seconds * 1e3:.3f} ms",
            f"{one.offloaded_seconds / dense.seconds:.3f}x",
        )
    text.caption = "of packed steps, what is packed; hidden: while kernels run. Offload is eager"
    return text


def costs(one: Prediction, dense: Prediction) -> Table:
    """The kernels that cost most; of a variant, those that the dense step does not have."""
    beside = None if one is dense else dense
    title = f"{one.variant}: what costs most" + (" and is not in the dense step" * bool(beside))
    figures = ("times", "us", "share", "MB in", "MB out", "GFLOP")
    text = plain_table("kernel", *figures, figures=figures, title=title, padding=(0, 1, 0, 0))
    for kernel, count, seconds in one.costliest(beside):
        text.add_row(
            _short(kernel),
            str(count),
            f"{seconds * 1e6:.1f}",
            f"{seconds / one.seconds:.1%}",
            *(f"{count * n / 1e6:.1f}" for n in (kernel.read_bytes, kernel.write_bytes)),
            f"{count * kernel.flops / 1e9:.1f}" if kernel.flops else "",
        )
    text.caption = LEGEND
    return text


def changes(one: Prediction, dense: Prediction) -> Table:
    """What a variant adds to the dense step and takes away, kernel by kernel, and the sums."""
    title = f"{one.variant}: kernels that the dense step does not have (+), or it alone (-)"
    figures = ("times", "MB in", "MB out", "MB")
    text = plain_table("kernel", *figures, figures=figures, title=title, padding=(0, 1, 0, 0))
    sums = [0, 0, 0]
    for kernel, count in one.added(dense):
        moved = [count * n for n in (kernel.read_bytes, kernel.write_bytes, kernel.nbytes)]
        text.add_row(_short(kernel), f"{count:+d}", *(f"{n / 1e6:+.1f}" for n in moved))
        sums = [a + b for a, b in zip(sums, moved, strict=True)]
    text.add_row("all", "", *(f"{n / 1e6:+.1f}" for n in sums))
    text.caption = LEGEND
    return text


def _short(kernel: Kernel) -> str:
    name = kernel.name if len(kernel.name) < 30 else kernel.name[:28] + ".."
    return f"{kernel.phase[0]} {name}"
