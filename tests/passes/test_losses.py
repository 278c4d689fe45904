"""A linear layer and the loss of its logits become one call: where, where not, and what is said."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import dropit_fx
from dropit_fx import transform
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.config import load_config
from dropit_fx.measure import peak_memory, saved_bytes
from dropit_fx.report.rows import Report

CLASSES, WIDTH = 4200, 16
IDS = torch.randint(0, CLASSES, (4, 12))
FUSED = ("linear_cross_entropy", "linear_log_probs", "linear_logsumexp")
LOSSLESS: dict[str, Any] = {"preset": "lossless"}


class Model(nn.Module):
    """Tied weights, and a loss of the logits."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias)
        self.head.weight = self.tokens.weight
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.inner(self.tokens(ids))))

    def forward(self, ids: Tensor) -> Any:
        return F.cross_entropy(self.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Shifted(Model):
    def forward(self, ids: Tensor) -> Any:
        z = self.logits(ids).float()[..., :-1, :].contiguous()
        return F.cross_entropy(z.view(-1, CLASSES), ids[..., 1:].reshape(-1), ignore_index=3)


class AsModule(Model):
    def forward(self, ids: Tensor) -> Any:
        return self.criterion(self.logits(ids).view(-1, CLASSES), ids.reshape(-1))


class Nll(Model):
    def forward(self, ids: Tensor) -> Any:
        z = torch.tanh(self.logits(ids) / 5) * 5
        return F.nll_loss(F.log_softmax(z, dim=-1).flatten(0, 1), ids.flatten(), reduction="sum")


class LogProbs(Model):
    def forward(self, ids: Tensor) -> Any:
        z = 0.7 * self.logits(ids)
        found = F.log_softmax(z[:, :-1], -1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return 1e-3 * torch.logsumexp(z, -1).pow(2).mean() - found.mean()


class RowByRow(Model):
    """A loop over the rows of a batch, as TRL's where logits are in bfloat16."""

    def forward(self, ids: Tensor) -> Any:
        found = []
        for z, labels in zip(self.logits(ids)[:, :-1], ids[:, 1:], strict=True):
            found.append(F.log_softmax(z, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1))
        return -torch.stack(found).mean()


class OfSomeRows(Model):
    def forward(self, ids: Tensor) -> Any:
        some = torch.stack(self.logits(ids).unbind()[1:])
        return F.cross_entropy(some.flatten(0, 1), ids[1:].flatten())


class InChunks(Model):
    def forward(self, ids: Tensor) -> Any:
        z, labels = self.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        pairs = zip(z.chunk(3), labels.chunk(3), strict=True)
        return sum(F.cross_entropy(*pair, reduction="sum") for pair in pairs)


class Padded(Model):
    """As Hugging Face: labels are shifted by padding, and the sum is over the items of a batch."""

    def forward(self, ids: Tensor) -> Any:
        labels = F.pad(ids, (0, 1), value=-100)[..., 1:].contiguous()
        z = self.logits(ids).float().view(-1, CLASSES)
        return F.cross_entropy(z, labels.view(-1), reduction="sum") / 44


class Returned(Model):
    def forward(self, ids: Tensor) -> Any:
        z = self.logits(ids)
        return F.cross_entropy(z.flatten(0, 1), ids.flatten()), z


class Penalised(Model):
    def forward(self, ids: Tensor) -> Any:
        z = self.logits(ids)
        return F.cross_entropy(z.flatten(0, 1), ids.flatten()) + z.pow(2).mean()


class Soft(Model):
    """Targets that the model makes, of which some learn."""

    def forward(self, ids: Tensor) -> Any:
        h = F.gelu(self.inner(self.tokens(ids))).flatten(0, 1)
        teacher = torch.softmax(h.mean(-1, keepdim=True) * torch.ones(CLASSES), -1)
        return F.cross_entropy(self.head(h), teacher, label_smoothing=0.2)


class Spelled(Model):
    """The head as something else than a module."""

    def __init__(self, spelling: Callable[[Spelled, Tensor], Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.columns = nn.Parameter(torch.randn(WIDTH, CLASSES))
        self.each = nn.Parameter(torch.randn(CLASSES))

    def logits(self, ids: Tensor) -> Tensor:
        return self.spelling(self, F.gelu(self.inner(self.tokens(ids))))


SPELLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.tokens.weight),
    "linear, bias": lambda m, x: F.linear(x, m.tokens.weight, m.each),
    "t": lambda m, x: x @ m.tokens.weight.t(),
    "T": lambda m, x: x @ m.tokens.weight.T,
    "mT": lambda m, x: torch.matmul(x, m.tokens.weight.mT),
    "transpose": lambda m, x: x.matmul(m.tokens.weight.transpose(0, 1)),
    "permute": lambda m, x: x.matmul(torch.permute(m.tokens.weight, (1, 0))),
    "added": lambda m, x: x @ m.tokens.weight.t() + m.each,
    "columns": lambda m, x: x @ m.columns,
    "columns, added": lambda m, x: m.each + x @ m.columns,
    "mm": lambda m, x: torch.mm(x.flatten(0, 1), m.columns).view(*x.shape[:2], -1),
    "addmm": lambda m, x: torch.addmm(m.each, x.flatten(0, 1), m.columns).view(*x.shape[:2], -1),
}


class Written(Model):
    def forward(self, ids: Tensor) -> Any:
        labels = ids.clone()
        z = self.logits(ids)
        labels.clamp_(max=7)
        return F.cross_entropy(z.flatten(0, 1), labels.flatten())


MATCHED = (Model, Shifted, AsModule, Nll, LogProbs, RowByRow, InChunks, Padded)
NOT_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled": lambda m, x: torch.addmm(m.each, x.flatten(0, 1), m.columns, alpha=2).view(4, 12, -1),
    "batched": lambda m, x: torch.matmul(x, m.columns.expand(4, WIDTH, CLASSES)),
    "added to each row": lambda m, x: x @ m.columns + m.each[:12, None],
}


def step(run: Any, model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = run(IDS)
    loss = out[0] if isinstance(out, tuple) else out
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_as_dense(run: Any, model: nn.Module) -> None:
    (loss, grads), (expected, dense) = step(run, model), step(model, model)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(grads, dense, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def is_fused(graph_module: Any) -> bool:
    return any(getattr(n.target, "__name__", "") in FUSED for n in graph_module.graph.nodes)


def through(door: str, model: nn.Module, config: dict[str, Any]) -> tuple[Any, Report]:
    """What runs the model, and the report of it."""
    if door == "transform":
        made = transform(model, config, example_args=(IDS,))
        return made, dropit_fx.report(made)
    torch.compiler.reset()
    options = {"config": config, **({"inner": "aot_eager"} if door == "dropit" else {})}
    run = torch.compile(model, backend=door, options=options)
    run(IDS)
    return run, compiled_graphs()[-1].report


@pytest.mark.parametrize("door", ["transform", "dropit_eager", "dropit"])
@pytest.mark.parametrize("kind", MATCHED)
def test_logits_are_never_kept(kind: type[Model], door: str) -> None:
    model = kind()
    run, told = through(door, model, LOSSLESS)
    assert_as_dense(run, model)
    logits = 4 * IDS.shape[0] * (IDS.shape[1] - 1) * CLASSES
    assert told.dense_bytes == saved_bytes(model, IDS) > logits
    assert told.kept_bytes < logits / 10
    if door != "dropit":
        assert saved_bytes(run, IDS) == told.kept_bytes
    else:
        assert saved_bytes(run, IDS) < logits / 10
    assert any(row.codec == "fused" and row.kept_bytes == 0 for row in told.rows)
    assert any("never whole in memory" in row.reason for row in told.rows)


@pytest.mark.parametrize("door", ["transform", "dropit_eager"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_head_is_a_head_whatever_it_is_spelled_as(spelling: str, door: str) -> None:
    model = Spelled(SPELLINGS[spelling])
    run, told = through(door, model, LOSSLESS)
    assert_as_dense(run, model)
    logits = 4 * IDS.shape[0] * (IDS.shape[1] - 1) * CLASSES
    assert told.dense_bytes == saved_bytes(model, IDS) > logits
    assert saved_bytes(run, IDS) == told.kept_bytes < logits / 10


@pytest.mark.parametrize("spelling", NOT_HEADS)
def test_a_product_that_is_no_linear_layer_stays(spelling: str) -> None:
    model = Spelled(NOT_HEADS[spelling])
    made = transform(model, LOSSLESS, example_args=(IDS,))
    assert not is_fused(made)
    assert_as_dense(made, model)


@pytest.mark.parametrize("door", ["transform", "dropit_eager"])
def test_soft_targets_are_all_that_is_kept_of_the_size_of_logits(door: str) -> None:
    model = Soft()
    run, told = through(door, model, LOSSLESS)
    assert_as_dense(run, model)
    logits = 4 * IDS.numel() * CLASSES
    assert told.dense_bytes == saved_bytes(model, IDS)
    assert saved_bytes(run, IDS) == told.kept_bytes < 1.1 * logits  # the softmax keeps its result
    assert told.dense_bytes - told.kept_bytes > 0.9 * logits


def test_inductor_compiles_it() -> None:
    torch.compiler.reset()
    model = Model(bias=True)
    run = torch.compile(model, backend="dropit", options={"config": LOSSLESS})
    assert_as_dense(run, model)
    logits = 4 * IDS.shape[0] * (IDS.shape[1] - 1) * CLASSES
    assert compiled_graphs()[-1].saved_bytes < logits / 10


def test_a_rewritten_model_compiles() -> None:
    model = Model()
    made = transform(model, LOSSLESS, example_args=(IDS,))
    assert_as_dense(torch.compile(made, backend="aot_eager", fullgraph=True), model)


def test_a_rewritten_model_pickles() -> None:
    made = transform(Model(), LOSSLESS, example_args=(IDS,))
    again = pickle.loads(pickle.dumps(made))
    assert is_fused(again)
    assert torch.equal(again(IDS), made(IDS))


def test_a_frozen_head_gets_no_gradient() -> None:
    model = Model(bias=True)
    model.tokens.weight.requires_grad_(False)
    made = transform(model, LOSSLESS, example_args=(IDS,))
    assert is_fused(made)
    assert_as_dense(made, model)
    assert model.head.weight.grad is None


def test_evaluation_computes_the_loss_alone() -> None:
    model = Model().eval()
    made = transform(model, LOSSLESS, example_args=(IDS,))
    with torch.no_grad():
        torch.testing.assert_close(made(IDS), model(IDS))
        assert made(IDS).grad_fn is None


def test_autocast_is_followed() -> None:
    model = Model()
    made = transform(model, LOSSLESS, example_args=(IDS,))
    found, dense = [], []
    for run, into in ((made, found), (model, dense)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(IDS)
        model.zero_grad()
        loss.backward()
        into += [loss.detach(), *[p.grad.clone() for p in model.parameters()]]
    for ours, theirs in zip(found, dense, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Penalised, "'pow.*reads them"),
        (Written, "writes into a tensor between"),
        (OfSomeRows, "'unbind.*reads them"),
        (Returned, "the model returns them; 'drop_logits: true' .* frees 806,400 bytes"),
    ],
)
def test_logits_stay_where_something_else_reads_them(kind: type[Model], why: str) -> None:
    model = kind()
    made = transform(model, LOSSLESS, example_args=(IDS,))
    assert not is_fused(made)
    loss, grads = step(made, model)
    expected, dense = step(model, model)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, dense, strict=True))
    notes = [row.note for row in dropit_fx.report(made).rows if row.note]
    assert any(re.search(why, note) for note in notes), notes


def test_logits_that_the_model_returns_are_dropped_where_the_config_says_so() -> None:
    model = Returned()
    made = transform(model, LOSSLESS | {"drop_logits": True}, example_args=(IDS,))
    assert is_fused(made)
    assert_as_dense(made, model)
    assert made(IDS)[1] is None
    with torch.no_grad():  # evaluation has them
        torch.testing.assert_close(made(IDS)[1], model(IDS)[1])
    told = dropit_fx.report(made)
    assert told.kept_bytes == saved_bytes(made, IDS)
    assert any("None while gradients are on" in row.reason for row in told.rows)


def test_hugging_face_models_with_labels() -> None:
    config = transformers.LlamaConfig(
        vocab_size=CLASSES,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    plain = transform(model, LOSSLESS, example_kwargs=inputs)
    assert not is_fused(plain)
    made = transform(model, LOSSLESS | {"drop_logits": True}, example_kwargs=inputs)
    assert is_fused(made)
    out = made(**inputs)
    assert out.logits is None
    torch.testing.assert_close(out.loss, model(**inputs).loss)
    assert dropit_fx.report(made).kept_bytes == saved_bytes(made, **inputs)


def test_it_is_switched_off_and_is_for_many_classes() -> None:
    model = Model()
    for config in ({"loss_classes": 0}, {"loss_classes": CLASSES + 1}, {"preset": "dropit"}):
        assert not is_fused(transform(model, config, example_args=(IDS,)))
    assert is_fused(transform(model, {"loss_classes": CLASSES}, example_args=(IDS,)))
    assert load_config({"preset": "lossless"}).loss_classes == 4096


def test_the_peak_is_lower() -> None:
    model, ids = Model(), torch.randint(0, CLASSES, (8, 128))
    made = transform(model, LOSSLESS, example_args=(ids,))
    assert peak_memory(made, ids) < 0.5 * peak_memory(model, ids)
