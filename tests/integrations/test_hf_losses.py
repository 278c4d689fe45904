"""Hugging Face Trainer whose loss, outside the model, DropITCallback packs too."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_integrations_hf import (
    VOCABULARY,
    counting,
    few_more,
    gpt2,
    losses,
    readers,
    trainer,
)
from torch import Tensor

from dropit_fx import measure
from dropit_fx.integrations.hf import DropITCallback


def weighed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)


KINDS = {"function": "compute_loss_func", "smoother": "label_smoother"}


def made(
    folder: Path, kind: str, callback: DropITCallback | None, **options: Any
) -> transformers.Trainer:
    options |= {"label_smoothing_factor": 0.1} if kind == "smoother" else {}
    out = trainer(gpt2(), folder, callback, **options)
    if kind == "function":
        out.compute_loss_func = weighed
    return out


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_outside_the_model_is_packed_and_put_back(
    tmp_path: Path, kind: str, preset: str
) -> None:
    dense = made(tmp_path, kind, None)
    dense.train()
    callback = DropITCallback(preset=preset, compile_loss=True)
    packed = made(tmp_path, kind, callback)
    usual = getattr(packed, KINDS[kind])
    packed.train()
    assert getattr(packed, KINDS[kind]) is usual
    if preset == "lossless":
        assert losses(packed) == losses(dense)
    else:
        assert losses(packed)[0][0] == losses(dense)[0][0]
    assert {"cross_entropy", "log_softmax"} & readers(callback)
    without = DropITCallback(preset=preset)
    made(tmp_path, kind, without).train()
    assert not {"cross_entropy", "log_softmax"} & readers(without)


def logged(made: transformers.Trainer) -> dict[str, Any]:
    """What is logged of a batch, once."""
    (entry,) = [entry for entry in made.state.log_history if "saved_bytes" in entry]
    assert "backward" not in vars(made.accelerator)
    return entry


BATCH = {"input_ids": torch.stack([row["input_ids"] for row in counting(4)])}
BATCH["labels"] = BATCH["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_what_a_batch_holds_is_measured_once_with_its_loss(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    found = []
    for compile_loss in (False, True):
        callback = DropITCallback(preset="balanced", compile_loss=compile_loss)
        trained = made(tmp_path, kind, callback, **options)
        trained.train()
        entry = logged(trained)
        assert entry["step"] == (0 if options else 1)  # the first batch of several in a step
        model = trained.model
        model.compile(backend="dropit_eager", options={"preset": "balanced"})
        loss = getattr(trained, KINDS[kind])
        if compile_loss:
            called = loss if kind == "function" else loss.__call__
            compiled = torch.compile(called, backend="dropit_eager", options={"preset": "balanced"})
            setattr(trained, KINDS[kind], compiled)
        held = measure.saved_bytes(lambda: trained.compute_loss(model, dict(BATCH)))  # noqa: B023
        assert entry["saved_bytes"] == few_more(held)
        found.append(entry)
    outside, inside = found
    # the logarithms of the loss lie outside of the model's graphs, and are measured there
    assert outside["saved_bytes"] > outside["saved_bytes_packed"] + 4 * 15 * VOCABULARY * 4
    assert inside["saved_bytes"] == few_more(inside["saved_bytes_packed"])
    assert inside["saved_bytes"] < outside["saved_bytes"]


@pytest.mark.parametrize("backend", ["dropit_eager", "dropit"])
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=str)
def test_what_is_measured_is_what_the_graphs_of_a_model_save(
    tmp_path: Path, backend: str, options: dict[str, Any]
) -> None:
    inner = {"inner": "aot_eager"} if backend == "dropit" else {}
    callback = DropITCallback(preset="balanced", backend=backend, options=inner)
    with torch.compiler.config.patch(force_disable_caches=True):
        trained = trainer(gpt2(), tmp_path, callback, **options)
        trained.train()
    entry = logged(trained)
    assert entry["saved_bytes"] == few_more(entry["saved_bytes_packed"])


def test_a_resumed_run_measures_its_own_first_batch(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    trainer(gpt2(), tmp_path, DropITCallback(), **saves, max_steps=2).train()
    resumed = trainer(gpt2(), tmp_path, DropITCallback(), **saves)
    resumed.train(resume_from_checkpoint=True)
    steps = [e["step"] for e in resumed.state.log_history if "saved_bytes" in e]
    assert steps == [1, 3]


class Fails(transformers.TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_behind_one_that_failed_ends_with_the_loss_as_it_was(tmp_path: Path) -> None:
    packed = made(tmp_path, "function", DropITCallback(compile_loss=True))
    packed.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        packed.train()
    assert packed.compute_loss_func is not weighed
    packed.remove_callback(Fails)
    packed.train()
    assert packed.compute_loss_func is weighed


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_behind_a_run_that_failed_is_the_usual_one(tmp_path: Path, kind: str) -> None:
    callback = DropITCallback(compile_loss=True)
    packed = made(tmp_path, kind, callback)
    usual = getattr(packed, KINDS[kind])
    packed.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        packed.train()
    graphs = len(callback._compiled)
    packed.compute_loss(gpt2(), dict(BATCH)).backward()
    assert getattr(packed, KINDS[kind]) is usual
    assert len(callback._compiled) == graphs


def test_a_loss_inside_the_model_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    refused = trainer(model, tmp_path, DropITCallback(compile_loss=True))
    with pytest.raises(RuntimeError, match=r"computed in the model.*Leave out compile_loss"):
        refused.train()
    assert model._compiled_call_impl is None
