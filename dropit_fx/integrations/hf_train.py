"""The end of ``Trainer.train()``, which tells its callbacks nothing where an error ends it."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer, TrainerCallback


class UndoneCallback(TrainerCallback):
    """A callback whose :meth:`undo` runs whenever a ``train()`` that it is part of has ended.

    ``Trainer.train`` is wrapped for that, once in a process, when the first of them is made.
    """

    def __init__(self) -> None:
        usual = Trainer.train
        if getattr(usual, "undoes", False):
            return

        @functools.wraps(usual)
        def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            try:
                return usual(self, *args, **kwargs)
            finally:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, UndoneCallback):
                        callback.undo()

        vars(train)["undoes"] = True
        Trainer.train = train  # type: ignore[method-assign]

    def undo(self) -> None:
        """Makes everything what it was before ``train()``; runs again where that was done."""
        raise NotImplementedError
