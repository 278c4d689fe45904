"""Saved bytes and peaks of whole models, dense and packed, in eager mode and compiled by inductor.

    python examples/bytes.py                              # every model: half an hour on two cores
    python examples/bytes.py --models gpt2 --no-compiled  # one of them, in eager mode

Image models at batch 16 and 224 pixels, language models at 4 x 512 tokens with their loss; random
weights. Both sides are measured the same way: what autograd keeps after a forward, without
parameters and inputs, and the peak of PyTorch's allocations over a forward and its backward.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from training import MIB

import dropit_fx
from dropit_fx import measure


class Images(nn.Module):
    """An image model with its loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = timm.create_model(name)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), labels)


class Tokens(nn.Module):
    """A causal language model with its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gpt2() -> nn.Module:
    # attention's own dropout is 0 in most recipes of today
    config = transformers.GPT2Config(attn_pdrop=0.0)
    return Tokens(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return Tokens(transformers.LlamaForCausalLM(config))


def images() -> tuple[Tensor, ...]:
    return torch.randn(16, 3, 224, 224), torch.randint(0, 1000, (16,))


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 32000, (4, 512)),)


@dataclass(frozen=True)
class Model:
    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    autocast: bool = False


def _timm(title: str, name: str, **how: Any) -> Model:
    return Model(title, lambda: Images(name), images, **how)


MODELS = {
    "deit_tiny": _timm("DeiT-Ti", "deit_tiny_patch16_224"),
    "deit_tiny_bf16": _timm("DeiT-Ti, bf16 autocast", "deit_tiny_patch16_224", autocast=True),
    "resnet50": _timm("ResNet-50", "resnet50"),
    "convnext_tiny": _timm("ConvNeXt-T", "convnext_tiny"),
    "gpt2": Model("GPT-2, 12 layers, vocabulary 50257", gpt2, tokens),
    "llama": Model("Llama, 8 layers of 512, vocabulary 32000", llama, tokens),
    "gpt2_bf16": Model("GPT-2, bf16 autocast", gpt2, tokens, autocast=True),
    "llama_bf16": Model("Llama, bf16 autocast", llama, tokens, autocast=True),
}


def measured(model: Model, preset: str | None, compiled: bool) -> dict[str, int]:
    """``saved_bytes`` and ``peak_bytes`` of one model, dense where ``preset`` is None."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module, inputs = model.build().train(), model.inputs()
    autocast = torch.autocast("cpu", torch.bfloat16) if model.autocast else contextlib.nullcontext()
    run: Callable[..., Any] = module
    with autocast:
        if compiled and preset is not None:
            run = torch.compile(module, backend="dropit", options={"preset": preset})
        elif compiled:
            run = torch.compile(module)
        elif preset is not None:
            run = dropit_fx.transform(module, preset=preset, example_args=inputs)
        return {
            "saved_bytes": measure.saved_bytes(run, *inputs),
            "peak_bytes": measure.peak_memory(run, *inputs),
        }


def table(results: dict[str, Any]) -> Table:
    out = Table(box=None, header_style="bold", pad_edge=False)
    out.add_column("model", no_wrap=True)
    for name in ("saved, dense", "packed", "of dense", "peak, of dense"):
        out.add_column(name, justify="right")
    for name, ways in results.items():
        for way, rows in ways.items():
            dense, packed = rows["dense"], rows["packed"]
            out.add_row(
                f"{MODELS[name].title}, {way}",
                f"{dense['saved_bytes'] / MIB:.1f} MiB",
                f"{packed['saved_bytes'] / MIB:.1f} MiB",
                f"{packed['saved_bytes'] / dense['saved_bytes']:.1%}",
                f"{packed['peak_bytes'] / dense['peak_bytes']:.1%}",
            )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--preset", default="balanced", help="default: balanced")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=True, help="compiled ones too"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for bytes.json, which keeps its other models"
    )
    options = parser.parse_args(argv)
    ways = ("eager", "compiled")[: 1 + options.compiled]
    results: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=2 * len(ways) * len(options.models))
        for name in options.models:
            for way in ways:
                rows = results.setdefault(name, {}).setdefault(way, {})
                for variant, preset in (("dense", None), ("packed", options.preset)):
                    progress.update(bar, description=f"{name}, {way}, {variant}")
                    rows[variant] = measured(MODELS[name], preset, way == "compiled")
                    progress.advance(bar)
            if options.out is not None:  # after each model: all of them take half an hour
                write(results, options)
    Console().print(table(results))
    return 0


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bytes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    same = known.get("preset") == options.preset
    found = dict(known["models"]) if same else {}
    found |= {n: {"title": MODELS[n].title, **ways} for n, ways in results.items()}
    ordered = {n: found[n] for n in MODELS if n in found}
    path.write_text(json.dumps({"preset": options.preset, "models": ordered}, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
