"""Hugging Face Trainer with DropITCallback: what it trains, logs, saves and resumes.

The preset `lossless` is the oracle: its training is the one without the callback to the last bit,
dropout included.
"""

import builtins
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from dropit_fx import ConfigError, measure, pack_checkpoints
from dropit_fx.integrations import hf
from dropit_fx.integrations.hf import DropITCallback

VOCABULARY, LENGTH, BATCH = 16, 16, 4


def gpt2() -> GPT2LMHeadModel:
    """Two layers, with dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def counting(size: int = 64) -> list[dict[str, Tensor]]:
    """Rows that count up from anywhere, which is learned in a few steps."""
    starts = torch.randint(VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(0))
    rows = (starts + torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(
    model: nn.Module,
    folder: Path,
    callback: DropITCallback | None = None,
    kind: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    made = kind(
        model,
        TrainingArguments(**settings | options),
        train_dataset=counting(),
        callbacks=[callback] if callback else [],
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(made: Trainer) -> list[tuple[float, float]]:
    return [(e["loss"], e["grad_norm"]) for e in made.state.log_history if "loss" in e]


def few_more(nbytes: int) -> Any:
    """Equal but for scalars: Dynamo makes some constants, and Trainer passes one."""
    return pytest.approx(nbytes, abs=128)


def train(folder: Path, callback: DropITCallback | None = None, **options: Any) -> Trainer:
    made = trainer(gpt2(), folder, callback, **options)
    made.train()
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"activation_checkpointing": True},
    ],
    ids=["accumulation", "bf16", "checkpointing"],
)
def test_lossless_training_has_the_bits_of_training_without_the_callback(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    dense = train(tmp_path, **options)
    callback = DropITCallback(preset="lossless")
    packed = train(tmp_path, callback, **options)
    assert len(losses(dense)) == 4
    assert losses(packed) == losses(dense)
    weights = packed.model.state_dict()
    for name, value in dense.model.state_dict().items():
        assert torch.equal(weights[name], value), name
    (graph,) = callback.graphs
    assert any("bitmask" in row.codec for row in graph.report.rows)


def test_packed_training_learns_and_logs_what_it_saves(tmp_path: Path) -> None:
    callback = DropITCallback(preset="balanced")
    made = train(tmp_path, callback, max_steps=30)
    assert losses(made)[-1][0] < 0.8 * losses(made)[0][0]
    (logged,) = [entry for entry in made.state.log_history if "saved_bytes_dense" in entry]
    batch = {"input_ids": torch.stack([row["input_ids"] for row in counting(BATCH)])}
    batch["labels"] = batch["input_ids"]
    model = gpt2()
    assert logged["saved_bytes_dense"] == few_more(measure.saved_bytes(model, **batch))
    model.loss_type = "ForCausalLM"  # else it logs a warning, and is compiled as two graphs
    model.compile(backend="dropit_eager", options={"preset": "balanced"})
    assert logged["saved_bytes_packed"] == few_more(measure.saved_bytes(model, **batch))
    assert logged["saved_bytes_packed"] < 0.5 * logged["saved_bytes_dense"]
    assert logged["step"] == 1


class Heard(transformers.TrainerCallback):
    """What any callback that logs (TensorBoard's, W&B's) is handed, with the step."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("first", [False, True], ids=["before it", "behind it"])
def test_every_callback_is_told_the_saved_bytes_and_the_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: bool
) -> None:
    heard, packing = Heard(), DropITCallback(preset="balanced")
    made = trainer(gpt2(), tmp_path)
    for callback in (packing, heard) if first else (heard, packing):
        made.add_callback(callback)
    made.add_callback(transformers.PrinterCallback)
    made.train()
    (logged,) = [entry for entry in made.state.log_history if "saved_bytes_dense" in entry]
    ((step, told),) = [(n, logs) for n, logs in heard.logs if "saved_bytes_dense" in logs]
    assert told | {"step": step} == logged
    assert 0 < told["saved_bytes_packed"] < told["saved_bytes_dense"]
    assert [n for n, logs in heard.logs if "loss" in logs] == [1, 2, 3, 4]
    assert f"'saved_bytes_packed': {told['saved_bytes_packed']}" in capsys.readouterr().out


def test_a_second_trainer_is_not_told_what_the_first_saves(tmp_path: Path) -> None:
    heard = Heard()
    other = trainer(gpt2(), tmp_path)
    other.add_callback(heard)
    train(tmp_path, DropITCallback(preset="balanced"))
    assert not heard.logs


