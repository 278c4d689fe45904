"""``FreezeScheduler``: which layers train, what the others save, and what it goes on from."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.schedule import FreezeScheduler, partition, select

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.down(F.gelu(self.up(torch.tanh(self.query(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.Sequential(*[Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x)
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, WIDTH, generator=generator), torch.randint(4, (64,), generator=generator)


X, Y = batch()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def step(model: Any, optimizer: torch.optim.Optimizer, at: int = 0) -> float:
    x, y = batch(at)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=at % 2 == 0)
    return loss.item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


OPTIMIZERS = {
    "adamw": adamw,
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_layers_keep_their_bits_and_the_others_train(name: str) -> None:
    """The optimiser's state and weight decay move nothing that is frozen."""
    model = net()
    optimizer = OPTIMIZERS[name](model)
    scheduler = FreezeScheduler(model, 0.6, optimizer=optimizer)
    trained = set()
    for at in range(12):
        before, frozen = weights(model), scheduler.frozen
        trained.update(scheduler.trained)
        step(model, optimizer, at)
        for layer, old in before.items():
            assert torch.equal(model.get_parameter(layer), old) == (layer in frozen), layer
    assert len(frozen) == 7  # int(0.6 * 13)
    assert trained == {*scheduler.frozen, *scheduler.trained}  # each had its turn
    assert "head.weight" not in trained


def test_each_step_trains_the_layers_that_moved_most() -> None:
    """The updates as they are published: of whole weights, kept while a layer is frozen."""
    model = net()
    optimizer = adamw(model)
    scheduler = FreezeScheduler(model, 0.7, optimizer=optimizer, sample=10**9)
    updates = scheduler.state_dict()["updates"]
    for at in range(15):
        before, trained = weights(model), scheduler.trained
        step(model, optimizer, at)
        for layer in trained:
            old, new = before[layer], model.get_parameter(layer).detach()
            updates[layer] = ((new - old).abs() / old.abs()).mean().item()
        assert scheduler.state_dict()["updates"] == pytest.approx(updates, rel=1e-5)
        most = sorted(updates, key=lambda n: -updates[n])[: len(scheduler.trained)]
        assert set(scheduler.trained) == set(most)


