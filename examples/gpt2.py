"""Trains a GPT-2 with Hugging Face's Trainer on the bytes of a text, dense and packed.

    python examples/gpt2.py --text book.txt --presets balanced gact

Without --text the text is what the Python standard library's own modules say; nothing is
downloaded: a token is a byte. All runs start from the same weights and see the same batches. What
comes out: the loss at the end, what a batch saves for the backward, and the time.

The model is small, so that it trains on a CPU in a few minutes. GPT-2 in its full size, with
inductor, for a GPU:

    python examples/gpt2.py --layers 12 --width 768 --heads 12 --length 1024 --batch 8 \\
        --steps 10000 --lr 3e-4 --backend dropit --text book.txt

Needs the extra `hf`.
"""

import argparse
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from training import DENSE, MIB, packing, positive, preset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from dropit_fx import measure
from dropit_fx.integrations.hf import BACKENDS, DropITCallback


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


def build(options: argparse.Namespace) -> GPT2LMHeadModel:
    torch.manual_seed(options.seed)
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


def train(
    variant: str,
    model: Any,
    data: Windows,
    options: argparse.Namespace,
    folder: str,
    console: Console,
    make: Callable[..., Trainer] = Trainer,
    settings: Callable[..., TrainingArguments] = TrainingArguments,
) -> dict[str, Any]:
    """One training: the loss of its first and its last tenth, saved bytes, and seconds."""
    callback = (
        None if variant == DENSE else DropITCallback(**packing(variant), backend=options.backend)
    )
    every = max(1, options.steps // 10)
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
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        callbacks=[callback] if callback else [],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    start = time.perf_counter()
    with console.status(f"{variant}: {options.steps} steps"):
        trainer.train()
    seconds = time.perf_counter() - start
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if callback:
        saved = next(e["saved_bytes_packed"] for e in history if "saved_bytes_packed" in e)
    else:
        saved = dense_bytes(trainer, data, options)
    return {"first": losses[0], "last": losses[-1], "saved": saved, "seconds": seconds}


def dense_bytes(trainer: Trainer, data: Windows, options: argparse.Namespace) -> int:
    model = trainer.model.train()
    rows = data.rows[: options.batch].to(model.device)
    return measure.saved_bytes(model, input_ids=rows, labels=rows)


def table(results: dict[str, dict[str, Any]]) -> Table:
    made = Table(header_style="bold", box=None, pad_edge=False)
    made.add_column("")
    for column in ("loss, first tenth", "loss, last tenth", "saved, MiB", "time, s"):
        made.add_column(column, justify="right", no_wrap=True)
    for variant, got in results.items():
        share = "" if variant == DENSE else f" ({got['saved'] / results[DENSE]['saved']:.0%})"
        made.add_row(
            variant,
            f"{got['first']:.3f}",
            f"{got['last']:.3f}",
            f"{got['saved'] / MIB:.1f}{share}",
            f"{got['seconds']:.0f}",
        )
    return made


def arguments(description: str | None, presets: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="any file (default: see above)")
    parser.add_argument(
        "--presets", nargs="+", type=preset, default=list(presets), help="or config files"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="dropit_eager")
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--batch", type=positive, default=8, help="sequences (default: 8)")
    parser.add_argument("--length", type=positive, default=128, help="of each (default: 128)")
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, ["balanced"]).parse_args(argv)
    transformers.logging.set_verbosity_error()
    console = Console()
    data = windows(options)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in (DENSE, *options.presets):
            model = build(options)
            results[variant] = train(variant, model, data, options, folder, console)
    console.print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
