"""Hugging Face ``Trainer``: ``Trainer(..., callbacks=[FreezeCallback(0.8)])`` freezes layers.

By itself, or behind ``DropITCallback`` in the list of callbacks, which then needs ``variants=``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from dropit_fx.schedule import FreezeScheduler

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dropit_fx.integrations.hf_freeze needs the package"
        f" {error.name} (pip install 'dropit-fx[hf]')",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

KEY = "dropit_fx_freeze"  # of the schedule in trainer_state.json


class FreezeCallback(TrainerCallback):
    """Runs a ``FreezeScheduler`` from the first step of ``train()`` to its end.

    Checkpoints hold the schedule, in their ``trainer_state.json``: a resumed run goes on with it.
    On several ranks, ``ddp_find_unused_parameters=True`` is needed.

    Args:
        rate: Share of the layers that a step freezes at least, in [0, 1).
        **options: Of ``FreezeScheduler``, but for `optimizer`; `example_kwargs`, a small batch as
            the model takes it, weighs the layers in bytes.

    Attributes:
        scheduler: The schedule; None before the first step.

    Raises:
        ValueError: In the first step: as ``FreezeScheduler`` says.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        self.scheduler: FreezeScheduler | None = None
        self._rate, self._options, self._starts = rate, options, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new schedule, or that of the checkpoint, is to begin with the first step."""
        self._starts = True

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Makes the schedule: now the model is compiled where it is to be."""
        assert model is not None
        if not self._starts:
            return
        self.scheduler, self._starts = FreezeScheduler(model, self._rate, **self._options), False
        stored: Any = state.stateful_callbacks
        if KEY in stored:
            self.scheduler.load_state_dict(stored[KEY])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes what the optimiser is about to change."""
        assert self.scheduler is not None
        self.scheduler.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freezes the layers of the next step."""
        assert self.scheduler is not None
        self.scheduler.after_step()
        stored: Any = state.stateful_callbacks
        stored[KEY] = self.scheduler.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Thaws all layers."""
        if self.scheduler is not None:
            self.scheduler.remove()
