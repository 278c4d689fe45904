"""Lightning: a compiled or rewritten ``LightningModule`` trains as it is; its bytes are logged.

model = torch.compile(LitModel(), backend="dropit")  # or transform() of a network inside it
Trainer(callbacks=[LogSavedBytes()]).fit(model)
"""

from __future__ import annotations

import logging
from typing import Any

from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.report.rows import report

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

    After the first batch of ``fit``, ``saved_bytes_dense`` and ``saved_bytes_packed`` go to the
    loggers of the ``Trainer`` and into ``trainer.callback_metrics``: the sums over the graphs that
    the plug-in has compiled since ``fit`` began, and over the submodules that ``transform`` has
    rewritten. Each rank logs its own.

    Attributes:
        saved_bytes: Dense and packed; None before the first batch.
    """

    def __init__(self) -> None:
        self.saved_bytes: tuple[int, int] | None = None
        self._before = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what was compiled before."""
        self._before, self.saved_bytes = len(compiled_graphs()), None

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
        self.saved_bytes = dense, packed
        pl_module.log_dict({"saved_bytes_dense": float(dense), "saved_bytes_packed": float(packed)})
