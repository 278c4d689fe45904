"""The training step that is planned: a model, its inputs, the loss and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dropit_fx.holders import tensors_in
from dropit_fx.loss import default_loss
from dropit_fx.measure import leaving_no_trace, without_gradients
from dropit_fx.planner.errors import PlanError
from dropit_fx.private import pytree


@dataclass(frozen=True)
class Step:
    """One training step: ``optimizer`` moves what the backward of ``loss(model(...))`` gives.

    Attributes:
        model: In the mode in which it trains.
        args: Positional inputs: real ones, on the model's device.
        kwargs: Keyword inputs.
        loss: From the model's output to a scalar; None: ``dropit_fx.loss.default_loss``.
        optimizer: Over the model's parameters; None: none, the step ends with the gradients.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] | None = None
    optimizer: Optimizer | None = None

    def loss_of(self, output: Any) -> Tensor:
        """What is differentiated.

        Raises:
            PlanError: It is no scalar, or nothing in it has a gradient.
        """
        try:
            loss: Any = (default_loss if self.loss is None else self.loss)(output)
        except ValueError as error:
            if self.loss is None:
                raise PlanError(f"{_NOTHING}: {error}") from error
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PlanError(f"loss= takes the model's output to a scalar tensor, not to {what}")
        if not loss.requires_grad:
            raise PlanError(f"{_NOTHING}: the loss depends on no parameter that is trained")
        return loss

    def trained(self, given: Any) -> list[Tensor]:
        """The tensors whose gradients count, of a run with ``given`` args and kwargs."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def real(self) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
        """For the time of a real run: gradients on, and all that it leaves is put back.

        Yields the inputs: tensors that share memory with those given, and have no gradient yet.
        """
        given: Any = pytree.tree_map_only(
            Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (self.args, self.kwargs)
        )
        with leaving_no_trace(), without_gradients(self.model.parameters()):
            yield given


class GraphStep(Step):
    """The step of a graph whose parameters are among its inputs, as Dynamo hands them over."""

    def trained(self, given: Any) -> list[Tensor]:
        """All inputs with a gradient: what is before the graph gets its gradient from theirs."""
        return [*super().trained(given), *(t for t in tensors_in(given) if t.requires_grad)]


def device_of(step: Step) -> torch.device:
    """Where a step runs: the device of its first tensor; the CPU's where there is none."""
    tensors = [*step.model.parameters(), *tensors_in((step.args, step.kwargs))]
    return tensors[0].device if tensors else torch.device("cpu")


_NOTHING = "there is no backward to keep anything for"
