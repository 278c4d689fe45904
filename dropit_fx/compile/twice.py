"""A gradient that a compiled backward made has none itself: the error says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dropit_fx.private import COMPILED_BACKWARD, pytree
from dropit_fx.runtime.function import twice_refused


class _Final(torch.autograd.Function):
    """``apply(x)``: ``x``, a gradient that has none itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise twice_refused("torch.compile with backend='dropit'")


def _finally(grads: tuple[Any, ...], _: Any) -> tuple[Any, ...] | None:
    """A hook of a compiled backward; what it returns is in the place of the gradients."""
    if not torch.is_grad_enabled():  # no create_graph=True
        return None
    return tuple(_Final.apply(g) if isinstance(g, Tensor) and g.requires_grad else g for g in grads)


def _compiled_backwards(outputs: Any) -> Iterator[Any]:
    """The nodes of the backward that made ``outputs``, which may be views of what it made."""
    for out in pytree.tree_leaves(outputs):
        node = out.grad_fn if isinstance(out, Tensor) else None
        behind = () if node is None else (node, *(n for n, _ in node.next_functions))
        yield from [n for n in behind if n is not None and n.name() == COMPILED_BACKWARD][:1]


def refuse_twice(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, whose gradients refuse to be differentiated in our words, not PyTorch's."""

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        if torch.is_grad_enabled():
            for node in {id(n): n for n in _compiled_backwards(outputs)}.values():
                node.register_hook(_finally)
        return outputs

    return run
