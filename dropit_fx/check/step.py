"""One step: two calls from one seed, the first with its backward, and what they leave."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.loss import SEED
from dropit_fx.private import pytree


@dataclass
class Task:
    """What is run: the model, its inputs, and the loss."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor]

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies: a model may write into what it is given."""

        def copied(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().clone().requires_grad_(x.requires_grad)

        given: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
            copied, (self.args, self.kwargs)
        )
        return given


@dataclass
class Seen:
    """What two calls and a backward leave."""

    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    loss: float = math.nan
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def _seed() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)


def take_step(task: Task, runs: Callable[..., Any], owner: nn.Module) -> Seen:
    """Two calls from one seed, the first with its backward; leaves all in the model.

    Args:
        task: Of which the model holds the parameters.
        runs: What is called.
        owner: The module that holds the buffers.
    """
    seen = Seen()
    args, kwargs = task.inputs()
    task.model.zero_grad(set_to_none=True)
    _seed()
    output = runs(*args, **kwargs)
    seen.outputs.append(_by_path(output))
    value = task.loss(output)
    if value.numel() != 1:
        raise ValueError(f"the loss has {value.numel()} elements: it must be a scalar")
    seen.loss = float(value.detach())
    torch.autograd.backward([value])
    del output, value
    seen.gradients = {n: p.grad for n, p in task.model.named_parameters() if p.requires_grad}
    inputs = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    seen.gradients |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    seen.outputs.append(_by_path(runs(*task.inputs()[0], **task.inputs()[1])))
    buffers = dict(task.model.named_buffers()) | dict(owner.named_buffers())
    seen.buffers = {n: b.detach().clone() for n, b in buffers.items()}
    task.model.zero_grad(set_to_none=True)
    return seen


def _by_path(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by their places in it: one that is None moves no other."""
    try:
        leaves = [(pytree.keystr(p), leaf) for p, leaf in pytree.tree_flatten_with_path(output)[0]]
    except ValueError:  # a container that names no parts, as diffusers' outputs
        leaves = [(str(at), leaf) for at, leaf in enumerate(pytree.tree_leaves(output))]
    return {n or "0": leaf.detach().clone() for n, leaf in leaves if isinstance(leaf, Tensor)}
