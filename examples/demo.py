"""What dropit_fx is for, in a minute or two on two cores.

    python examples/demo.py --out build/demo

First a training step of DeiT-Ti, dense and packed: what it saves, its peak of memory, its time.
Then the report of that model as a page for a browser. At last a small ViT learns digits, dense and
packed, from the same weights on the same batches. `digits.py` trains with several seeds, and a
ResNet too.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import digits
from rich.console import Console

import dropit_fx
from dropit_fx.bench.step import Task, table, take_turns

DENSE = "dense"


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)

    console.rule(f"one training step of {options.model}")
    task = Task.of_spec(options.model, options.batch, options.size)
    packed = dropit_fx.transform(
        copy.deepcopy(task.model), preset=options.preset, example_args=(task.x,)
    )
    runs = {DENSE: (task.model, task.model), options.preset: (packed, packed)}
    console.print(table(task.title, take_turns(task, runs, options.rounds, lambda name: DENSE)))

    page = options.out / "report.html"
    dropit_fx.report(packed).page(page)
    console.print(
        f"\nEach saved tensor, and what becomes of it: {page.resolve()}\n", soft_wrap=True
    )

    console.rule("a small ViT learns digits")
    once = ["--models", "vit", "--seeds", "1", "--no-compile", "--rounds", "10"]
    limit = [] if options.limit is None else ["--limit", str(options.limit)]
    epochs = ["--epochs", str(options.epochs), "--out", str(options.out)]
    return digits.main([*once, "--presets", options.preset, *limit, *epochs])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="timm:deit_tiny_patch16_224", help="of the step")
    parser.add_argument("--batch", type=int, default=16, help="of the step")
    parser.add_argument("--size", type=int, help="of the step's images (default: the model's own)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--epochs", type=int, default=12, help="of the training")
    parser.add_argument("--limit", type=int, help="so many digits (default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
