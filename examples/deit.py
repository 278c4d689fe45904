"""Trains a DeiT as the paper's benchmarks do, dense and packed, by timm's recipe.

    python examples/deit.py

trains a small one on scikit-learn's digits, in minutes on a CPU. The rows of DropIT's first table,
on GPUs, one process each, `torchrun --nproc-per-node 8` before the script:

    examples/deit.py --model deit_tiny_patch16_224 --data-set IMNET --data-path PATH \\
        --packed-only --strategy mink --gamma 0.7
    examples/deit.py --model deit_small_patch16_224 --finetune WEIGHTS.pth --data-set CIFAR \\
        --data-path PATH --batch-size 384 --opt sgd --lr 0.01 --unscale-lr --weight-decay 0.0001 \\
        --epochs 1000 --packed-only --strategy mink --gamma 0.9

IMNET is a folder with the folders `train` and `val`, of one folder for each class; CIFAR the folder
of torchvision's CIFAR-100. Nothing is downloaded. What comes out: loss and test accuracy, what a
step saves for the backward, its peak of memory, and the time. Without --strategy and --presets,
the preset `balanced` is trained beside dense.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from timm.utils import init_distributed_device, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from training import DENSE, MIB, packing, positive, preset

from dropit_fx import measure, transform
from dropit_fx.codecs import CODEC

BATCH_OF_LR = 512  # --lr is for batches of so many images, unless --unscale-lr says otherwise


class Digits(Dataset[tuple[Any, int]]):
    """Scikit-learn's digits as images; every fourth of them to test."""

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        chosen = [i for i in range(len(digits.target)) if (i % 4 != 3) == train]
        self.images = (digits.images[chosen] * 15.9).astype("uint8")
        self.labels = digits.target[chosen].tolist()
        self.transform: Any = None  # timm's loader puts one here

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image), self.labels[index]


