"""The models of the tests: real ones from timm, torchvision and transformers, with random weights.

They are cut down (fewer blocks, smaller images), which keeps every kind of op and makes them quick.
Each is built in training mode, with dropout where its family has it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, fx, nn
from torchvision.models import VisionTransformer

from dropit_fx import transform

BATCH, TOKENS, VOCABULARY, CLASSES = 2, 24, 96, 10


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Attributes:
        name: Of the model, as its library calls it.
        build: Makes it, in training mode.
        args: Makes positional inputs for a batch of the given size.
        kwargs: Makes keyword inputs.
        exported: ``torch.export`` captures it; otherwise ``symbolic_trace`` does.
        changed_by_export: What its code computes by other ops while it is exported: there the
            dense model to compare with is the exported one.
    """

    name: str
    build: Callable[[], nn.Module]
    args: Callable[[int], tuple[Any, ...]] = lambda batch: ()
    kwargs: Callable[[int], dict[str, Any]] = field(default=lambda batch: {})
    exported: bool = False
    changed_by_export: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        return liven(self.build())

    def dense(self, model: nn.Module, what: str, batch: int = BATCH, like: Any = None) -> nn.Module:
        """The model whose ``what`` a rewritten one has to have: a copy, with the same ops.

        ``like``: inputs on the model's device, where that is another one.
        """
        model = copy.deepcopy(model)
        if what not in self.changed_by_export:
            return model
        args, kwargs = like or self.inputs(batch)
        return torch.export.export(model, args, kwargs, strict=False).module()

    def inputs(self, batch: int = BATCH) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args(batch), self.kwargs(batch)


@torch.no_grad()
def liven(model: nn.Module) -> nn.Module:
    """Moves weights away from the constants (often 0) at which layers start.

    A residual branch that ends in a norm with weight 0 has no gradient behind it, and then
    every way of computing that gradient is right.
    """
    for parameter in model.parameters():
        if parameter.unique().numel() == 1:
            parameter.uniform_(0.5, 1.0) if parameter.dim() == 1 else parameter.normal_(std=0.1)
    return model


def images(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, 3, size, size),)


def of_timm(name: str, size: int, **changes: Any) -> Case:
    def build() -> nn.Module:
        return timm.create_model(name, num_classes=CLASSES, **changes).train()

    return Case(name, build, args=images(size))


def tokens(batch: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, TOKENS))


def language_model(batch: int) -> dict[str, Any]:
    ids = tokens(batch)
    return {"input_ids": ids, "labels": ids.clone()}


def classification(batch: int) -> dict[str, Any]:
    return {
        "input_ids": tokens(batch),
        "attention_mask": torch.ones(batch, TOKENS, dtype=torch.long),
        "labels": torch.randint(0, 3, (batch,)),
    }


def translation(batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch), "labels": tokens(batch)}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=2 * TOKENS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # else it is looked up with a regular expression
    return model


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=2 * TOKENS,
        num_labels=3,
        problem_type="single_label_classification",
    )
    return transformers.BertForSequenceClassification(config).train()


def llama(key_value_heads: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2 * TOKENS,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config).train()


def mixer() -> nn.Module:
    model = timm.create_model("mixer_s32_224", num_classes=CLASSES, img_size=64, drop_rate=0.1)
    model.blocks = model.blocks[:2]
    return model.train()


def efficientnet() -> nn.Module:
    model = timm.create_model(
        "efficientnet_b0", num_classes=CLASSES, drop_rate=0.2, drop_path_rate=0.2
    )
    model.blocks = model.blocks[:3]  # of seven stages
    model.conv_head = nn.Conv2d(40, model.conv_head.out_channels, 1, bias=False)
    return model.train()


def torchvision_vit() -> nn.Module:
    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        dropout=0.1,
        num_classes=CLASSES,
    ).train()


CASES: tuple[Case, ...] = (
    of_timm("deit_tiny_patch16_224", 64, img_size=64, depth=2, proj_drop_rate=0.1),
    of_timm("resnet18", 64, layers=(1, 1, 1, 1)),
    of_timm("resnet50", 64, layers=(1, 1, 1, 1)),
    of_timm("convnext_tiny", 64, depths=(1, 1, 1, 1), drop_path_rate=0.1),
    of_timm("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(2, 2), num_heads=(3, 6)),
    Case("efficientnet_b0", efficientnet, args=images(32)),
    Case("mixer_s32_224", mixer, args=images(64)),
    Case("torchvision_vit", torchvision_vit, args=images(32)),
    Case("gpt2", gpt2, kwargs=language_model, exported=True),
    Case("bert", bert, kwargs=classification, exported=True),
    # sdpa's own causal attention in eager mode, a mask while exported
    Case(
        "llama",
        lambda: llama(4),
        kwargs=language_model,
        exported=True,
        changed_by_export=("bytes",),
    ),
    # and grouped queries: sdpa's own in eager mode, repeated keys and values while exported
    Case(
        "llama_gqa",
        lambda: llama(2),
        kwargs=language_model,
        exported=True,
        changed_by_export=("bytes", "gradients"),
    ),
    Case("t5", t5, kwargs=translation, exported=True),
)
CASE = {case.name: case for case in CASES}


@functools.cache
def rewritten(name: str, lossless: bool = False) -> tuple[nn.Module, fx.GraphModule]:
    """A model and what ``transform`` makes of it, for all tests: capturing takes seconds.

    They share parameters and buffers. Tests may train them, and leave them in training mode.
    """
    torch.manual_seed(0)
    case = CASE[name]
    model = case.model()
    args, kwargs = case.inputs()
    if lossless:  # also where nothing is freed, so that every formula runs
        made = transform(
            model,
            {"preset": "dropit", "force": True},
            gamma=0.0,
            example_args=args,
            example_kwargs=kwargs,
        )
    else:
        made = transform(model, preset="dropit", example_args=args, example_kwargs=kwargs)
    return model, made


every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def loss_of(output: Any) -> Tensor:
    """The model's own loss where it gives one, otherwise one that reaches every logit."""
    return output.loss if hasattr(output, "loss") else output.float().square().mean()


@dataclass
class Step:
    """What one training step leaves behind."""

    output: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, seed: int = 0) -> Step:
    """A forward and its backward under a fixed seed; gradients of parameters and of inputs."""
    args = tuple(
        a.detach().clone().requires_grad_() if torch.is_floating_point(a) else a for a in args
    )
    named = getattr(model, "_orig_mod", model)
    named.zero_grad()
    torch.manual_seed(seed)
    output = model(*args, **kwargs)
    loss_of(output).backward()
    gradients = {n: p.grad for n, p in named.named_parameters()}
    gradients |= {f"input {i}": a.grad for i, a in enumerate(args)}
    return Step(
        output=flat(output),
        gradients={n: g if g is None else g.clone() for n, g in gradients.items()},
        buffers={n: t.clone() for n, t in named.state_dict().items() if n not in gradients},
    )


def flat(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output.detach()}
    return {k: v.detach() for k, v in output.items() if isinstance(v, Tensor)}


def differing(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> list[str]:
    """Names whose tensors are not the same bits: what a failing test prints."""
    assert a.keys() == b.keys()

    def same(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)

    return [name for name in a if not same(a[name], b[name])]
