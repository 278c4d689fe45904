"""A rewritten model saves and loads as its model does, whatever say modules have in that."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropit_fx

X = torch.ones(16, 8).cumsum(0)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


class Counts(Plain):
    """Has extra state."""

    steps = 3

    def get_extra_state(self) -> Any:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]


class Renames(Plain):
    """Its method is a hook: checkpoints of old have another name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(type(self).rename)

    def rename(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}inner.weight"] = state.pop(f"{prefix}old")


class Grows(Plain):
    """A buffer takes the size that is loaded; it is no part of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.seen = state[f"{prefix}seen"].clone()
        super()._load_from_state_dict(state, prefix, *args)


class Tells(Plain):
    """Hooks of all other kinds, which read the module; what it notes is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.register_state_dict_pre_hook(type(self).before)
        self.register_state_dict_post_hook(type(self).after)
        self.register_load_state_dict_post_hook(type(self).loaded)

    def before(self, prefix: str, keep_vars: bool) -> None:
        self.told.append(f"saves {prefix}")

    def after(self, state: dict[str, Any], prefix: str, meta: Any) -> None:
        state[f"{prefix}sum"] = self.inner.weight.detach().sum()

    def loaded(self, keys: Any) -> None:
        keys.unexpected_keys[:] = [k for k in keys.unexpected_keys if not k.endswith("sum")]
        self.told.append("loaded")


KINDS = (Counts, Renames, Grows, Tells, lambda: nn.BatchNorm1d(8))
inside = pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.Linear(8, 8))])


def same(state: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(state) == list(other)
    for name, value in state.items():
        equal = torch.equal(value, other[name]) if isinstance(value, Tensor) else None
        assert value == other[name] if equal is None else equal, name


def copies(packed: nn.Module) -> tuple[nn.Module, ...]:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    saved: nn.Module = torch.load(file, weights_only=False)
    pickled: nn.Module = pickle.loads(pickle.dumps(packed))
    return copy.deepcopy(packed), pickled, saved


@inside
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_those_of_the_model(
    kind: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = wrap(kind())
    packed = dropit_fx.transform(model, example_args=(X,))
    for made in (packed, *copies(packed), *map(copy.deepcopy, copies(packed))):
        same(made.state_dict(), model.state_dict())
        whole = nn.ModuleDict({"a": made}), nn.ModuleDict({"a": model})
        same(whole[0].state_dict(), whole[1].state_dict())


@inside
@pytest.mark.parametrize("kind", KINDS)
def test_a_load_does_what_the_models_does(
    kind: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    given = wrap(kind()).state_dict()
    for name in list(given):
        if name.endswith("_extra_state"):
            given[name] = {"steps": 7}
        if name.endswith("seen"):
            given[name] = torch.ones(5)
    if kind is Renames:
        given = {n.replace("inner.weight", "old"): v for n, v in given.items()}
    if kind is KINDS[-1]:  # as batch norm was saved once: nothing was counted
        given = {n: v for n, v in given.items() if not n.endswith("num_batches_tracked")}
    for assign in (False, True):
        for nested in (False, True):
            model, start = wrap(kind()), wrap(kind())
            packed = dropit_fx.transform(start, example_args=(X,))
            before = copy.deepcopy(packed.state_dict())
            for made in copies(packed):
                expected, got = copy.deepcopy(model), made
                state = dict(given)
                if nested:
                    expected, got = nn.ModuleDict({"a": expected}), nn.ModuleDict({"a": got})
                    state = {f"a.{n}": v for n, v in given.items()}
                told = expected.load_state_dict(dict(state), assign=assign)
                assert got.load_state_dict(dict(state), assign=assign) == told
                same(got.state_dict(), expected.state_dict())
                if not nested:
                    assert torch.equal(got(X), expected(X))
                same(packed.state_dict(), before)  # what a copy loads is its own
            packed.load_state_dict(dict(given), assign=assign)
            if not assign and kind is not Grows:  # neither puts other tensors in their places
                same(start.state_dict(), packed.state_dict())


def test_the_state_is_that_of_the_rewritten_models_own_tensors() -> None:
    model = nn.Sequential(Tells(), nn.BatchNorm1d(8))
    packed = copy.deepcopy(dropit_fx.transform(model, example_args=(X,))).double()
    assert {v.dtype for v in packed.state_dict().values()} == {torch.float64, torch.int64}
    packed = dropit_fx.transform(model, example_args=(X,)).double()  # replaces buffers, of packed
    assert packed.state_dict()["1.running_mean"].dtype == torch.float64
    assert model[1].running_mean.dtype == torch.float32
    assert model[0].told.count("saves 0.") == 1


def test_state_that_changes_later_is_that_of_both() -> None:
    model = Counts()
    packed = dropit_fx.transform(model, example_args=(X,))
    model.steps = 5
    assert packed.state_dict()["_extra_state"] == {"steps": 5}


def test_a_spectral_norm_of_old_loads_as_it_did() -> None:
    model, other = (nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8))) for _ in range(2))
    packed = dropit_fx.transform(model, example_args=(X,))
    same(packed.state_dict(), model.state_dict())
    assert not any(packed.load_state_dict(other.state_dict()))


def test_parametrised_weight_norm_loads_what_the_older_one_saved() -> None:
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)))
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    packed = dropit_fx.transform(model, example_args=(X,))
    assert not any(packed.load_state_dict(old.state_dict()))
    assert torch.equal(packed(X), model(X))