def test_at_rate_0_nothing_is_frozen() -> None:
    """Also where layers share what they save, which counts for each."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Twins(), nn.Linear(WIDTH, 4))
    scheduler = FreezeScheduler(model, 0, example_args=(X,))
    assert scheduler.nbytes["1.a.weight"] > 0
    assert scheduler.nbytes["1.a.weight"] == scheduler.nbytes["1.b.weight"]
    assert not scheduler.frozen


def test_what_is_copied_is_a_sample_of_what_trains() -> None:
    model = net()
    scheduler = FreezeScheduler(model, 0.5, sample=100)
    scheduler.before_step()
    held = scheduler._old
    assert set(held) == set(scheduler.trained)
    assert all(t.numel() <= 100 and t.untyped_storage().nbytes() <= 400 for t in held.values())


@pytest.mark.parametrize(
    ("preset", "rate"), [(None, 0.5), (None, 0.95), ("lossless", 0.8), ("balanced", 0.8)]
)
def test_what_trains_saves_its_share_in_bytes(preset: str | None, rate: float) -> None:
    """In each step; and what is saved is what a transform of the frozen model predicts."""
    model: Any = net()
    if preset:
        model = dropit_fx.transform(model, preset=preset, example_args=(X,))
    optimizer = adamw(model)
    scheduler = FreezeScheduler(model, 0.0, example_args=(X,))
    everything = measure.saved_bytes(model, X)
    least = min(scheduler.nbytes.values())
    assert least >= 0
    scheduler = FreezeScheduler(model, rate, optimizer=optimizer, example_args=(X,))
    layers = scheduler.nbytes
    for n in layers:
        model.get_parameter(n).requires_grad_(False)
    static = measure.saved_bytes(model, X)
    scheduler.load_state_dict(scheduler.state_dict())
    for at in range(8):
        room = max((1 - rate) * (everything - static), *layers.values())
        assert len(scheduler.frozen) >= int(round(rate * len(layers), 9))
        found = measure.saved_bytes(model, X)
        assert static <= found <= static + room
        if preset and at % 4 == 0:
            again = dropit_fx.transform(shaped(scheduler), preset=preset, example_args=(X,))
            assert dropit_fx.report(again).kept_bytes == found
        step(model, optimizer, at)


def shaped(scheduler: FreezeScheduler) -> nn.Module:
    """The dense network with the same layers frozen."""
    model = net()
    for name in scheduler.frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def test_slimfit_keeps_wide_inputs_in_8_bits_gelus_in_4_and_other_inputs_while_they_train() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 256), "fc2": nn.Linear(256, WIDTH)})

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.last = model["fc1"], model["fc2"], nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.fc2(F.gelu(self.fc1(x))))
            return out

    made = dropit_fx.transform(Mlp(), preset="slimfit", example_args=(X,))
    elements = len(X) * 256
    scales = elements // 256 * 4  # two in 16 bits for each 256: least and greatest
    last = len(X) * WIDTH * 4
    assert measure.saved_bytes(made, X) == elements + elements // 2 + 2 * scales + last
    made.get_parameter("last.weight").requires_grad_(False)
    assert measure.saved_bytes(made, X) == elements + elements // 2 + 2 * scales
    made.get_parameter("fc2.weight").requires_grad_(False)
    assert measure.saved_bytes(made, X) == elements // 2 + scales


def test_gradients_of_what_trains_are_those_of_the_whole_model() -> None:
    model, whole = net(), net()
    rewritten = dropit_fx.transform(model, preset="lossless", example_args=(X,))
    scheduler = FreezeScheduler(rewritten, 0.8, example_args=(X,))
    for each in (rewritten, whole):
        F.cross_entropy(each(X), Y).backward()
    for name, parameter in whole.named_parameters():
        grad = model.get_parameter(name).grad
        if name in scheduler.frozen:
            assert grad is None
        else:
            assert grad is not None
            assert parameter.grad is not None
            assert torch.equal(grad, parameter.grad)


def test_a_layer_that_is_too_large_beside_others_still_has_its_turn() -> None:
    sizes, updates = {"a": 10, "b": 1, "c": 1}, {"a": 2.0, "b": 3.0, "c": 1.0}
    assert select(updates, sizes, 2, 10) == ("b", "c")  # a has no room behind b
    assert select(updates | {"b": 0.5}, sizes, 2, 10) == ("a",)


def test_partition_has_each_layer_once() -> None:
    sizes = {str(n): n % 5 for n in range(17)}
    sets = partition(sizes, 4, 6)
    assert sorted(n for names in sets for n in names) == sorted(sizes)
    assert all(len(names) <= 4 and sum(sizes[n] for n in names) <= 6 for names in sets)


def test_a_step_that_moves_nothing_tells_nothing() -> None:
    """The first step of a warm-up has a learning rate of 0."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scheduler = FreezeScheduler(model, 0.5, optimizer=optimizer)
    before = scheduler.state_dict()
    step(model, optimizer)
    assert scheduler.state_dict() == before


def test_weights_of_zeros_are_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = FreezeScheduler(model, 0.0, optimizer=optimizer)
    for _ in range(3):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert all(0 < u < 1e7 for u in scheduler.state_dict()["updates"].values())


def test_training_goes_on_from_a_checkpoint_to_the_bit() -> None:
    def made() -> tuple[Net, torch.optim.Optimizer, FreezeScheduler]:
        model = net()
        optimizer = adamw(model)
        return model, optimizer, FreezeScheduler(model, 0.6, optimizer=optimizer)

    model, optimizer, scheduler = made()
    for at in range(5):
        step(model, optimizer, at)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    schedule = json.loads(json.dumps(scheduler.state_dict()))
    losses = [step(model, optimizer, at) for at in range(5, 12)]

    again, optimizer, scheduler = made()
    again.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    scheduler.load_state_dict(schedule)
    assert [step(again, optimizer, at) for at in range(5, 12)] == losses
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


