"""What a rewritten model was made of, so far as it can be told without keeping any of it alive."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.capture.fake import fake_mode_of
from dropit_fx.config import Config
from dropit_fx.private import pytree


@dataclass(frozen=True)
class Blank:
    """What a fake tensor is, in plain data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(x: Tensor) -> Blank:
        """Of a tensor, fake or not."""
        return Blank(tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad)

    def made(self) -> Tensor:
        """Memory of that layout; fake in a mode for fake tensors."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)

    def zeros(self) -> Tensor:
        """The same, of zeros."""
        return self.made().detach().zero_().requires_grad_(self.requires_grad)


class Alive:
    """``Alive(module)()``: the module, or None where nothing else holds it; copies have None."""

    def __init__(self, module: nn.Module) -> None:
        self._ref = weakref.ref(module)

    def __call__(self) -> Any:
        """The module, or None."""
        return self._ref()

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


@dataclass(frozen=True)
class Origin:
    """What ``transform`` was given: nothing is kept alive by it, and copies do not have it.

    Attributes:
        model: None where it is gone.
        blanks: The example's arguments, positional ones and keywords, without their values.
        config: As it was resolved.
    """

    model: Alive
    blanks: Any
    config: Config

    @staticmethod
    def of(model: nn.Module, args: Any, kwargs: Any, config: Config) -> Origin:
        """Of the arguments of ``transform``."""
        blanks = pytree.tree_map_only(Tensor, Blank.of, (args, dict(kwargs)))
        return Origin(Alive(model), blanks, config)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of zeros."""
        args, kwargs = pytree.tree_map_only(Blank, Blank.zeros, self.blanks)
        return args, kwargs

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


def fakes(blanks: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fake tensors, all of one mode, in the places of their descriptions."""
    with fake_mode_of(()):
        found: tuple[Any, ...] = pytree.tree_map_only(Blank, Blank.made, blanks)
    return found
