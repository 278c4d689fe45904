"""Models by name: ``timm:NAME``, ``torchvision:NAME``, ``pkg.module:factory``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.capture import example_inputs
from dropit_fx.private import pytree
from dropit_fx.words import closest

LIBRARIES = ("timm", "torchvision")


class SpecError(ValueError):
    """A spec of a model or device that names nothing; the message says what there is instead."""


def build(spec: str, batch: int, size: int | None = None) -> tuple[nn.Module, tuple[Any, ...]]:
    """Makes a model with random weights, in training mode, and inputs for it.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, or ``pkg.module:factory``. The factory is called
            without arguments and returns a module, or ``(module, example_args)``.
        batch: Length of the inputs' first dimension.
        size: Height and width of image inputs; None: what the model tells (224 where it does not).

    Returns:
        The model and its positional inputs.

    Raises:
        SpecError: There is no such model, or the factory returns something else.
        CaptureError: The shapes of a factory's inputs cannot be guessed.
    """
    library, colon, name = spec.partition(":")
    if not colon or not name or not library:
        raise SpecError(
            f"{spec!r} is no model: write timm:NAME, torchvision:NAME or pkg.mod:factory"
        )
    if library in LIBRARIES:
        model = _timm(name, size) if library == "timm" else _torchvision(name)
        channels, side = _image(model)
        side = size or side
        return model.train(), (torch.randn(batch, channels, side, side),)
    model, given = _from_factory(library, name)
    args, kwargs = example_inputs.guess(model) if given is None else (given, {})
    if kwargs:
        raise SpecError(f"{spec} takes keyword inputs: let it return (module, example_args)")
    return model.train(), pytree.tree_map_only(Tensor, lambda t: _resized(t, batch, size), args)


def small_net() -> tuple[nn.Module, tuple[Any, ...]]:
    """A small convolutional net with some of everything, for demonstrations: (module, inputs)."""
    model = nn.Sequential()
    for stage, (channels, width) in enumerate([(3, 32), (32, 64), (64, 128)]):
        model.add_module(f"conv{stage}", nn.Conv2d(channels, width, 3, padding=1, bias=False))
        model.add_module(f"norm{stage}", nn.BatchNorm2d(width))
        model.add_module(f"relu{stage}", nn.ReLU())
        model.add_module(f"pool{stage}", nn.MaxPool2d(2))
    flat = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.LayerNorm(2048)  # of images of any side
    head = nn.Linear(2048, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 10)
    model.add_module("head", nn.Sequential(*flat, *head))
    return model, (torch.randn(16, 3, 32, 32),)


def _timm(name: str, size: int | None) -> nn.Module:
    timm = _imported("timm", "demo")
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise SpecError(f"timm has no model {name!r}.{closest(name, known, 3)}")
    try:
        model: nn.Module = timm.create_model(name, **({} if size is None else {"img_size": size}))
    except TypeError:  # a convolutional model takes any size
        model = timm.create_model(name)
    return model


def _torchvision(name: str) -> nn.Module:
    models = _imported("torchvision", "").models
    if name not in models.list_models():
        raise SpecError(
            f"torchvision has no model {name!r}.{closest(name, models.list_models(), 3)}"
        )
    model: nn.Module = models.get_model(name, weights=None)
    return model


def _from_factory(module_name: str, name: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise
        hint = closest(module_name, LIBRARIES, 3)
        raise SpecError(f"no module {error.name!r} to import {name!r} from.{hint}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = [n for n, value in vars(module).items() if callable(value)]
        raise SpecError(
            f"module {module_name!r} has no function {name!r}.{closest(name, callables, 3)}"
        )
    made = factory()
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (given is None or isinstance(given, tuple | list)):
        raise SpecError(
            f"{module_name}:{name} returned {type(made).__name__}; a module was expected, or"
            " (module, example_args)"
        )
    return model, None if given is None else tuple(given)


def _imported(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        wanted = f"'dropit-fx[{extra}]'" if extra else name
        raise SpecError(f"{name} is not installed: pip install {wanted}") from error


def _image(model: nn.Module) -> tuple[int, int]:
    """Channels and side of the images that a model takes."""
    told = getattr(model, "pretrained_cfg", None) or {}
    _, side, _ = told.get("input_size") or (3, 224, 224)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return getattr(first, "in_channels", 3), side


def _resized(tensor: Tensor, batch: int, size: int | None) -> Tensor:
    """The same kind of input with ``batch`` rows, and ``size`` as its side if it is an image."""
    if tensor.dim() == 0:
        return tensor
    shape = [batch, *tensor.shape[1:]]
    if size is not None and tensor.dim() == 4:
        shape[2:] = [size, size]
    if tensor.is_floating_point():
        return torch.randn(shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
    rows = tensor[torch.arange(batch) % tensor.shape[0]]  # codes keep their range
    return rows.expand(shape)
