"""Recurrent layers run again in the backward, from packed inputs: what they keep inside is gone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dropit_fx
from dropit_fx.measure import saved_bytes
from dropit_fx.private import OpOverload

# bits as they are: what a region is made again from, and all else
EXACT: dict[str, Any] = {
    "preset": None,
    "force": True,
    "rules": [{"codec": "quant", "bits": None}, {"codec": "mink", "gamma": 0.0}],
}
WIDTH = 32


class Sequence(nn.Module):
    """A recurrent layer between two linear ones; its last state is read too."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.layer = kind(WIDTH, WIDTH, batch_first=True, **options)
        width = options.get("proj_size", WIDTH)
        self.last = nn.Linear(width * (1 + bool(options.get("bidirectional"))), 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, state = self.layer(self.first(x).tanh())
        state = state[0] if isinstance(self.layer, nn.LSTM) else state
        return self.last(h), state.sin()


class Steps(nn.Module):
    """A cell that is called step by step, with a number of steps of its own."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(8, WIDTH), kind(WIDTH, WIDTH), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state: Any = torch.zeros_like(self.first(x[:, 0]))
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in range(5):
            state = self.cell(self.first(x[:, step]), state)
        h = state[0] if isinstance(state, tuple) else state
        return self.last(h), h.sin()


DEEP = {"num_layers": 2, "dropout": 0.3, "bidirectional": True}
MODELS: dict[str, Any] = {
    "LSTM": lambda: Sequence(nn.LSTM),
    "LSTM, deep": lambda: Sequence(nn.LSTM, **DEEP),
    "LSTM, projected": lambda: Sequence(nn.LSTM, proj_size=WIDTH // 2),
    "GRU": lambda: Sequence(nn.GRU),
    "GRU, deep": lambda: Sequence(nn.GRU, **DEEP),
    "RNN": lambda: Sequence(nn.RNN),
    "RNN, relu": lambda: Sequence(nn.RNN, nonlinearity="relu"),
    "LSTMCell": lambda: Steps(nn.LSTMCell),
    "GRUCell": lambda: Steps(nn.GRUCell),
    "RNNCell": lambda: Steps(nn.RNNCell),
}


def step(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of one training step."""
    torch.manual_seed(3)
    outs = run(x)
    loss = sum(out.square().sum() for out in outs)
    return [*outs, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_those_of_dense_from_exact_inputs(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(4, 12, 8)
    packed = dropit_fx.transform(model, EXACT, example_args=(x,))
    assert {row.codec for row in dropit_fx.report(packed).rows} >= {"repeated"}
    exported = any(isinstance(n.target, OpOverload) for n in packed.graph.nodes)
    for length in (12,) if exported else (12, 7):
        for training in (True, False):
            model.train(training)
            packed.train(training)
            part = x[:3, :length]
            pairs = zip(step(packed, packed, part), step(model, model, part), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", [name for name in MODELS if "Cell" in name])
@pytest.mark.parametrize("inner", ["aot_eager", "aot_eager_decomp_partition"])
def test_cells_run_again_in_compiled_graphs_too(name: str, inner: str) -> None:
    """A call of a region of ours is PyTorch's own for AOTAutograd: it takes no options but its."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(4, 5, 8)
    compiled = torch.compile(model, backend="dropit", options={"config": EXACT, "inner": inner})
    torch.testing.assert_close(step(compiled, model, x), step(model, model, x))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_is_told_and_little(name: str) -> None:
    model, x = MODELS[name](), torch.randn(16, 24, 8)
    packed = dropit_fx.transform(model, example_args=(x,))
    told = dropit_fx.report(packed)
    assert told.dense_bytes == saved_bytes(model, x)
    assert told.kept_bytes == saved_bytes(packed, x)
    assert told.kept_bytes < 0.3 * told.dense_bytes


@pytest.mark.parametrize(
    "config",
    [
        {"preset": "lossless"},
        {"rules": [{"op": "checkpoint", "module": "layer", "codec": "keep"}]},
    ],
)
def test_where_no_rule_packs_its_inputs_a_layer_stays_as_it_is(config: dict[str, Any]) -> None:
    model, x = Sequence(nn.LSTM), torch.randn(4, 12, 8)
    packed = dropit_fx.transform(model, config, example_args=(x,))
    assert "repeated" not in {row.codec for row in dropit_fx.report(packed).rows}
    assert {str(n.target) for n in packed.graph.nodes} & {"layer", "aten.lstm.input"}


def test_a_frozen_layer_saves_nothing_for_itself() -> None:
    model, x = Sequence(nn.GRU).requires_grad_(False), torch.randn(4, 12, 8)
    model.last.requires_grad_(True)
    packed = dropit_fx.transform(model, example_args=(x,))
    assert dropit_fx.report(packed).kept_bytes == saved_bytes(packed, x)


def test_copies_and_pickles_train_and_states_are_the_models() -> None:
    model, x = Sequence(nn.LSTM), torch.randn(4, 12, 8)
    packed = dropit_fx.transform(model, EXACT, example_args=(x,))
    assert packed.state_dict().keys() == model.state_dict().keys()
    expected = step(model, model, x)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert all(torch.equal(*pair) for pair in zip(step(other, other, x), expected, strict=True))


class Padded(Sequence):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([9, 5, 4])
        padded = pack_padded_sequence(self.first(x).tanh(), lengths, batch_first=True)
        h, (state, _) = self.layer(padded)
        return self.last(pad_packed_sequence(h, batch_first=True)[0]), state.sin()


def test_packed_sequences_train_as_dense_or_are_refused() -> None:
    model, x = Padded(nn.LSTM), torch.randn(3, 9, 8)
    try:
        packed = dropit_fx.transform(model, EXACT, example_args=(x,))
    except dropit_fx.CaptureError:
        return
    pairs = zip(step(packed, packed, x), step(model, model, x), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
