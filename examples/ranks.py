"""What `ddp.py` and `fsdp.py` share: a small ViT trains on digits, dense and packed, on all ranks.

Each rank takes its share of every batch. Rank 0 prints a table: loss at the start and at the end,
what a rank saves for the backward, the time of a step, and the test accuracy of the checkpoint that
all ranks have written together, loaded into a dense model by one of them alone.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import digits
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from training import DENSE, MIB, accuracy, positive

from dropit_fx import measure
from dropit_fx.config import presets

BATCH, LR = 64, 1e-3  # BATCH: of all ranks together
EDGE = 10  # steps whose mean loss is the loss at the start, or at the end
HEAD = ("", "loss, start", "loss, end", "saved, MiB", "step, ms", "accuracy")

# model, preset or DENSE, whether to compile, example input -> what is called to train it
Wrap = Callable[[nn.Module, str, bool, Tensor], nn.Module]


def run(name: str, description: str | None, wrap: Wrap, argv: Sequence[str] | None = None) -> int:
    """The whole script: reads the command line, trains dense and packed, prints a table."""
    options = arguments(name, description).parse_args(argv)
    if "RANK" not in os.environ:
        raise SystemExit(f"run it by: torchrun --nproc-per-node 2 examples/{name}.py")
    device = join()
    table = Table(*HEAD, header_style="bold", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for variant in (DENSE, options.preset):
        table.add_row(variant, *examine(name, variant, wrap, device, options))
    if dist.get_rank() == 0:
        console = Console()
        console.print(table)
        console.print(
            f"{dist.get_world_size()} ranks ({dist.get_backend()}), batch {BATCH} in all,"
            f" {options.steps} steps. Loss: mean of {EDGE} steps. Saved: by one rank. Accuracy: on"
            f" test images, of the checkpoint of all ranks, loaded by one: {options.out}",
            highlight=False,
        )
    dist.destroy_process_group()
    return 0


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=presets(), default="balanced", help="beside dense")
    parser.add_argument("--steps", type=positive, default=120, help="(default: 120)")
    parser.add_argument("--compile", action="store_true", help="which takes longer to start")
    parser.add_argument("--out", type=Path, default=Path("build", name), metavar="DIR")
    return parser


def join() -> torch.device:
    """Joins the other ranks: NCCL where there is CUDA, gloo otherwise."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def examine(
    name: str, variant: str, wrap: Wrap, device: torch.device, options: argparse.Namespace
) -> list[str]:
    """The cells of one line of the table."""
    data = digits.load(16)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = BATCH // ranks
    torch.manual_seed(0)
    made = wrap(digits.vit().to(device), variant, options.compile, data.train_x[:share].to(device))
    # before any forward: after one without a backward, FSDP shows the root's gathered parameters
    optimizer = torch.optim.AdamW(made.parameters(), lr=LR, weight_decay=0.05)
    saved = measure.saved_bytes(made, data.train_x[:share].to(device))
    shuffle = torch.Generator().manual_seed(0)  # the same order for each rank
    losses, seconds = [], []
    for _ in range(options.steps):
        batch = torch.randperm(len(data.train_y), generator=shuffle)[:BATCH]
        mine = batch[rank * share : (rank + 1) * share]
        x, y = data.train_x[mine].to(device), data.train_y[mine].to(device)
        start = time.perf_counter()
        loss = F.cross_entropy(made(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)  # which also waits for all that was launched
        losses.append(loss.item() / ranks)
        seconds.append(time.perf_counter() - start)

    checkpoint = options.out / variant
    dcp.save(get_model_state_dict(made), checkpoint_id=checkpoint)
    reached = on_one_rank(checkpoint) if rank == 0 else 0.0
    dist.barrier()
    return [
        f"{statistics.mean(losses[:EDGE]):.3f}",
        f"{statistics.mean(losses[-EDGE:]):.3f}",
        f"{saved / MIB:.2f}",
        f"{1000 * statistics.median(seconds):.0f}",
        f"{reached:.1%}",
    ]


def on_one_rank(checkpoint: Path) -> float:
    """Test accuracy of a dense model on CPU with the weights that all ranks saved."""
    model = digits.vit()
    state = model.state_dict()
    with warnings.catch_warnings(action="ignore"):  # it says that it loads in one process
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    model.load_state_dict(state)
    return accuracy(model, digits.load(16))
