"""``dropit-fx bench``: the benches and their options.

The options of ``bench WHAT`` are the parameters of ``bench_WHAT`` in the module of that name.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from typing import Any

from dropit_fx.bench.trained import ENCODER, LOSSES, MODELS
from dropit_fx.config import DEFAULT_PRESET, presets

PICTURES = (".png", ".svg", ".pdf")
PRESET_OPTIONS: tuple[tuple[str, type, str], ...] = (
    (
        "preset",
        str,
        f"one of {', '.join(presets())}; its rules come after the config's own (default:"
        f" {DEFAULT_PRESET})",
    ),
    ("gamma", float, "dropping rate in [0, 1), for all rules of the preset that have one"),
    ("bits", int, "bits of a kept value, 1 to 8, for all rules of the preset that have them"),
)


def add_benches(parser: argparse.ArgumentParser) -> None:
    """Adds every bench as a command."""
    benches = parser.add_subparsers(required=True, metavar="WHAT")

    def bench(name: str, text: str, **more: Any) -> argparse.ArgumentParser:
        one = benches.add_parser(name, help=text, **more)
        one.set_defaults(run=functools.partial(_run, name))
        return one

    step = bench(
        "step",
        "a training step: dense, packed, and the algorithm as published",
        description="Times the training steps of a model in turn and counts what each saves:"
        " dense, packed, and DropIT as published; dense and packed compiled as well.",
    )
    add_model(step)
    step.add_argument(
        "--preset",
        dest="presets",
        type=lambda name: (name,),
        default=("balanced", "dropit"),
        metavar="PRESET",
        help="default: balanced and dropit",
    )
    for name, kind, text in PRESET_OPTIONS[1:]:
        step.add_argument(f"--{name}", type=kind, help=text)
    _add_rounds(step)
    step.add_argument(
        "--no-compile", dest="compiled", action="store_false", help="eager only, much quicker"
    )

    pareto = bench(
        "pareto",
        "memory against time: presets, checkpointing and memory budgets",
        description="Measures compiled training steps in turn: dense, with its blocks checkpointed,"
        " at memory budgets of PyTorch's own partitioner, and packed by every preset. Says where a"
        " rival that loses nothing takes less memory and less time than a packed step.",
        epilog="example: dropit-fx bench pareto --model timm:resnet18 --variants 'bal*' 'budget*'",
    )
    add_model(pareto)
    pareto.add_argument(
        "--variants",
        dest="only",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="which of dense, checkpoint, budget=0.5, PRESET, balanced+budget=0.5 and so on"
        " (default: all; dense is always there)",
    )
    inner = ("inductor", "aot_eager", "aot_eager_decomp_partition")
    pareto.add_argument("--inner", choices=inner, default="inductor", help="what compiles them")
    _add_rounds(pareto)

    roofline = bench(
        "roofline",
        "what a step costs on a GPU, told without one",
        description="Predicts compiled training steps on a GPU that need not be there, from the"
        " FLOPs and bytes of the kernels that inductor schedules for it: dense, packed, packed and"
        " fused, checkpointed, and at memory budgets; and says which kernels cost most.",
        epilog="example: dropit-fx bench roofline --model timm:deit_base_patch16_224 --device a100",
    )
    add_model(roofline)
    _add_roofline_options(roofline)

    kernels = bench("kernels", "time of packing and unpacking, and of products of kept rows")
    kernels.add_argument("--shape", type=int, nargs="+", default=(16, 197, 768), metavar="N")
    kernels.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"), metavar="DTYPE")
    kernels.add_argument("--threads", type=int, metavar="N", help="default: as torch is set")
    kernels.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")

    _add_gpu_options(
        bench(
            "gpu",
            "everything about this machine's GPU, in nine minutes",
            description="Measures training steps of models and the kernels, the most wanted first,"
            " until the time is up. A second run goes on where the first stopped.",
        )
    )

    formats = bench("formats", "bits and gradient error of every format")
    gradients = bench("gradients", "the gradient of a whole model, per preset")
    gradients.add_argument(
        "configs", nargs="*", metavar="PRESET|FILE", help="what to compare (default: every preset)"
    )
    codecs = bench(
        "codecs",
        "bits and gradient error of every codec by itself, on two trained models",
        description="Keeps the inputs of all linear layers, or of all nonlinearities, by one codec"
        " after the other and everything else exactly, and compares the gradient of the whole model"
        " with the dense one. Says which codecs are on the front: no smaller one has less error.",
    )
    peaks = bench(
        "peaks",
        "whether plans keep their word: many models, peak after peak",
        description="Plans each of twenty models for ten peaks from 100 down to 25 % of its dense"
        " step's, eager and compiled, and measures a real step with each plan; beside them"
        " PyTorch's memory budgets. Nothing is timed. Takes hours; each row is written as soon as"
        " it is there, and a second run goes on behind it.",
        epilog="example: dropit-fx bench peaks --models 'tiny:*' --ways eager --json peaks.json",
    )
    peaks.add_argument(
        "--models", nargs="+", default=(), metavar="GLOB", help="timm:resnet18, 'tiny:*', ..."
    )
    ways = ("eager", "compiled", "budget")
    peaks.add_argument("--ways", nargs="+", choices=ways, default=ways, help="default: all")
    peaks.add_argument("--inner", choices=inner, default="inductor", help="what compiles them")
    for one in (formats, gradients):
        text = f"{' or '.join(MODELS)} (default: {ENCODER})"
        one.add_argument("--model", choices=MODELS, default=ENCODER, help=text)
    for one in (formats, gradients, codecs):
        one.add_argument("--loss", choices=LOSSES, default="mlm", help="of the encoder (mlm)")
    for one in (step, pareto, kernels):
        one.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    for one in (step, pareto, roofline, kernels, formats, gradients, codecs, peaks):
        one.add_argument(
            "--json", dest="json_path", metavar="FILE", help="write the figures to FILE too"
        )
    for one in (pareto, formats, codecs):
        add_plot(one, dest="plot_path")


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds what ``model_spec.build_step`` takes: a model, the batch, the side of images."""
    parser.add_argument(
        "--model",
        required=default is None,
        default=default,
        metavar="SPEC",
        help="timm:NAME, torchvision:NAME, hf:NAME (a kind of transformers model, or a folder with"
        " its config.json), or pkg.module:factory (called without arguments; returns a module, or"
        " (module, example_args))" + (f"; default: {default}" * bool(default)),
    )
    parser.add_argument("--batch", type=_positive, default=16, help="batch size (default: 16)")
    parser.add_argument(
        "--size",
        type=_positive,
        metavar="N",
        help="side of images, or tokens of a text of hf: (default: what the model tells)",
    )


