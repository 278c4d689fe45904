"""Lightning: a compiled or rewritten ``LightningModule`` trains as it is; its bytes are logged.

model = torch.compile(LitModel(), backend="dropit")  # or transform() of a network inside it
Trainer(callbacks=[LogSavedBytes(), FreezeLayers(0.8)]).fit(model)
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.measure import Watch
from dropit_fx.private import compiled_for_lightning, shows_saved
from dropit_fx.report.rows import report
from dropit_fx.schedule import FreezeScheduler

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dropit_fx.integrations.lightning needs the package lightning"
        " (pip install 'dropit-fx[lightning]')",
        name=error.name,
    ) from error

log = logging.getLogger(__name__)


class LogSavedBytes(Callback):
    """Logs what a training batch saves for the backward, dense and packed.

    After the first batch of ``fit``, its bytes go to the loggers of the ``Trainer`` and into
    ``trainer.callback_metrics``: ``saved_bytes``, what autograd held when the loss was there, the
    loss included, as measured; ``saved_bytes_dense`` and ``saved_bytes_packed``, the sums over the
    graphs that the plug-in has compiled since ``fit`` began, and over the submodules that
    ``transform`` has rewritten. Each rank measures its own; loggers write those of rank 0.

    Attributes:
        saved_bytes: Dense and packed; None before the first batch.
        measured: What autograd held of the first batch; None before it.
    """

    def __init__(self) -> None:
        self.saved_bytes: tuple[int, int] | None = None
        self.measured: int | None = None
        self._before = 0
        self._watch: Watch | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what was compiled before."""
        self._before, self.saved_bytes = len(compiled_graphs()), None
        self._watch = self.measured = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes what is there before the first batch is computed."""
        if self.saved_bytes is None and shows_saved():
            self._watch = Watch()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Measures the first batch."""
        if self._watch is not None:
            self.measured, self._watch = self._watch.saved_bytes(loss), None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs, once."""
        if self.saved_bytes is not None:
            return
        graphs = compiled_graphs()[self._before :]
        dense = sum(graph.report.dense_bytes for graph in graphs)
        packed = sum(graph.saved_bytes for graph in graphs)
        try:
            rewritten = report(pl_module)
        except ValueError:
            if not graphs:
                log.warning(
                    "nothing is packed: compile the LightningModule with backend='dropit', or"
                    " rewrite a network inside it with dropit_fx.transform"
                )
        else:
            dense, packed = dense + rewritten.dense_bytes, packed + rewritten.kept_bytes
        self.saved_bytes, self._watch = (dense, packed), None
        logs = {"saved_bytes_dense": dense, "saved_bytes_packed": packed}
        logs |= {} if self.measured is None else {"saved_bytes": self.measured}
        pl_module.log_dict({name: float(count) for name, count in logs.items()})


class FreezeLayers(Callback):
    """Runs a ``FreezeScheduler`` around the steps of the optimiser of a ``LightningModule``.

    From the start of training to its end; checkpoints hold the schedule. On several ranks, the
    strategy is ``"ddp_find_unused_parameters_true"``.

    Args:
        rate: Share of the layers that a step freezes at least, in [0, 1).
        **options: Of ``FreezeScheduler``, but for `optimizer`.

    Attributes:
        scheduler: The schedule; None before training.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        self.scheduler: FreezeScheduler | None = None
        self._rate, self._options = rate, options
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the schedule, or goes on with that of the checkpoint.

        Raises:
            ValueError: There is not one optimiser, the module is compiled and `variants` is not
                given, or as ``FreezeScheduler`` says.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"FreezeLayers follows one optimizer, and there are {len(trainer.optimizers)}."
                " Make a FreezeScheduler in the LightningModule, for the model of one of them."
            )
        if compiled_for_lightning(pl_module) and not self._options.get("variants"):
            raise ValueError(
                "the LightningModule is compiled, with a graph for each set of layers that train"
                " together. Give FreezeLayers variants=, the most of such sets."
            )
        (optimizer,) = trainer.optimizers
        self.scheduler = FreezeScheduler(
            pl_module, self._rate, optimizer=optimizer, **self._options
        )
        if self._loaded is not None:
            self.scheduler.load_state_dict(self._loaded)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaws all layers."""
        if self.scheduler is not None:
            self.scheduler.remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Thaws all layers, where an error ends the training."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The schedule, for a checkpoint."""
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the schedule of a checkpoint until training starts."""
        self._loaded = state_dict or None
