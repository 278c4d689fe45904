"""Hugging Face Trainer with FreezeCallback: what trains, what a resumed run does, and compiled."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from dropit_fx.integrations.hf import DropITCallback
from dropit_fx.integrations.hf_freeze import KEY, FreezeCallback

ROWS = [
    {"input_ids": torch.arange(n, n + 12) % 32, "labels": torch.tensor(n % 2)} for n in range(64)
]
BATCH: dict[str, Any] = {k: torch.stack([row[k] for row in ROWS[:2]]) for k in ROWS[0]}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=32, intermediate_size=64, max_position_embeddings=12, **sizes)
    )


def train(
    folder: Path, *callbacks: transformers.TrainerCallback, resume: bool = False, **options: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    arguments = TrainingArguments(**settings | options)
    made = Trainer(bert(), arguments, train_dataset=ROWS, callbacks=list(callbacks))
    made.remove_callback(transformers.PrinterCallback)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return made


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_a_resumed_run_has_the_losses_of_one_never_stopped(tmp_path: Path) -> None:
    whole = FreezeCallback(0.8, example_kwargs=BATCH)
    made = train(tmp_path, whole, lr_scheduler_type="linear", warmup_steps=2)
    resumed = FreezeCallback(0.8, example_kwargs=BATCH)
    again = train(tmp_path, resumed, resume=True, lr_scheduler_type="linear", warmup_steps=2)
    assert losses(again) == losses(made)
    assert whole.scheduler is not None
    assert resumed.scheduler is not None
    stored: list[Any] = [run.state.stateful_callbacks for run in (again, made)]
    assert stored[0][KEY] == stored[1][KEY]
    layers = len(whole.scheduler.nbytes)
    assert len(whole.scheduler.frozen) >= int(0.8 * layers)
    assert not any(name.startswith("classifier") for name in whole.scheduler.nbytes)
    assert all(p.requires_grad for p in made.model.parameters())


def test_packed_there_are_no_more_graphs_than_sets(tmp_path: Path) -> None:
    packing, freezing = DropITCallback(), FreezeCallback(0.5, variants=4, example_kwargs=BATCH)
    train(tmp_path, freezing, packing, max_steps=24, save_strategy="no")
    assert freezing.scheduler is not None
    assert 1 <= len(packing._compiled) <= len(freezing.scheduler.sets) <= 4
