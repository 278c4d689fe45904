"""Trains a GPT-2 with Hugging Face's Trainer on the bytes of a text, dense and packed.

    python examples/gpt2.py --variants dense balanced adapters pack_checkpoints --seeds 3

Without --text the text is what the Python standard library's own modules say; nothing is
downloaded: a token is a byte. Dropout is as the model comes. Of each seed all variants start from
the same weights and see the same batches; `pack_checkpoints` trains with gradient checkpointing,
whose inputs it packs. What comes out: the loss in the last tenth of the training and on sequences
that are not trained on, what a batch saves for the backward, and the time.

The model is small: at the defaults a training takes a minute of one processor's time. The JSON in
--out is written after each: what was stopped goes on where it was. Long trainings, twenty minutes
each, and GPT-2 in its full size, with inductor, for a GPU:

    python examples/gpt2.py --steps 5000 --seeds 3 --out build/gpt2_long
    python examples/gpt2.py --layers 12 --width 768 --heads 12 --length 1024 --batch 8 \\
        --steps 10000 --lr 3e-4 --backend dropit --text book.txt --out build/gpt2_whole

Needs the extra `hf`.
"""

import argparse
import copy
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from training import DENSE, MIB, begun, compact, packing, positive, preset, write
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from dropit_fx import measure, pack_checkpoints
from dropit_fx.integrations.hf import BACKENDS, DropITCallback

CHECKPOINTS = "pack_checkpoints"
HELD_OUT = 256  # sequences that are not trained on, or every sixteenth if these are fewer
SETTINGS = ("steps", "batch", "length", "layers", "width", "heads", "lr", "bf16", "backend")


class Windows(Dataset[dict[str, Tensor]]):
    """The bytes of a text, `length` at a time."""

    def __init__(self, text: bytes, length: int) -> None:
        self.rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.rows = self.rows[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def read(path: Path | None) -> bytes:
    """The text: a file, or the modules of the standard library one after the other."""
    if path:
        return path.read_bytes()
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return b"\n".join(module.read_bytes() for module in modules)


def windows(options: argparse.Namespace) -> Windows:
    """The sequences to train on."""
    data = Windows(read(options.text), options.length)
    if len(data) < options.batch:
        raise SystemExit(f"the text has {len(data)} sequences, fewer than one batch")
    return data


def held_out(data: Windows) -> tuple[Windows, Tensor]:
    """The sequences to train on, and others from all over the text."""
    held = torch.zeros(len(data), dtype=torch.bool)
    held[:: max(16, len(data) // HELD_OUT)] = True
    trained = copy.copy(data)
    trained.rows = data.rows[~held]
    return trained, data.rows[held]


def build(options: argparse.Namespace, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=options.length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class Ticks(TrainerCallback):
    """Tells a progress bar of each step."""

    def __init__(self, tick: Callable[[], object]) -> None:
        self.tick = tick

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()


def train(
    variant: str,
    model: Any,
    data: Windows,
    options: argparse.Namespace,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
    make: Callable[..., Trainer] = Trainer,
    settings: Callable[..., TrainingArguments] = TrainingArguments,
) -> dict[str, Any]:
    """One training: the loss of its first and its last tenth, saved bytes, and seconds."""
    if variant == CHECKPOINTS:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})  # older releases
        pack_checkpoints(model)
    callbacks: list[TrainerCallback] = [Ticks(tick)]
    if variant not in (DENSE, CHECKPOINTS):
        callbacks.append(DropITCallback(**packing(variant), backend=options.backend))
    every = max(1, options.steps // 10)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(
            model,
            settings(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=options.lr,
                warmup_steps=every,
                bf16=options.bf16,
                logging_steps=every,
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data,
            callbacks=callbacks,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    packed = [e["saved_bytes_packed"] for e in history if "saved_bytes_packed" in e]
    saved = packed[0] if packed else saved_bytes(trainer, data, options)
    return {"first": losses[0], "last": losses[-1], "saved": saved, "seconds": seconds}


def saved_bytes(trainer: Trainer, data: Windows, options: argparse.Namespace) -> int:
    model = trainer.model.train()
    rows = data.rows[: options.batch].to(model.device)
    return measure.saved_bytes(model, input_ids=rows, labels=rows)


def loss(model: GPT2LMHeadModel, rows: Tensor) -> float:
    """Of sequences that are not trained on."""
    model.eval()
    with torch.no_grad():
        batches = (batch.to(model.device) for batch in rows.split(32))
        total = sum(len(b) * model(input_ids=b, labels=b).loss.item() for b in batches)
    return total / len(rows)


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """A line for each variant: means over its seeds, and shares of dense."""
    made = Table(header_style="bold", box=None, pad_edge=False)
    made.add_column("", no_wrap=True)
    columns = {"first": "loss, first tenth", "last": "last tenth", "held_out": "held out"}
    shown = [name for name in columns if name in runs[0]]
    for column in (*map(columns.get, shown), "saved, MiB", "time, s"):
        made.add_column(column, justify="right", no_wrap=True)
    ways: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        of = [run for run in runs if run["variant"] == variant]
        ways[variant] = {k: statistics.mean(r[k] for r in of) for k in (*shown, "saved", "seconds")}
    dense = ways.get(DENSE)
    for variant, got in ways.items():
        losses = [f"{got[name]:.3f}" for name in shown]
        share = ""
        if dense and variant != DENSE:
            share = f" ({got['saved'] / dense['saved']:.0%})"
            losses[1:] = [f"{got[n]:.3f} ({got[n] / dense[n] - 1:+.2%})" for n in shown[1:]]
        made.add_row(variant, *losses, f"{got['saved'] / MIB:.1f}{share}", f"{got['seconds']:.0f}")
    return made


def bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="any file (default: see above)")
    parser.add_argument("--backend", choices=BACKENDS, default="dropit_eager")
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--batch", type=positive, default=8, help="sequences (default: 8)")
    parser.add_argument("--length", type=positive, default=128, help="of each (default: 128)")
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    return parser


def variant(text: str) -> str:
    return text if text in (DENSE, CHECKPOINTS) else preset(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--variants",
        nargs="+",
        type=variant,
        default=[DENSE, "balanced", "adapters", CHECKPOINTS],
        metavar="VARIANT",
        help=f"{DENSE}, {CHECKPOINTS}, presets, or config files (default: as above)",
    )
    parser.add_argument("--seeds", type=positive, default=1, help="so many, from 0 (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("build/gpt2"), metavar="DIR")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    data, rows = held_out(windows(options))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpt2.json"
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"text": str(options.text or "standard library"), "sequences": len(data)}
    results = begun(path, settings)
    done = {(run["seed"], run["variant"]) for run in results["runs"]}
    with bar(Console(stderr=True)) as progress:
        todo = [(seed, way) for seed in range(options.seeds) for way in options.variants]
        whole = progress.add_task("trainings", total=len(todo))
        for seed, way in todo:
            if (seed, way) not in done:
                line = progress.add_task(f"seed {seed}, {way}", total=options.steps)
                model, tick = build(options, seed), partial(progress.advance, line)
                found = train(way, model, data, options, seed, tick)
                found |= {"seed": seed, "variant": way, "held_out": loss(model, rows)}
                results["runs"].append(found)
                write(path, compact(results) + "\n")
                progress.remove_task(line)
            progress.advance(whole)
    wanted = [run for run in results["runs"] if (run["seed"], run["variant"]) in todo]
    Console().print(table(wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