def add_plot(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """Adds a picture, whose suffix is read before anything takes time."""
    text = f"draw it as {', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
    parser.add_argument("--plot", metavar="FILE", type=_picture, help=text, **settings)


def _picture(path: str) -> str:
    if not path.lower().endswith(PICTURES):
        raise argparse.ArgumentTypeError(f"{path!r} is none of {', '.join(PICTURES)}")
    return path


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=_positive, default=7, help="timed steps (default: 7)")


def _add_gpu_options(parser: argparse.ArgumentParser) -> None:
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


def _add_roofline_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="h100",
        metavar="CARD",
        help="h100 (default), a100, 4090, or PEAK,BANDWIDTH in TFLOP/s and TB/s, behind which may"
        " follow GB/s to the host: 600,2.8,55",
    )
    parser.add_argument(
        "--variants",
        dest="only",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="which of packed, fused, checkpoint, budget=0.5, ... (default: all)",
    )
    for name, kind, text in PRESET_OPTIONS:
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "autocast"),
        default="bfloat16",
        help="of parameters and inputs (default: bfloat16); autocast: float32, run in bfloat16",
    )
    parser.add_argument(
        "--schedule",
        choices=("cuda", "cpu"),
        help="whose kernels are counted (default: a GPU's; the CPU's where Triton is missing)",
    )
    parser.add_argument(
        "--launch",
        type=float,
        default=0.0,
        metavar="US",
        help="microseconds of each kernel beside its work (default: 0)",
    )
    parser.add_argument(
        "--optimizer", action="store_true", help="count SGD with momentum too, an op at a time"
    )
    parser.add_argument(
        "--added", action="store_true", help="print each kernel that the dense step does not have"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _run(name: str, options: argparse.Namespace) -> int:
    module = importlib.import_module(f"dropit_fx.bench.{name}")  # some import inductor: seconds
    given = {option: value for option, value in vars(options).items() if option != "run"}
    getattr(module, f"bench_{name}")(**given)
    return 0
