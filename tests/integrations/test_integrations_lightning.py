"""Lightning trains compiled and rewritten modules; the callback logs what they save."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dropit_fx
from dropit_fx import measure
from dropit_fx.integrations.lightning import FreezeLayers, LogSavedBytes

X, Y = torch.randn(128, 64), torch.randint(0, 4, (128,))


class Lit(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 4)
    )


def fit(
    model: Any, folder: Path, callback: pl.Callback, epochs: int = 3, resume: Path | None = None
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=1,
    )
    batches = DataLoader(TensorDataset(X, Y), batch_size=32)
    trainer.fit(model, batches, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("way", ["compiled", "rewritten"])
def test_bytes_are_logged_and_the_loss_falls(way: str, tmp_path: Path) -> None:
    net = network()
    dense = measure.saved_bytes(net, X[:32])
    if way == "compiled":
        lit: Any = Lit(net)
        model = torch.compile(lit, backend="dropit_eager", options={"preset": "gact"})
    else:
        model = lit = Lit(dropit_fx.transform(net, preset="gact", example_args=(X[:32],)))
    callback = LogSavedBytes()
    trainer = fit(model, tmp_path, callback)
    assert callback.saved_bytes is not None
    told, packed = callback.saved_bytes
    if way == "rewritten":
        assert told == dense
        assert packed == measure.saved_bytes(lit.net, X[:32])
        held = measure.saved_bytes(lambda: F.cross_entropy(lit.net(X[:32]), Y[:32]))
        # its loss is outside of the network; Lightning divides it by a number
        assert callback.measured == pytest.approx(held, abs=64)
        assert held > packed
    else:
        assert callback.measured == pytest.approx(packed, abs=64)
    assert packed < 0.25 * told
    assert trainer.callback_metrics["saved_bytes_packed"] == packed
    assert trainer.callback_metrics["saved_bytes"] == callback.measured
    assert "saved_bytes_packed" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert sum(lit.losses[-4:]) < 0.8 * sum(lit.losses[:4])


def test_lossless_training_has_the_losses_of_dense(tmp_path: Path) -> None:
    runs = []
    for compiled in (False, True):
        lit: Any = Lit(network())
        options = {"backend": "dropit_eager", "options": {"preset": "lossless"}}
        model = torch.compile(lit, **options) if compiled else lit
        fit(model, tmp_path / str(compiled), LogSavedBytes())
        runs.append(lit.losses)
    assert runs[0] == runs[1]


def test_a_checkpoint_of_a_rewritten_network_loads_into_a_dense_one(tmp_path: Path) -> None:
    lit = Lit(dropit_fx.transform(network(), example_args=(X[:32],)))
    trainer = fit(lit, tmp_path, LogSavedBytes())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Lit.load_from_checkpoint(tmp_path / "last.ckpt", net=network())
    assert torch.equal(loaded.eval()(X), lit.eval()(X))


def test_a_module_that_nothing_packs_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dropit_fx"):
        callback = LogSavedBytes()
        fit(Lit(network()), tmp_path, callback)
    assert callback.saved_bytes == (0, 0)
    assert "nothing is packed" in caplog.text


def test_frozen_layers_take_turns_and_a_resumed_run_has_the_losses_of_one_never_stopped(
    tmp_path: Path,
) -> None:
    def run(name: str, epochs: int, resume: Path | None = None) -> tuple[Lit, pl.Trainer]:
        lit = Lit(dropit_fx.transform(network(), example_args=(X[:32],)))
        callback = FreezeLayers(0.5, example_args=(X[:32],))
        trainer = fit(lit, tmp_path / name, callback, epochs, resume)
        assert callback.scheduler is not None
        assert len(callback.scheduler.frozen) >= 1
        assert all(p.requires_grad for p in lit.parameters())
        updates.append(callback.scheduler.state_dict())
        return lit, trainer

    updates: list[dict[str, Any]] = []
    whole, _ = run("whole", 4)
    _, half = run("half", 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run("resumed", 4, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[8:]
    assert updates[0] == updates[2] != updates[1]


class Fails(Lit):
    def on_train_batch_end(self, *args: Any) -> None:
        assert not all(p.requires_grad for p in self.parameters())
        raise ValueError("not today")


def test_a_run_that_fails_ends_with_all_layers_thawed(tmp_path: Path) -> None:
    model = Fails(network())
    with pytest.raises(ValueError, match="not today"):
        fit(model, tmp_path, FreezeLayers(0.6))
    assert all(p.requires_grad for p in model.parameters())


def test_a_compiled_module_needs_a_bound_on_its_graphs(tmp_path: Path) -> None:
    model = torch.compile(Lit(network()), backend="dropit_eager")
    with pytest.raises(ValueError, match="Give FreezeLayers variants="):
        fit(model, tmp_path, FreezeLayers(0.5))
