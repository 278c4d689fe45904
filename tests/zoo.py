"""Models of every kind, packed: ``make zoo``.

The smallest of each family of timm, torchvision's, architectures of transformers and diffusers cut
down to two layers, and what people write by hand (``zoo_models.py``). Each goes through
``dropit_fx.check``, by ``transform`` and by the plug-in: outputs and buffers have the bits of
dense, so have gradients where every format is made exact, and the bytes that are told are those
that are measured. Nothing is larger than dense. What is kept most, and why, is told.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import survey
import torch
import zoo_models
from survey import Result
from torch import nn

import dropit_fx
from dropit_fx.loss import default_loss

WAYS = ("transform", "dropit")
INNER = "aot_eager"  # what the plug-in hands its graphs to
BATCH, CLASSES, TOKENS, WORDS = 2, 10, 16, 96
SIDES = (64, 96, 128, 160, 224, 256)  # of images: the first that a model takes

Step = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class NoStep(Exception):
    """PyTorch itself runs no training step of a model; the message says why."""


# Libraries ----------------------------------------------------------------------------------------

TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
    *("googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1"),
    *("swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16", "wide_resnet50_2"),
    *("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"),
    *("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t"),
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
    *("maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"),
)
TRANSFORMERS = (
    *("albert", "arcee", "bart", "bert", "big_bird", "biogpt", "bloom", "camembert", "codegen"),
    *("cohere", "convbert", "ctrl", "deberta", "deberta-v2", "diffllama", "distilbert", "dinov2"),
    *("electra", "ernie", "esm", "falcon", "flaubert", "fnet", "gemma", "gemma2", "gemma3_text"),
    *("glm", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "helium", "ibert"),
    *("ijepa", "llama", "mamba", "mamba2", "marian", "mbart", "megatron-bert", "mistral"),
    *("mixtral", "mobilebert", "modernbert", "mpnet", "mpt", "mt5", "nemotron", "nystromformer"),
    *("olmo", "olmo2", "opt", "pegasus", "persimmon", "phi", "phi3", "plbart", "qwen2", "qwen3"),
    *("recurrent_gemma", "rembert", "roberta", "roformer", "rwkv", "squeezebert", "stablelm"),
    *("starcoder2", "switch_transformers", "t5", "umt5", "vit", "vit_msn", "xglm", "xlm", "xlnet"),
    *("xmod", "yoso", "beit", "data2vec-vision", "dinov2_with_registers"),
)
SMALL = {  # what configs call their sizes
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "d_inner", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_local_experts", "num_experts"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "bottleneck_size"), 16),
    **dict.fromkeys(("vocab_size", "attention_hidden_size"), WORDS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
    "hidden_dim": 64,
    "intra_bottleneck_size": 16,
    "true_hidden_size": 32,
    "block_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "state_size": 8,
    "head_ratio": 2,
    "n_groups": 1,
}
SMALL_AS = {  # and where that does not fit
    "esm": {"vocab_size": WORDS, "pad_token_id": 0, "mask_token_id": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "chunk_size": 8},
    "marian": {"decoder_vocab_size": WORDS},
    "mobilebert": {"intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xlnet": {"d_head": 16},
    "xmod": {"languages": ["en"], "default_language": "en"},
}


def _timm(family: str) -> Step:
    import timm

    def size(name: str) -> float:
        with suppress(Exception), torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())
        return float("inf")

    name = min(timm.list_models(module=family), key=size)
    # stochastic depth where it has that, and a size where it is made for one
    optional: list[dict[str, Any]] = [{"drop_path_rate": 0.1}, {}]
    sides: list[dict[str, Any]] = [*({"img_size": side} for side in SIDES), {}]
    for side, more in itertools.product(sides, optional):
        with suppress(Exception):
            model = timm.create_model(name, num_classes=CLASSES, **side, **more)
            return _with_images(model, (3,), *side.values())
    model = timm.create_model(name, num_classes=CLASSES)
    return _with_images(model, (3,))


def _with_images(model: nn.Module, lead: tuple[int, ...], *sides: int) -> Step:
    """With images of the first size that it takes.

    Raises:
        NoStep: It takes none.
    """
    model.train()
    for side in sides or SIDES:
        images = torch.randn(BATCH, *lead, side, side)
        try:
            default_loss(model(images))
        except Exception as error:
            why = error
        else:
            return model, (images,), {}
    raise NoStep(str(why))


def _torchvision(name: str) -> Step:
    from torchvision import models

    builder = models.get_model_builder(name)
    where = builder.__module__
    model = builder(weights=None, **({} if "video" in where else {"num_classes": CLASSES}))
    if ".detection" not in where:
        return _with_images(model, (3, 16) if ".video" in where else (3,))
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if "mask" in name:
        target["masks"] = torch.ones(2, 64, 64, dtype=torch.uint8)
    if "keypoint" in name:
        target["keypoints"] = torch.cat([boxes[:, None, :2] + 1, torch.ones(2, 1, 1)], 2).repeat(
            1, 17, 1
        )
    return model.train(), ([torch.rand(3, 64, 64)] * BATCH, [target] * BATCH), {}


def _transformers(kind: str) -> Step:
    import transformers

    from dropit_fx.bench.model_spec import HEADS, TRAINING

    config = transformers.AutoConfig.for_model(kind)
    known = {key: value for key, value in SMALL.items() if getattr(config, key, None) is not None}
    for key, value in {**known, **TRAINING, **SMALL_AS.get(kind, {})}.items():
        with suppress(Exception):  # some of them follow from others
            setattr(config, key, value)
    able = (head for head, kinds in HEADS.items() if type(config) in getattr(transformers, kinds))
    model = getattr(transformers, next(able)).from_config(config).train()
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(BATCH, 3, config.image_size, config.image_size)
        return model, (), {"pixel_values": pixels, "labels": torch.arange(BATCH)}
    tokens = torch.randint(3, WORDS, (BATCH, TOKENS))
    return model, (), {"input_ids": tokens, "labels": tokens.clone()}


def _diffusers(name: str) -> Step:
    import diffusers

    step, classes = torch.tensor([3, 7]), torch.tensor([1, 2])
    if name == "unet":
        channels: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1}
        model = diffusers.UNet2DModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **channels,
        )
        return model.train(), (torch.randn(BATCH, 3, 16, 16), step), {}
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=16
    )
    given = {"timestep": step, "class_labels": classes}
    return model.train(), (torch.randn(BATCH, 4, 16, 16),), given


def _by_hand(name: str) -> Step:
    model, args = zoo_models.BUILDERS[name]()
    return model.train(), args, {}


BUILD: dict[str, Callable[[str], Step]] = {
    "hand": _by_hand,
    "diffusers": _diffusers,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "timm": _timm,
}


def items() -> list[str]:
    """All there are, ``<library>/<name>``: what is written by hand first."""
    import timm

    names = {
        "hand": zoo_models.BUILDERS,
        "diffusers": ("unet", "dit"),
        "transformers": TRANSFORMERS,
        "torchvision": TORCHVISION,
        "timm": timm.list_modules(),
    }
    return [f"{library}/{name}" for library in BUILD for name in names[library]]


# Checking -----------------------------------------------------------------------------------------

begin = survey.quieten


def check(item: str, thorough: bool = True) -> Iterator[Result]:
    """A result for each way of a model; by ``transform`` alone where it is not ``thorough``."""
    library, name = item.split("/")
    torch.manual_seed(0)
    try:
        step = BUILD[library](name)
        default_loss(step[0](*step[1], **step[2]))
    except Exception as error:
        yield Result(item, name, "stock", f"{type(error).__name__}: {_first_line(error)}")
        return
    for way in WAYS if thorough else WAYS[:1]:
        outcome, why, notes = _checked(step, way)
        yield Result(f"{item} {way}", name, outcome, why, notes)


def _checked(step: Step, way: str) -> tuple[str, str, dict[str, Any]]:
    model, args, kwargs = step
    os.environ["DROPIT_INNER"] = INNER
    found = dropit_fx.check(model, args, kwargs, backend=way)
    notes: dict[str, Any] = {"dense": found.dense_bytes, "share": _share(found)}
    if not found:
        wrong = next(f for f in found.findings if f.passed is False)
        why = f"{wrong.name}: {wrong.text.splitlines()[0]}"
        return _outcome(step, way, why), why, notes
    if found.measured_bytes > found.dense_bytes:
        return "failed", f"{found.measured_bytes:,} bytes for {found.dense_bytes:,}", notes
    if way == "transform":
        rewritten = dropit_fx.transform(model, example_args=args, example_kwargs=kwargs)
        told = dropit_fx.report(rewritten).rows
        larger = [row.name for row in told if row.kept_bytes > row.dense_bytes > 0]
        if larger:
            return "failed", f"larger than dense: {', '.join(larger[:3])}", notes
        kept = Counter[str]()
        for row in told:
            kept[f"{row.op}: {row.reason or row.codec}"] += row.kept_bytes
        most = max(told, key=lambda row: row.kept_bytes, default=None)
        if most is not None:
            shape = "x".join(map(str, most.shape))
            notes["largest"] = f"{most.op} {shape}: {most.reason or most.codec}"
        notes["kept"] = dict(kept.most_common(5))
    return "passed", "", notes


def _share(found: dropit_fx.Check) -> float:
    return found.measured_bytes / found.dense_bytes if found.dense_bytes else 0.0


def _outcome(step: Step, way: str, why: str) -> str:
    """Of what did not pass: what PyTorch cannot do either is not held against it."""
    if "it does not repeat its own" in why or "no graph that it could rewrite" in why:
        return "stock"
    if "CaptureError" in why or "double backward" in why:
        return "refused"
    if way == "transform":
        return "failed"
    model, args, kwargs = step
    torch.compiler.reset()
    try:
        default_loss(torch.compile(model, backend=INNER)(*args, **kwargs)).backward()
    except Exception:
        return "stock"
    finally:
        model.zero_grad()
    return "failed"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def shares(results: list[Result]) -> list[str]:
    """For each library, how much of dense is kept; then what most of it is, and why."""
    lines, most = [], Counter[str]()
    for library in BUILD:
        found = [
            r.notes
            for r in results
            if r.item.startswith(library) and r.item.endswith("transform") and r.outcome == "passed"
        ]
        if found:
            kept = sorted(notes["share"] for notes in found)
            lines.append(
                f"{library}: {kept[len(kept) // 2]:.0%} of dense in the middle of {len(kept)},"
                f" {kept[0]:.0%} to {kept[-1]:.0%}"
            )
        for notes in found:  # each model counts as much as any other
            for what, nbytes in notes.get("kept", {}).items():
                most[re.sub(r"'[^']*'|\S*/\S*:\d+|\d+", "*", what)] += nbytes / max(
                    notes["dense"], 1
                )
    total = sum(most.values()) or 1
    return lines + [f"{part / total:.0%} of what is kept: {w}" for w, part in most.most_common(25)]


def main() -> int:
    given = survey.options(__doc__, "build/zoo.jsonl")
    chosen = [item for item in items() if re.search(given.only, item)]
    results = survey.run("zoo", chosen, given)
    parts: dict[str, list[Result]] = {}
    for result in results:
        library, _, rest = result.item.partition("/")
        parts.setdefault(f"{library}, {rest.partition(' ')[2] or 'dense'}", []).append(result)
    status = survey.tell(results, parts, "models of")
    print("\nkept:\n")
    for line in shares(results):
        print(f"- {line}")
    return status


if __name__ == "__main__":
    sys.exit(main())
