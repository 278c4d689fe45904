"""The loss of a model that was given none: what is differentiated where only the model is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dropit_fx.private import pytree

SEED = 20_230_202


def default_loss(output: Any) -> Tensor:
    """The output's own loss, or a fixed random projection of all that has a gradient."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise ValueError("no tensor that the model returns has a gradient")
    generator = torch.Generator().manual_seed(SEED)
    parts = []
    for tensor in tensors:
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        weights = torch.randn(flat.shape, generator=generator).to(flat.device)
        parts.append((flat.float() * weights).sum() / math.sqrt(max(flat.numel(), 1)))
    return torch.stack([p.to(parts[0].device) for p in parts]).sum()
