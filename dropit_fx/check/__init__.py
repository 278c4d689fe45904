"""Is a model packed rightly? ``check`` compares it with itself, dense, on the user's own inputs.

The dense model and rewritten ones take the same steps from the same seed. What must be equal is
compared bit by bit, or to rounding where a compiler rounds otherwise; what a lossy format costs in
the gradient is shown. Each step runs in an ``untouched`` block, and leaves the model as it was.

May be imported from here: ``check``, ``Check``, ``BACKENDS``, and ``compare`` (what a gradient
loses).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from dropit_fx.check.checker import BACKENDS, Backend, Checker, surroundings
from dropit_fx.check.found import Check, Finding, GradientError
from dropit_fx.check.step import Task
from dropit_fx.config import Config, ConfigError, make_config, refuse_backprop
from dropit_fx.loss import default_loss

__all__ = ["BACKENDS", "Check", "Finding", "GradientError", "check"]


def check(
    model: nn.Module,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    preset: str | None = None,
    backend: Backend = "transform",
    loss: Callable[[Any], Tensor] | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Check:
    """Checks on a model and inputs of one's own that packing changes what it must and no more.

    The model runs a few training steps, dense and rewritten, in the mode that it is in and under
    the caller's autocast. It fails where:

    * the model cannot be captured, or a step raises an error (the text says which);
    * the dense model does not repeat itself from the same seed, so that nothing can be compared;
    * in two calls from one seed, outputs or buffers have other bits than dense's: so dropout has to
      draw dense's masks;
    * an output differs from call to call in dense and not in the rewritten model;
    * with every format made exact, a gradient has other bits than dense's; or, where values or
      logits are made again in the backward (``derive``, ``loss_classes``), differs by more than
      rounding;
    * a parameter has a gradient that no rule of the config trains (``train: false``, ``bias``; what
      such rules change is not compared with dense);
    * the report's bytes are not those that are measured;
    * an output, the loss or a gradient is not finite where dense's is.

    Rounding is a relative error of 1e-4 in float32 and 3e-2 in 16 bits, of the whole and, measured
    against the root mean square of all gradients, of each tensor. It counts in the place of equal
    bits with ``backend="dropit"``, where the dense model does not repeat its own bits, and for
    outputs where a loss is computed with its layer (``loss_classes``); logits that ``drop_logits``
    makes None are named, and do not fail. What the formats of the config lose in the gradient is
    shown and does not fail.

    Args:
        model: Any module; afterwards it is what it was: values, gradients, modes, attributes,
            random states. Meanwhile there is a copy of its parameters.
        example_args: Positional inputs: real ones, on the model's device.
        example_kwargs: Keyword inputs.
        config: As for ``transform``.
        preset: As for ``transform``.
        backend: ``"transform"``, or one of the plug-in's: ``"dropit_eager"``, ``"dropit"``. These
            two forget what else ``torch.compile`` has compiled, so that it is compiled again.
        loss: From the model's output to a scalar. Default: its ``loss`` if it has one, otherwise
            a fixed random projection of everything in it that has a gradient.
        progress: Called with what is done next, for people who wait.

    Returns:
        The findings; ``bool(check)`` is the verdict, ``print(check)`` shows both.

    Raises:
        ConfigError: The config cannot mean anything, or there is no such backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"no backend {backend!r}. Choose one of: {', '.join(BACKENDS)}.")
    settled = make_config(config, preset=preset)
    refuse_backprop(
        settled, "it changes gradients, and check compares them. Leave it out for check"
    )
    task = Task(model, tuple(example_args), dict(example_kwargs or {}), loss or default_loss)
    checker = Checker(task, settled, backend, progress)
    with surroundings(backend):
        checker.run()
    return checker.result()