def test_compiled_graphs_log_what_their_partition_saves(tmp_path: Path) -> None:
    callback = DropITCallback(backend="dropit", options={"inner": "aot_eager"})
    with torch.compiler.config.patch(force_disable_caches=True):
        made = train(tmp_path, callback, bf16=True, activation_checkpointing=True)
    (graph,) = callback.graphs
    (logged,) = [entry for entry in made.state.log_history if "saved_bytes_dense" in entry]
    assert logged["saved_bytes_packed"] == graph.partitions[-1].saved_bytes > 0


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config for more words than the model is wide."""
    monkeypatch.setattr(sys.modules[__name__], "VOCABULARY", 256)
    return {"preset": "lossless", "loss_classes": 8}


def drops(callback: DropITCallback) -> bool:
    """Whether the logits of training steps are never whole."""
    (graph,) = callback.graphs
    return "fused" in {row.codec for row in graph.report.rows}


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_logits_that_nobody_reads_are_dropped_in_training_and_there_in_evaluation(
    tmp_path: Path, many: dict[str, Any], options: dict[str, Any]
) -> None:
    dense = losses(train(tmp_path, **options))
    callback = DropITCallback(many)
    made = train(tmp_path, callback, **options)
    assert drops(callback)
    near = 2e-2 if options else 1e-5
    assert losses(made) == [pytest.approx(pair, rel=near) for pair in dense]
    predicted = made.predict(counting(BATCH)).predictions
    assert predicted.shape == (BATCH, LENGTH, 256)


class CountsRightWords(Trainer):
    """As TRL's trainers do."""

    right = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        self.right += (outputs.logits.argmax(-1) == inputs["labels"]).sum().item()
        return loss


@pytest.mark.parametrize("kind", ["subclass", "by hand", "off", "smoothed"])
def test_logits_that_the_loop_may_read_stay(
    tmp_path: Path, many: dict[str, Any], kind: str
) -> None:
    callback = DropITCallback(many, drop_logits=False if kind == "off" else None)
    counts = CountsRightWords if kind == "subclass" else Trainer
    options = {"label_smoothing_factor": 0.1} if kind == "smoothed" else {}
    made = trainer(gpt2(), tmp_path, callback, counts, **options)
    if kind == "by hand":
        made.compute_loss = lambda model, inputs, **rest: model(**inputs)["loss"]
    made.train()
    assert len(losses(made)) == 4
    assert not drops(callback)
    assert kind != "subclass" or made.right >= 0


def test_logits_are_dropped_where_the_caller_says_so(tmp_path: Path, many: dict[str, Any]) -> None:
    for how in ({"drop_logits": True}, {"config": many | {"drop_logits": True}}):
        callback = DropITCallback(**{"config": many, **how})
        made = trainer(gpt2(), tmp_path, callback, max_steps=1)
        made.compute_loss = lambda model, inputs, **rest: model(**inputs)["loss"]
        made.train()
        assert drops(callback)


def test_the_model_stays_what_it_is(tmp_path: Path) -> None:
    model = gpt2()
    keys = list(model.state_dict())
    callback = DropITCallback()
    seen: list[Any] = []
    callback.on_save = lambda *args, model, **kwargs: seen.append(model._compiled_call_impl)
    made = trainer(model, tmp_path, callback, save_strategy="steps", save_steps=2, max_steps=2)
    made.train()
    assert made.model is model
    assert type(model) is GPT2LMHeadModel
    assert list(model.state_dict()) == keys
    assert seen[0] is not None
    assert model._compiled_call_impl is None
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-2")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("preset", ["lossless", "gact"])  # gact rounds stochastically
@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(
    tmp_path: Path, preset: str
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 30}
    whole = train(tmp_path / "whole", DropITCallback(preset=preset), max_steps=50)
    train(tmp_path / "parts", DropITCallback(preset=preset), max_steps=30, **saving)
    resumed = trainer(gpt2(), tmp_path / "parts", DropITCallback(preset=preset), max_steps=50)
    torch.rand(7)  # whatever the state is, the checkpoint has its own
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-30"))
    assert len(losses(whole)) == 50
    assert losses(resumed) == losses(whole)