def test_remove_makes_the_model_trainable_as_before() -> None:
    model = net()
    model.blocks[0].up.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    optimizer = adamw(model)
    scheduler = FreezeScheduler(model, 0.9, optimizer=optimizer)
    assert {n: p.requires_grad for n, p in model.named_parameters()} != before
    scheduler.remove()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    old = scheduler.state_dict()
    step(model, optimizer)
    assert scheduler.state_dict() == old


def test_compiled_there_is_one_graph_for_each_set() -> None:
    model, graphs = net(), list[Any]()

    def counted(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return dropit_fx.backend.dropit_eager(gm, inputs, options={"preset": "balanced"})

    compiled = torch.compile(model, backend=counted)
    optimizer = adamw(model)
    scheduler = FreezeScheduler(compiled, 0.8, optimizer=optimizer, variants=8, example_args=(X,))
    assert not graphs  # weighing compiles nothing
    seen = set()
    for at in range(40):
        trained, before = scheduler.trained, weights(model)
        seen.add(trained)
        step(compiled, optimizer, at)
        moved = {n for n in scheduler.nbytes if not torch.equal(model.get_parameter(n), before[n])}
        assert moved == set(trained)
    assert 1 < len(seen) <= len(scheduler.sets) <= 8
    assert {n for names in seen for n in names} == set(scheduler.nbytes)
    assert len(graphs) <= len(seen)  # as many, where Dynamo guards on what requires a gradient


def test_compiled_code_that_does_not_see_what_trains_is_an_error() -> None:
    """PyTorch 2.11 runs its first graph on: the layers that train would get no gradient."""
    model = net()
    optimizer = adamw(model)
    scheduler = FreezeScheduler(model, 0.8, optimizer=optimizer, variants=8)
    stale = scheduler.trained[0]
    step(model, optimizer)
    model.get_parameter(stale).requires_grad_(True)
    (model.get_parameter(stale).sum() + model.head.bias.sum()).backward()
    with pytest.raises(RuntimeError, match="no gradient reached the layers that train now"):
        optimizer.step()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"rate": 1.0}, r"rate=1.0: .* in \[0, 1\)"),
    "no number": ({"rate": "0.5"}, "rate='0.5'"),
    "sample": ({"sample": 0}, "sample=0: a whole number"),
    "variants": ({"variants": True}, "variants=True"),
    "too few": ({"rate": 0.9, "variants": 2}, "variants=2.* need 7 sets"),
    "glob": ({"always": "block.*"}, "matches no weight that trains. Did you mean 'blocks"),
    "all": ({"always": "*"}, "no weight that may be frozen"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_an_error_and_leaves_the_model_alone(case: str) -> None:
    options, message = WRONG[case]
    model = net()
    with pytest.raises(ValueError, match=message):
        FreezeScheduler(model, **({"rate": 0.5, "example_args": (X,)} | options))
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_without_some_layer_is_an_error() -> None:
    model = net()
    some = torch.optim.SGD(model.blocks.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"does not have 'stem\.weight'"):
        FreezeScheduler(model, 0.5, optimizer=some)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, not object"):
        FreezeScheduler(model, 0.5, optimizer=object())  # type: ignore[arg-type]


def test_a_compiled_model_needs_a_bound() -> None:
    whole, part = net(), net()
    whole.compile()
    part.blocks[1].compile()
    for model in (torch.compile(net()), whole, part):
        with pytest.raises(ValueError, match="Give variants="):
            FreezeScheduler(model, 0.5)


def test_after_step_needs_before_step_and_the_state_its_layers() -> None:
    scheduler = FreezeScheduler(net(), 0.5)
    with pytest.raises(RuntimeError, match="was not called"):
        scheduler.after_step()
    with pytest.raises(ValueError, match=r"'head\.weight' is in one of the two"):
        FreezeScheduler(net(), 0.5, always="stem").load_state_dict(scheduler.state_dict())
