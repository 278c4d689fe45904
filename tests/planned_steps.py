"""What the tests of the planner measure: the peak of a real step, all that is there counted."""

from typing import Any

from torch import Tensor, nn

from dropit_fx import measure
from dropit_fx.holders import tensors_in
from dropit_fx.planner.step import Step


def resident(step: Step) -> int:
    """Bytes of the model and its inputs, each storage once."""
    held = [*step.model.parameters(), *step.model.buffers()]
    tensors = [*held, *tensors_in((step.args, step.kwargs))]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def measured(step: Step, module: nn.Module) -> int:
    """The peak of a real step of ``module``, in bytes."""

    def run() -> Any:
        return step.loss_of(module(*step.args, **step.kwargs))

    return resident(step) + measure.peak_memory(run)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that training changes in a model, gradients among it."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    grads = {f"{n} grad": t.grad for n, t in held.items() if t.grad is not None}
    return {n: t.detach().clone() for n, t in (held | grads).items()}
