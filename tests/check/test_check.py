"""``check``: passes where all is right, and each of its findings fails where something is wrong."""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropit_fx
from dropit_fx import Check, check, measure
from dropit_fx.check import checker, step
from dropit_fx.check.step import SEED
from dropit_fx.cli import main
from dropit_fx.codecs import CODEC
from dropit_fx.compile import backend
from dropit_fx.config import ConfigError
from dropit_fx.ops.table import DERIVABLE, RULES


def net() -> nn.Module:
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.2), nn.Flatten()
    return nn.Sequential(*first, nn.Linear(8 * 36, 32), nn.LayerNorm(32), nn.Linear(32, 4)).train()


def images() -> tuple[Tensor]:
    return (torch.randn(16, 3, 8, 8),)


def text(found: Check, name: str) -> str:
    return next(f.text for f in found.findings if f.name == name)


@pytest.mark.parametrize(
    ("way", "preset"),
    [("transform", "balanced"), ("transform", "lossless"), ("dropit_eager", "gact")],
)
def test_a_model_with_dropout_and_batch_norm_passes(way: Any, preset: str) -> None:
    found = check(net(), images(), preset=preset, backend=way)
    assert found, str(found)
    assert found.measured_bytes == found.predicted_bytes < found.dense_bytes
    assert (found.relative_error == 0) == (preset == "lossless")
    assert found.cosine > 0.9
    assert (text(found, "chance"), found.failed) == ("drawn again in each call", ())
    assert len(found.worst) == 5
    assert [e.relative for e in found.worst] == sorted(e.relative for e in found.worst)[::-1]


@pytest.mark.slow
def test_compiled_by_inductor_it_is_compared_to_rounding() -> None:
    found = check(net(), images(), backend="dropit")
    assert found, str(found)
    assert "equal to rounding" in text(found, "output")


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
@pytest.mark.parametrize("preset", ["balanced", "lossless"])
def test_a_loss_that_is_computed_with_its_layer_is_compared_to_rounding(
    way: Any, preset: str
) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(16, 32), nn.Linear(32, 5000)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            loss: Tensor = nn.functional.cross_entropy(self.head(self.first(x).tanh()), target)
            return loss

    given = torch.randn(64, 16), torch.randint(5000, (64,))
    checked = check(Words(), given, preset=preset, backend=way)
    assert checked, checked
    said = {f.name: f.text for f in checked.findings}
    assert said["gradients, exact formats"].endswith("have the same bits")
    assert said["output"].endswith("equal to rounding")


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_dropped_logits_are_said_and_nothing_else_may_be_gone(
    way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(16, 32), nn.Linear(32, 5000)

        def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x).tanh()
            logits = self.head(hidden)
            loss = nn.functional.cross_entropy(logits, target)
            return {"logits": logits, "hidden": hidden, "loss": loss}

    given = torch.randn(64, 16), torch.randint(5000, (64,))
    config = {"preset": "lossless", "drop_logits": True}
    checked = check(Words(), given, config=config, backend=way)
    assert checked, checked
    assert text(checked, "output").endswith("None as drop_logits asks for: ['logits']")

    whole = step._by_path

    def without_hidden(output: Any) -> dict[str, Tensor]:
        found = whole(output)
        if "['logits']" not in found:
            del found["['hidden']"]
        return found

    monkeypatch.setattr(step, "_by_path", without_hidden)
    checked = check(Words(), given, config=config, backend=way)
    assert not checked
    assert "['hidden']" in text(checked, "output")


def test_a_models_own_loss_and_ones_own() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = self.body(x)
            return {"logits": out, "loss": out.square().mean()}

    x = torch.randn(4, 8)
    model = WithLoss()
    assert check(model, (x,)).first_loss == pytest.approx(model(x)["loss"].item())
    summed = check(model, (x,), loss=lambda out: out["logits"].sum())
    assert summed.first_loss == pytest.approx(model(x)["logits"].sum().item(), rel=1e-5)