def datasets(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """To train on, to test on, and the number of classes."""
    name, path = options.data_set, options.data_path
    if name == "digits":
        return Digits(train=True), Digits(train=False), 10
    if path is None:
        raise SystemExit(f"--data-set {name} needs --data-path")
    if name == "CIFAR":
        sides = [torchvision.datasets.CIFAR100(path, train=train) for train in (True, False)]
        return sides[0], sides[1], 100
    train, test = (torchvision.datasets.ImageFolder(path / side) for side in ("train", "val"))
    return train, test, len(train.classes)


def loaders(
    options: argparse.Namespace, train: Any, test: Any, distributed: bool
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """timm's, with DeiT's augmentation; digits are moved and scaled a little and nothing else."""
    digits = options.data_set == "digits"
    common = {
        "input_size": (3, options.input_size, options.input_size),
        "batch_size": options.batch_size,
        "use_prefetcher": False,
        "interpolation": "bicubic",
        "num_workers": options.workers,
        "persistent_workers": options.workers > 0,
        "distributed": distributed,
    }
    augmentation = (
        {"scale": (0.8, 1.0), "hflip": 0.0, "color_jitter": 0.0}
        if digits
        else {
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "color_jitter": 0.3,
            "re_prob": 0.25,
            "re_mode": "pixel",
            "num_aug_repeats": 3 if distributed and options.data_set == "IMNET" else 0,
        }
    )
    return (
        timm.data.create_loader(train, is_training=True, **common, **augmentation),
        timm.data.create_loader(test, crop_pct=1.0 if digits else 0.875, **common),
    )


def build(options: argparse.Namespace, classes: int) -> nn.Module:
    small = options.data_set == "digits"
    sizes = {"img_size": options.input_size, "patch_size": 8} if small else {}
    torch.manual_seed(options.seed)
    model: nn.Module = timm.create_model(
        options.model, num_classes=classes, drop_path_rate=options.drop_path, **sizes
    )
    if options.finetune:
        state = torch.load(options.finetune, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        own = model.state_dict()
        state = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        missing = model.load_state_dict(state, strict=False).missing_keys
        Console().print(f"{options.finetune}: {len(state)} tensors; made anew: {missing}")
    return model


def variants(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name of a variant -> the arguments of ``transform``; the dense one has none."""
    own = {k: getattr(options, k) for k in ("strategy", "gamma", "bits")}
    own = {k: v for k, v in own.items() if v is not None}
    found: dict[str, dict[str, Any]] = {} if options.packed_only else {DENSE: {}}
    if own and not options.presets:
        return found | {" ".join(map(str, own.values())): own}
    for name in options.presets or ["balanced"]:
        found[" ".join([Path(name).stem, *map(str, own.values())])] = packing(name) | own
    return found


class Run:
    """One training of one variant, by timm's recipe."""

    def __init__(self, how: dict[str, Any], options: argparse.Namespace, device: torch.device):
        self.options, self.device = options, device
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        train, test, classes = datasets(options)
        self.train_loader, self.test_loader = loaders(options, train, test, ranks > 1)
        if not len(self.train_loader):
            raise SystemExit(f"{len(train)} images are not one batch of {options.batch_size}")
        self.model = build(options, classes).to(device).train()
        batch = torch.randn(options.batch_size, 3, options.input_size, options.input_size)
        self.example = batch.to(device)
        packed = self.model
        if how:
            with self.autocast():
                packed = transform(self.model, example_args=(self.example,), **how)
        self.run = self.holder = packed
        if options.compile:
            from dropit_fx.compile.partition import KeepPacked

            settings = {"options": {"custom_partitioner_fn": KeepPacked()}} if how else {}
            self.run = torch.compile(packed, **settings)
        if ranks > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.run = DistributedDataParallel(self.run, device_ids=ids)

        scale = 1.0 if options.unscale_lr else options.batch_size * ranks / BATCH_OF_LR
        self.optimizer = timm.optim.create_optimizer_v2(
            self.model,  # whose method says which parameters do not decay
            options.opt,
            lr=options.lr * scale,
            weight_decay=options.weight_decay,
        )
        self.schedule, _ = timm.scheduler.create_scheduler_v2(
            self.optimizer,
            num_epochs=options.epochs,
            warmup_epochs=min(options.warmup_epochs, options.epochs - 1),
            warmup_lr=1e-6,
            min_lr=1e-5,
            step_on_epochs=False,
            updates_per_epoch=len(self.train_loader),
        )
        self.mixup = None
        self.loss: nn.Module = timm.loss.LabelSmoothingCrossEntropy(0.1)
        if options.data_set != "digits":
            self.mixup = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=classes)
            self.loss = timm.loss.SoftTargetCrossEntropy()

    def autocast(self) -> Any:
        if not self.options.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def epochs(self) -> Iterator[dict[str, float]]:
        """Trains; after each epoch, its mean loss, the test accuracy, and its seconds."""
        random_seed(self.options.seed)  # of images, dropout and stochastic codecs
        step = 0
        for epoch in range(self.options.epochs):
            if hasattr(self.train_loader.sampler, "set_epoch"):
                self.train_loader.sampler.set_epoch(epoch)
            self.holder.train()
            start, total = time.perf_counter(), torch.zeros((), device=self.device)
            for images, labels in self.train_loader:
                x, y = images.to(self.device), labels.to(self.device)
                if self.mixup:
                    x, y = self.mixup(x, y)
                with self.autocast():
                    scores = self.run(x)
                loss = self.loss(scores.float(), y)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                step += 1
                self.schedule.step_update(step)
                total += loss.detach()
            seconds = time.perf_counter() - start
            mean = self.mean(total / len(self.train_loader))
            yield {"loss": mean, "accuracy": self.accuracy(), "seconds": seconds}

    def accuracy(self) -> float:
        self.holder.eval()
        right = torch.zeros(2, device=self.device)
        with torch.no_grad(), self.autocast():
            for images, labels in self.test_loader:
                hits = self.holder(images.to(self.device)).argmax(1) == labels.to(self.device)
                right += torch.stack([hits.sum(), torch.tensor(len(hits), device=hits.device)])
        if dist.is_initialized():
            dist.all_reduce(right)
        return (right[0] / right[1]).item()

    def mean(self, x: Tensor) -> float:
        """Of all ranks."""
        if dist.is_initialized():
            dist.all_reduce(x)
            x = x / dist.get_world_size()
        return x.item()

    def memory(self) -> dict[str, int]:
        def forward() -> Tensor:
            with self.autocast():
                return self.run(self.example)

        self.holder.train()
        return {
            "saved_bytes": measure.saved_bytes(forward),
            "peak_bytes": measure.peak_memory(forward),
        }


def table(results: dict[str, dict[str, Any]]) -> Table:
    made = Table(header_style="bold", box=None, pad_edge=False)
    made.add_column("")
    for column in ("loss, first", "last", "accuracy", "saved, MiB", "peak, MiB", "time, s"):
        made.add_column(column, justify="right", no_wrap=True)
    for name, got in results.items():
        dense = results.get(DENSE, {}) if name != DENSE else {}
        shares = {
            k: f" ({got[k] / dense[k]:.0%})" if dense else "" for k in ("saved_bytes", "peak_bytes")
        }
        epochs = got["epochs"]
        made.add_row(
            name,
            f"{epochs[0]['loss']:.3f}",
            f"{epochs[-1]['loss']:.3f}",
            f"{epochs[-1]['accuracy']:.1%}",
            *(f"{got[k] / MIB:.1f}{shares[k]}" for k in shares),
            f"{sum(e['seconds'] for e in epochs):.0f}",
        )
    return made


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="any of timm's")
    parser.add_argument("--data-set", choices=("digits", "IMNET", "CIFAR"), default="digits")
    parser.add_argument("--data-path", type=Path, metavar="DIR")
    parser.add_argument("--finetune", type=Path, metavar="FILE", help="weights to start from")
    parser.add_argument("--epochs", type=positive, help="(default: 300, digits: 6)")
    parser.add_argument("--batch-size", type=positive, default=64, help="of a rank (default: 64)")
    parser.add_argument("--input-size", type=positive, help="pixels (default: 224, digits: 32)")
    parser.add_argument("--opt", default="adamw", help="any of timm's (default: adamw)")
    parser.add_argument("--lr", type=float, help="(default: 5e-4, digits: 8e-3)")
    parser.add_argument("--unscale-lr", action="store_true", help="--lr is for any batch")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup-epochs", type=int, default=5)
    parser.add_argument("--drop-path", type=float, help="(default: 0.1, digits: 0)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--compile", action="store_true", help="which takes longer to start")
    packed = parser.add_argument_group("packing")
    strategies = [name for name, codec in CODEC.items() if "contract" in codec.serves]
    packed.add_argument(
        "--presets", nargs="+", type=preset, help="or config files (default: balanced)"
    )
    packed.add_argument("--strategy", choices=strategies)
    packed.add_argument("--gamma", type=float, help="dropping rate, 0 to 1")
    packed.add_argument("--bits", type=int, help="of a kept value, 1 to 8")
    packed.add_argument("--packed-only", action="store_true", help="no dense training beside it")
    parser.add_argument("--out", type=Path, default=Path("build/deit"), metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    small = options.data_set == "digits"
    defaults = {
        "epochs": 6 if small else 300,
        "input_size": 32 if small else 224,
        "lr": 8e-3 if small else 5e-4,
        "drop_path": 0.0 if small else 0.1,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    device = init_distributed_device(
        argparse.Namespace(device="cuda" if torch.cuda.is_available() else "cpu")
    )
    first = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(quiet=not first)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    results: dict[str, dict[str, Any]] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, how in variants(options).items():
            run = Run(how, options, device)
            line = progress.add_task(name, total=options.epochs)
            epochs = []
            for done in run.epochs():
                epochs.append(done)
                progress.advance(line)
            results[name] = {"epochs": epochs, **run.memory()}
            if first:
                options.out.mkdir(parents=True, exist_ok=True)
                weights = options.out / f"{name.replace(' ', '_')}.pth"
                torch.save({"model": run.holder.state_dict()}, weights)
    console.print(table(results))
    if first:
        (options.out / "deit.json").write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"Weights and results: {options.out}", highlight=False)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
