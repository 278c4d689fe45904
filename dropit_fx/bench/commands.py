"""``dropit-fx bench kernels``, ``formats``, ``gradients`` and ``gpu``: their arguments.

Also ``python -m dropit_fx.bench.commands kernels``, and so on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dropit_fx.bench.formats import LOSSES, bench_formats
from dropit_fx.bench.gradients import bench_gradients
from dropit_fx.bench.kernels import bench_kernels


def kernels(**options: Any) -> dict[str, Any]:
    """``dropit_fx.bench.kernels.bench_kernels``."""
    return bench_kernels(**options)


def formats(**options: Any) -> list[dict[str, Any]]:
    """``dropit_fx.bench.formats.bench_formats``."""
    return bench_formats(**options)


def gradients(**options: Any) -> list[dict[str, Any]]:
    """``dropit_fx.bench.gradients.bench_gradients``."""
    return bench_gradients(**options)


def gpu(**options: Any) -> dict[str, Any]:
    """``dropit_fx.bench.gpu.bench_gpu``."""
    from dropit_fx.bench.gpu import bench_gpu  # which imports inductor: seconds

    return bench_gpu(**options)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``, which ``model_spec.find_device`` reads."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def add_gradients_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench gradients``; their names are the parameters of ``gradients``."""
    parser.add_argument(
        "configs", nargs="*", metavar="PRESET|FILE", help="what to compare (default: every preset)"
    )
    parser.add_argument("--loss", choices=LOSSES, default="mlm", help="default: mlm")
    parser.add_argument(
        "--json", dest="json_path", metavar="FILE", help="write the figures to FILE"
    )


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench gpu``; their names are the parameters of ``gpu``."""
    parser.add_argument("--out", metavar="FILE", help="default: examples/figures/gpu_<card>.json")
    parser.add_argument("--minutes", type=float, default=9, help="for everything (default: 9)")
    parser.add_argument(
        "--models", nargs="+", default=(), metavar="GLOB", help="deit_s, gpt2, ..., kernels"
    )
    parser.add_argument(
        "--variants", nargs="+", default=(), metavar="GLOB", help="'eager *', balanced, 'budget*'"
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--inner", metavar="BACKEND", help="what compiles (default: inductor)")
    parser.add_argument("--rehearse", action="store_true", help="small models on the CPU")
    parser.add_argument("--copy-to", metavar="DIR", help="gets a copy after every row")
    parser.add_argument("--tests", metavar="DIR", help="tests to run first")


def add_kernels_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench kernels``; their names are the parameters of ``kernels``."""
    parser.add_argument("--shape", type=int, nargs="+", default=(16, 197, 768), metavar="N")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"), metavar="DTYPE")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as torch is set")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    add_device(parser)
    parser.add_argument(
        "--json", dest="json_path", metavar="FILE", help="write the figures to FILE"
    )


def add_formats_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench formats``; their names are the parameters of ``formats``."""
    parser.add_argument("--loss", choices=LOSSES, default="mlm", help="default: mlm")
    parser.add_argument(
        "--json", dest="json_path", metavar="FILE", help="write the figures to FILE"
    )
    parser.add_argument("--plot", dest="plot_path", metavar="FILE", help="draw them into FILE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the benches."""
    parser = argparse.ArgumentParser(prog="python -m dropit_fx.bench.commands")
    benches = parser.add_subparsers(required=True, metavar="WHAT")
    one = benches.add_parser("kernels", help="time of packing and unpacking")
    add_kernels_arguments(one)
    one.set_defaults(run=kernels)
    other = benches.add_parser("formats", help="bits and gradient error of every format")
    add_formats_arguments(other)
    other.set_defaults(run=formats)
    third = benches.add_parser("gradients", help="the gradient of a whole model, per preset")
    add_gradients_arguments(third)
    third.set_defaults(run=gradients)
    options = vars(parser.parse_args(arguments))
    options.pop("run")(**options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