# --- it leaves no trace


class Restless(nn.Module):
    """Writes into itself, into its input and into lists while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.seen: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        out: Tensor = self.body(x)
        x.zero_()
        return out + random.random()


@pytest.mark.parametrize("build", [net, Restless])
@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_nothing_is_changed(way: Any, build: Callable[[], nn.Module]) -> None:
    model = build()
    model(*images()) if build is net else model(torch.randn(4, 8))
    args = images() if build is net else (torch.randn(4, 8),)
    before = copy.deepcopy(args)
    model.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = {n: p.grad for n, p in model.named_parameters()}
    state = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    held = [(m, dict(vars(m))) for m in model.modules()]
    seen = list(getattr(model, "seen", []))
    chance = torch.get_rng_state(), random.getstate(), len(backend.compiled_graphs())
    check(model, args, backend=way)
    assert torch.equal(chance[0], torch.get_rng_state())
    assert chance[1:] == (random.getstate(), len(backend.compiled_graphs()))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert [id(t) for t in getattr(model, "seen", [])] == [id(t) for t in seen]
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert bool((parameter.grad == 1).all())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])
    for module, attributes in held:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[k] is v for k, v in attributes.items())


# --- each finding fails where it must


def broken(monkeypatch: pytest.MonkeyPatch, name: str, **parts: Any) -> None:
    monkeypatch.setitem(RULES, name, replace(RULES[name], **parts))


def break_forward(patch: pytest.MonkeyPatch) -> None:
    run = RULES["layer_norm"].run_saving
    assert run is not None

    def shifted(*args: Any) -> Any:
        out, made = run(*args)
        return out + 1e-6, made

    broken(patch, "layer_norm", run_saving=shifted)


def break_buffers(patch: pytest.MonkeyPatch) -> None:
    run = RULES["batch_norm"].run_saving
    assert run is not None

    def twice(*args: Any) -> Any:
        run(*args)
        return run(*args)

    broken(patch, "batch_norm", run_saving=twice)


def break_formula(patch: pytest.MonkeyPatch) -> None:
    formula = RULES["linear"].backward
    assert formula is not None

    def doubled(grad: Tensor, saved: Any, call: Any) -> Any:
        return {n: g if g is None else g * 1.01 for n, g in formula(grad, saved, call).items()}

    broken(patch, "linear", backward=doubled)


def break_derivation(patch: pytest.MonkeyPatch) -> None:
    row = DERIVABLE["layer_norm"]
    assert row.derive is not None
    derive = row.derive
    wrong = replace(row, derive=_with_signature(derive, lambda out: out.roll(1)))
    patch.setitem(DERIVABLE, "layer_norm", wrong)


def _with_signature(function: Callable[..., Tensor], after: Callable[[Tensor], Tensor]) -> Any:
    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Tensor:
        return after(function(*args, **kwargs))

    return changed


def break_prediction(patch: pytest.MonkeyPatch) -> None:
    measured = measure.saved_bytes
    patch.setattr(measure, "saved_bytes", lambda *args, **kwargs: measured(*args, **kwargs) + 8)


def break_chance(patch: pytest.MonkeyPatch) -> None:
    class Frozen(nn.Module):
        def __init__(self, made: nn.Module) -> None:
            super().__init__()
            self.made = made

        def forward(self, *args: Any) -> Any:
            torch.manual_seed(SEED)
            return self.made(*args)

    transform = dropit_fx.transform
    patch.setattr(checker, "transform", lambda *a, **k: Frozen(transform(*a, **k)))


def break_unpacking(patch: pytest.MonkeyPatch) -> None:
    codec = CODEC["quant"]

    def infinite(parts: Any, options: Any, numel: Any, dtype: torch.dtype) -> Tensor:
        out = codec.unpack(parts, options, numel, dtype)
        return out if options["bits"] is None else out / 0

    patch.setitem(CODEC, "quant", replace(codec, unpack=infinite))


def run_out_of_memory(patch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    broken(patch, "layer_norm", run_saving=full)


BREAKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "output": (break_forward, "differs: 0 (call 1), 0 (call 2)"),
    "buffers": (break_buffers, "differ: 1."),
    "gradients, exact formats": (break_formula, "of 10 gradients differ: "),
    "gradients, values made again": (break_derivation, "of 10 gradients differ: "),
    "bytes": (break_prediction, "predicted "),
    "chance": (break_chance, "frozen in 0"),
    "finite": (break_unpacking, "output, loss or gradients are not"),
    "packed": (run_out_of_memory, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00"),
}


@pytest.mark.parametrize(("name", "how"), BREAKS.items(), ids=BREAKS)
def test_a_finding_fails_where_something_is_wrong(
    name: str,
    how: tuple[Callable[[pytest.MonkeyPatch], None], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how[0](monkeypatch)
    found = check(net(), images())
    assert not found
    assert name in found.failed, str(found)
    assert how[1] in text(found, name)
    assert found.verdict.startswith("FAILED: ")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Unrepeatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out + int.from_bytes(random.SystemRandom().randbytes(2))


def test_what_cannot_be_captured_or_run_is_a_finding_and_no_error() -> None:
    found = check(nn.Sequential(nn.Linear(4, 4), Branches()), (torch.ones(2, 4),))
    assert found.failed == ("exact formats", "values made again", "packed")
    assert "CaptureError" in text(found, "packed")
    found = check(nn.Linear(4, 4), (torch.ones(2, 5),))
    assert found.failed == ("dense model",)
    found = check(nn.Linear(4, 4).requires_grad_(False), (torch.ones(2, 4),))
    assert "no tensor that the model returns has a gradient" in text(found, "dense model")
    found = check(Unrepeatable(), (torch.ones(2, 4),))
    assert "does not repeat its own output" in text(found, "dense model")
    with pytest.raises(ConfigError, match="no backend 'inductor'"):
        check(net(), images(), backend="inductor")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="matched no saved tensor"):
        check(net(), images(), config={"rules": [{"module": "nowhere", "codec": "keep"}]})


def test_a_gradient_that_loses_much_is_noted_and_does_not_fail() -> None:
    found = check(net(), images(), config={"preset": "dropit"}, loss=lambda out: out.sum())
    lossy = check(net(), images(), config={"rules": [{"codec": "quant", "bits": 1}]})
    assert found
    assert lossy
    assert lossy.cosine < 0.9
    assert "below 0.9; take more bits" in text(lossy, "gradient, as configured")


def test_html_and_text() -> None:
    found = check(net(), images(), preset="lossless")
    assert str(found).splitlines()[0].split() == ["checked", "found"]
    assert str(found).endswith(found.verdict + "\n")
    assert found._repr_html_().count("<tr>") == len(found.findings)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    linear = SimpleNamespace(linear=lambda: (nn.Linear(4, 4), (torch.ones(2, 4),)))
    monkeypatch.setitem(sys.modules, "tests_of_check", linear)  # type: ignore[arg-type]
    command = ["check", "--model", "dropit_fx.bench.model_spec:small_net", "--batch", "4"]
    assert main([*command, "--bits", "6"]) == 0
    assert "passed: " in capsys.readouterr().out
    assert main([*command, "--preset", "balance"]) == 2
    break_prediction(monkeypatch)
    assert main(["check", "--model", "tests_of_check:linear", "--preset", "lossless"]) == 1
    assert "FAILED: bytes" in capsys.readouterr().out


def test_outputs_of_diffusers_which_name_no_parts() -> None:
    from diffusers.utils import BaseOutput

    @dataclass
    class Denoised(BaseOutput):
        sample: Tensor

    class Denoiser(nn.Sequential):
        def forward(self, x: Tensor) -> Denoised:
            return Denoised(sample=super().forward(x))

    model = Denoiser(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    checked = check(model, (torch.randn(32, 16),))
    assert checked, checked
