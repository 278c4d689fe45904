"""Models by name: ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, ``pkg.module:factory``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.capture import example_inputs
from dropit_fx.capture.fake import fake_mode_of
from dropit_fx.capture.provenance import first_line
from dropit_fx.private import pytree
from dropit_fx.words import closest

LIBRARIES = ("timm", "torchvision", "hf")
TOKENS = 128  # of a text, where no size is given

# heads of Hugging Face models, the first that there is: all compute a loss from labels
HEADS = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}

# what a training script sets, where a config leaves it open: no cache of keys is returned, and the
# first step with labels does not write what they are into the config
TRAINING = {
    "use_cache": False,
    "problem_type": "single_label_classification",
    "decoder_start_token_id": 0,
}

Inputs = example_inputs.Inputs


class SpecError(ValueError):
    """A spec of a model or device that names nothing; the message says what there is instead."""


def build(spec: str, batch: int, size: int | None = None) -> tuple[nn.Module, tuple[Any, ...]]:
    """As :func:`build_step`, for what takes positional inputs only."""
    model, args, kwargs = build_step(spec, batch, size)
    if kwargs:
        raise SpecError(f"{spec} takes keyword inputs: let it return (module, example_args)")
    return model, args


def build_step(
    spec: str, batch: int, size: int | None = None, fake: bool = False
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Makes a model with random weights, in training mode, and inputs for it.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` (a kind of model such as ``gpt2``, or
            a folder with its ``config.json``), or ``pkg.module:factory``. The factory is called
            without arguments and returns a module, ``(module, example_args)``, or
            ``(module, example_kwargs)``.
        batch: Length of the inputs' first dimension.
        size: Height and width of image inputs, length of a text of ``hf:``; None: what the model
            tells (224 where it does not; 128 tokens).
        fake: Whether the inputs are fake tensors, which take no memory.

    Returns:
        The model, its positional and its keyword inputs.

    Raises:
        SpecError: There is no such model, it cannot be made, or its inputs take too much memory.
        CaptureError: The shapes of a factory's inputs cannot be guessed.
    """
    library, colon, name = spec.partition(":")
    if not colon or not name or not library:
        raise SpecError(
            f"{spec!r} is no model: write timm:NAME, torchvision:NAME, hf:NAME or pkg.mod:factory"
        )
    with_inputs = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}
    inputs: Callable[[int], Inputs]
    if library in with_inputs:
        model, inputs = with_inputs[library](name, size)
    else:
        model, inputs = _from_factory(library, name, size)
    try:
        with fake_mode_of(()) if fake else nullcontext():
            args, kwargs = inputs(batch)
    except (RuntimeError, TypeError, OverflowError) as error:  # of sizes beyond int64 too
        raise SpecError(f"no inputs of a batch of {batch}: {first_line(error)}") from error
    return model.train(), args, kwargs


def in_dtype(model: nn.Module, inputs: Any, dtype: torch.dtype) -> Any:
    """Casts a model in place, and its inputs: those that are floating-point numbers."""
    model.to(dtype)

    def cast(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return pytree.tree_map_only(Tensor, cast, inputs)


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


def _timm(name: str, size: int | None) -> tuple[nn.Module, Callable[[int], Inputs]]:
    timm = _imported("timm", "demo")
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise SpecError(f"timm has no model {name!r}.{closest(name, known, 3)}")
    try:
        model = timm.create_model(name, **({} if size is None else {"img_size": size}))
    except TypeError:  # a convolutional model takes any size
        model = timm.create_model(name)
    except Exception as error:  # each model says in its own way that a size does not fit
        raise SpecError(f"timm:{name} with --size {size}: {first_line(error)}") from error
    return model, _images(model, size)


def _torchvision(name: str, size: int | None) -> tuple[nn.Module, Callable[[int], Inputs]]:
    models = _imported("torchvision", "").models
    if name not in models.list_models():
        raise SpecError(
            f"torchvision has no model {name!r}.{closest(name, models.list_models(), 3)}"
        )
    no_weights = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        no_weights["weights_backbone"] = None
    model = models.get_model(name, **no_weights)
    return model, _images(model, size)


def _images(model: nn.Module, size: int | None) -> Callable[[int], Inputs]:
    channels, side = _image(model)
    side = size or side
    return lambda batch: ((torch.randn(batch, channels, side, side),), {})


def _hugging_face(name: str, size: int | None) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A model of transformers as its config makes it, with its loss: labels are among its inputs.

    Nothing is downloaded for the name of a kind of model.
    """
    transformers = _imported("transformers", "hf")
    kinds = tuple(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    try:
        if name in kinds:
            config = transformers.AutoConfig.for_model(name)
        else:
            config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # also of the network
        raise SpecError(
            f"transformers has no kind of model {name!r}, and it is no folder with a"
            f" config.json.{closest(name, kinds, 3)}"
        ) from error
    for key, value in TRAINING.items():
        if getattr(config, key, None) in (None, True):
            setattr(config, key, value)
    if size is not None and hasattr(config, "image_size"):
        config.image_size = size
    able = (head for head, kinds in HEADS.items() if type(config) in getattr(transformers, kinds))
    head = next(able, None)
    if head is None:
        raise SpecError(
            f"hf:{name} is made by none of {', '.join(HEADS)}: write a factory, pkg.mod:factory"
        )
    try:
        model = getattr(transformers, head).from_config(config)
    except Exception as error:  # each model says in its own way that a config does not fit
        raise SpecError(f"hf:{name}: {first_line(error)}") from error

    def inputs(batch: int) -> Inputs:
        if model.main_input_name == "input_ids":
            words = config.get_text_config().vocab_size
            tokens = torch.randint(words, (batch, size or TOKENS))
            return (), {"input_ids": tokens, "labels": tokens.clone()}
        channels, side = _image(model)
        side = getattr(config, "image_size", None) or size or side
        pixels = torch.randn(batch, channels, *([side] * 2 if isinstance(side, int) else side))
        labels = torch.zeros(batch, dtype=torch.long)
        return (), {model.main_input_name: pixels, "labels": labels}

    return model, inputs


def _from_factory(
    module_name: str, name: str, size: int | None
) -> tuple[nn.Module, Callable[[int], Inputs]]:
    spec = f"{module_name}:{name}"
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise
        hint = closest(module_name, LIBRARIES, 3)
        raise SpecError(f"no module {error.name!r} to import {name!r} from.{hint}") from error
    except Exception as error:  # the user's code ran: anything can be raised
        raise SpecError(f"importing {module_name} raised {first_line(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = [n for n, value in vars(module).items() if callable(value)]
        raise SpecError(
            f"module {module_name!r} has no function {name!r}.{closest(name, callables, 3)}"
        )
    if wanted := _required(factory):
        raise SpecError(f"{spec} is called without arguments, and requires {', '.join(wanted)}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise SpecError(f"{spec} raised {first_line(error)}") from error
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    legal = given is None or isinstance(given, tuple | list | Mapping)
    if not isinstance(model, nn.Module) or not legal:
        raise SpecError(
            f"{spec} returned {type(made).__name__}; a module was expected, or"
            " (module, example_args)"
        )
    if given is None:
        args, kwargs = example_inputs.guess(model)
    elif isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    else:
        args, kwargs = tuple(given), {}

    def inputs(batch: int) -> Inputs:
        resized: Inputs = pytree.tree_map_only(
            Tensor, lambda t: _resized(t, batch, size), (args, kwargs)
        )
        return resized

    return model, inputs


def _required(factory: Callable[..., Any]) -> list[str]:
    """The arguments that it cannot be called without."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-ins do not tell
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


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
