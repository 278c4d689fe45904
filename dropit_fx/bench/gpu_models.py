"""The models of ``bench gpu``, built from configs with random weights, and their batches.

Each is made on the default device, in training mode, and can be cut down for a rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.bench.step import Task


@dataclass(frozen=True)
class Model:
    """A model of the bench.

    Attributes:
        title: For people, with the batch.
        task: Called with the title, and whether to cut it down for a rehearsal.
        blocks: The modules whose children are its blocks.
        language: Whether it returns logits of many classes beside its loss.
    """

    title: str
    task: Callable[[str, bool], Task]
    blocks: tuple[str, ...]
    language: bool = False


class _LanguageTask(Task):
    """A causal language model, with the loss that it computes itself."""

    def __init__(self, title: str, model: nn.Module, ids: Tensor) -> None:
        self.title, self.model, self.x, self.autocast = title, model, ids, torch.bfloat16

    def loss(self, run: Callable[..., Any]) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16):
            loss: Tensor = run(input_ids=self.x, labels=self.x).loss
        return loss


def _images(name: str, batch: int, small: dict[str, Any], last: bool = False) -> Any:
    def make(title: str, rehearse: bool) -> Task:
        import timm

        changes, rows, side = (small, 4, 64) if rehearse else ({}, batch, 224)
        model, x = timm.create_model(name, **changes), torch.randn(rows, 3, side, side)
        if last:
            model.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
        return Task(title, model.train(), x, torch.bfloat16)

    return make


def _gpt2(title: str, rehearse: bool) -> Task:
    import transformers

    # on a GPU, attention with dropout stays dense: its kernel draws the mask inside
    layers, width, heads, words = (2, 64, 2, 4096) if rehearse else (12, 768, 12, 50257)
    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=words,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    return _language(title, model, (2, 64) if rehearse else (8, 1024))


def _llama(title: str, rehearse: bool) -> Task:
    """The sizes of TinyLlama: 1.1 billion parameters."""
    import transformers

    hidden, inner, layers, heads, groups, words = (
        (64, 128, 2, 4, 2, 256) if rehearse else (2048, 5632, 22, 32, 4, 32000)
    )
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=words,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return _language(title, model, (2, 64) if rehearse else (4, 2048))


def _language(title: str, model: Any, shape: tuple[int, int]) -> Task:
    model.loss_type = "ForCausalLM"  # else it is looked up with a regular expression
    return _LanguageTask(title, model.train(), torch.randint(model.config.vocab_size, shape))


class LoRA(nn.Module):
    """``base(x)`` and a trained product of two thin matrices beside it (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as that of ``base``."""
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


def _lora(title: str, rehearse: bool) -> Task:
    task = _llama(title, rehearse)
    task.model.requires_grad_(False)
    for name, module in list(task.model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            task.model.set_submodule(name, LoRA(module, rank=4 if rehearse else 16))
    return task


_SMALL_VIT = {"img_size": 64, "depth": 2, "num_classes": 10}
MODELS = {
    "deit_s": Model("DeiT-S, 128", _images("deit_small_patch16_224", 128, _SMALL_VIT), ("blocks",)),
    "resnet50": Model(
        "ResNet-50, channels-last, 128",
        _images("resnet50", 128, {"layers": (1, 1, 1, 1), "num_classes": 10}, last=True),
        ("layer1", "layer2", "layer3", "layer4"),
    ),
    "gpt2": Model("GPT-2, 8 x 1024", _gpt2, ("transformer.h",), language=True),
    "llama": Model("Llama of 1.1 B, 4 x 2048", _llama, ("model.layers",), language=True),
    "lora": Model("Llama of 1.1 B, LoRA, 4 x 2048", _lora, ("model.layers",), language=True),
    "vit_l": Model("ViT-L, 32", _images("vit_large_patch16_224", 32, _SMALL_VIT), ("blocks",)),
}
