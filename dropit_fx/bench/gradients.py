"""``dropit-fx bench gradients``: what a preset costs in the gradient of a whole model.

The gradients of all parameters of a trained model (``bench.trained``) are formed once dense and
once from what each preset keeps. Reported are the relative error |g' - g| / |g| and the cosine of
g' and g, all parameters taken as one vector, beside the share of saved bytes.
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
from dropit_fx.bench.trained import ENCODER, Trained, trained
from dropit_fx.check.compare import losses, paired
from dropit_fx.config import load_config, presets
from dropit_fx.report.rows import plain_table, report

Gradients = dict[str, Tensor | None]


def bench_gradients(
    configs: Sequence[str] = (),
    loss: str = "mlm",
    model: str = ENCODER,
    sequences: int = 16,
    length: int = 64,
    json_path: str | None = None,
) -> list[dict[str, Any]]:
    """Compares the gradients of every preset with the dense ones, and prints a table.

    Args:
        configs: Names of presets, or paths of config files; all presets where it is empty.
        loss: ``"mlm"`` or ``"contrastive"``, of the encoder.
        model: ``"encoder"`` or ``"deit"``.
        sequences: Pieces of text.
        length: Tokens of each.
        json_path: Where to write the figures.

    Returns:
        For each config: ``name``, ``saved`` (share of the dense bytes), ``error``, ``cosine``.
    """
    run = trained(model, loss, sequences, length)
    exact = gradients(run, run.model)
    found = []
    for name in track(configs or presets(), "gradients", console=Console(stderr=True)):
        torch.manual_seed(0)
        config = load_config({"preset": name} if name in presets() else name)
        packed = transform(run.model, config, example_kwargs=run.inputs)
        row = {"name": name, "saved": report(packed).ratio}
        found.append(row | compared(exact, gradients(run, packed)))
    figures = ("saved, of dense", "relative error", "cosine")
    title = f"gradients of {run.title}"
    table = plain_table("preset", *figures, figures=figures, title=title)
    for row in found:
        cells = f"{row['saved']:.1%}", f"{row['error']:.3f}", f"{row['cosine']:.4f}"
        table.add_row(str(row["name"]), *cells)
    Console().print(table)
    if json_path:
        written = {"model": run.title, "rows": found}
        Path(json_path).write_text(json.dumps(written, indent=1) + "\n")
    return found


def gradients(run: Trained, module: nn.Module) -> Gradients:
    """Of all parameters, when ``module`` is run in the place of the model that has them."""
    parameters = dict(run.model.named_parameters())
    grads = torch.autograd.grad(run.loss(module), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


def compared(exact: Gradients, found: Gradients) -> dict[str, float]:
    """Relative ``error`` and ``cosine`` of all parameters as one vector."""
    whole, _ = losses(paired(exact, found))
    return {"error": whole.relative, "cosine": whole.cosine}
