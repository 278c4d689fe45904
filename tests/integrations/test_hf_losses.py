"""Hugging Face Trainer whose loss, outside the model, DropITCallback packs too."""

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
import transformers
from test_integrations_hf import gpt2, losses, readers, trainer
from torch import Tensor

from dropit_fx.integrations.hf import DropITCallback


def weighed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)


KINDS = {"function": "compute_loss_func", "smoother": "label_smoother"}


def made(folder: Path, kind: str, callback: DropITCallback | None) -> transformers.Trainer:
    options = {"label_smoothing_factor": 0.1} if kind == "smoother" else {}
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


def test_a_loss_inside_the_model_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    refused = trainer(model, tmp_path, DropITCallback(compile_loss=True))
    with pytest.raises(RuntimeError, match=r"computed in the model.*Leave out compile_loss"):
        refused.train()
    assert model._compiled_call_impl is None