class Killed(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 37:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_packed_checkpoints_train_and_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """In eager mode, without the callback; every loss of the forward is exact."""
    settings = {"activation_checkpointing": True, "max_steps": 50} | options
    dense = train(tmp_path / "dense", **settings)

    def packing(folder: str, **more: Any) -> tuple[Trainer, Any]:
        model = gpt2()
        packed = pack_checkpoints(model, bits=6)
        return trainer(model, tmp_path / folder, **settings | more), packed

    whole, packed = packing("whole")
    whole.train()
    assert packed.report().ratio < (0.39 if options else 0.21)
    assert losses(whole)[0][0] == losses(dense)[0][0]
    assert losses(whole)[-1][0] == pytest.approx(losses(dense)[-1][0], rel=0.1)
    assert losses(whole)[-1][0] < 0.8 * losses(whole)[0][0]
    parts, _ = packing("parts", save_strategy="steps", save_steps=30)
    parts.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    resumed, _ = packing("parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-30"))
    assert len(losses(whole)) == 50
    assert losses(resumed) == losses(whole)


def test_stochastic_rounding_is_what_the_seed_decides(tmp_path: Path) -> None:
    """Else the runs above would agree whether or not the random state is restored."""
    found = []
    for seed in (0, 0, 1):
        model = gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.0
        made = trainer(model, tmp_path, DropITCallback(preset="gact"), data_seed=0, seed=seed)
        made.train()
        found.append(losses(made))
    assert found[0] == found[1]
    assert found[0][0][0] == found[2][0][0]  # the first forward is exact
    assert found[0] != found[2]


@pytest.mark.slow
def test_lora_saves_nothing_for_frozen_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def lora() -> nn.Module:
        adapters = peft.LoraConfig(
            r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
        )
        return peft.get_peft_model(gpt2(), adapters)

    ids = torch.stack([row["input_ids"] for row in counting(BATCH)])
    batch = {"input_ids": ids, "labels": ids}
    full, dense = DropITCallback(preset="lossless"), lora()
    model = train(tmp_path, full, max_steps=1).model
    assert "addmm" in readers(full)
    saved = measure.saved_bytes(dense, **batch)
    assert saved < 0.9 * measure.saved_bytes(model, **batch)
    gradients = {}
    for preset in (None, "lossless", "balanced"):
        model = lora()
        callback = DropITCallback(preset=preset) if preset else None
        made = trainer(model, tmp_path, callback, max_steps=1, learning_rate=0.0)
        gradients[preset] = grads_of(made)
        assert {n for n in gradients[preset] if "lora_" not in n} == set()
        if callback:
            (graph,) = callback.graphs
            assert graph.report.dense_bytes == few_more(saved)
            assert "addmm" not in readers(callback)  # the frozen layers; adapters are linear
            assert "linear" in readers(callback)
    assert gradients[None].keys() == gradients["lossless"].keys()
    for name, dense_gradient in gradients[None].items():
        assert torch.equal(gradients["lossless"][name], dense_gradient), name
        packed = gradients["balanced"][name]
        assert torch.cosine_similarity(packed.flatten(), dense_gradient.flatten(), 0) > 0.9, name
    assert callback is not None
    (graph,) = callback.graphs
    assert graph.report.kept_bytes < 0.4 * saved


def readers(callback: DropITCallback) -> set[str]:
    """The ops that read what is saved."""
    return {op for g in callback.graphs for r in g.report.rows for op in r.op.split("+")}


def grads_of(made: Trainer) -> dict[str, Tensor]:
    """Trains, and gives the gradients of the last step."""
    found: dict[str, Tensor] = {}

    class Read(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()

    made.add_callback(Read())
    made.train()
    return found


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False).sum()


def test_checkpointed_regions_are_made_again_with_the_same_dropout() -> None:
    x, model = torch.randn(32, 16), Checkpointed()
    compiled = torch.compile(model, backend="dropit_eager", options={"preset": "lossless"})

    def step(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        run(x).backward()
        return [p.grad.clone() for p in model.parameters()]

    for ours, theirs in zip(step(compiled), step(model), strict=True):
        assert torch.equal(ours, theirs)


# --- errors


def test_options_are_checked_where_they_are_given() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'balansed'\. Did you mean 'balanced'"):
        DropITCallback(preset="balansed")
    with pytest.raises(ConfigError, match=r"no backend 'inductor'\. Choose one of: dropit_eager"):
        DropITCallback(backend="inductor")


@pytest.mark.parametrize("how", ["torch_compile", "compile"])
def test_a_compiled_model_is_refused(tmp_path: Path, how: str) -> None:
    model = gpt2()
    if how == "compile":
        model.compile(backend="eager")
    made = trainer(model, tmp_path, DropITCallback())
    made.args.torch_compile = how == "torch_compile"
    with pytest.raises(RuntimeError, match=r"compiled already\. Leave out torch_compile=True"):
        made.train()


def test_without_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, hf.__name__)
    with pytest.raises(ModuleNotFoundError, match=r"transformers \(pip install 'dropit-fx\[hf\]'"):
        importlib.import_module(hf.__name__)
