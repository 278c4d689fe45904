"""What a graph is given in other containers, dtypes or tensors than the example's."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dropit_fx import CaptureError, transform


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Turned(NamedTuple):
    b: Tensor
    a: Tensor


class Exported(nn.Module):
    """A function of a layer's result and of the inputs, which only torch.export takes."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(8, 8), function

    def forward(self, *given: Any) -> Tensor:
        h = self.fc(torch.ones(4, 8)).sigmoid()
        if h.detach().shape[0]:
            with torch.no_grad():
                scale = h.exp()
        made: Tensor = self.function(h * scale, *given)
        return made


def by_pickle(made: Any) -> Any:
    return pickle.loads(pickle.dumps(made))


def in_turn(h: Tensor, values: Any) -> Tensor:
    for i, value in enumerate(values.values() if isinstance(values, dict) else values):
        h = h * (value + i)
    return h


def by_name(h: Tensor, pair: Any) -> Tensor:
    made: Tensor = h * pair.a + h.exp() * pair.b
    return made


X, Y = torch.randn(4, 8), torch.randn(4, 8)
OTHERWISE = [
    (in_turn, [X, Y], [X, Y, Y], r"with values = \[\*, \*\].*= \[Tensor, Tensor, Tensor\]"),
    (in_turn, [X, Y], [X], r"with values = \[\*, \*\].*= \[Tensor\]"),
    (in_turn, [X, Y], None, r"with values = \[\*, \*\].*= None"),
    (in_turn, {"p": X, "q": Y}, {"q": X, "p": Y}, r"\{'p': \*, 'q': \*\}.*\{'q': Tensor"),
    (in_turn, {"p": X}, {"p": X, "q": Y}, r"\{'p': \*\}.*'q': Tensor"),
    (in_turn, {"p": X, "q": Y}, {"p": X}, r"\{'p': \*, 'q': \*\}.*= \{'p': Tensor\}"),
    (in_turn, OrderedDict(p=X, q=Y), OrderedDict(q=X, p=Y), r"OrderedDict.*OrderedDict"),
    (by_name, Pair(X, Y), Turned(X, Y), r"Pair\(a=\*, b=\*\).*Turned\(b=Tensor, a=Tensor\)"),
]


class Called(Exported):
    def forward(self, values: Any) -> Tensor:
        return super().forward(values)


@pytest.mark.parametrize(("function", "example", "other", "told"), OTHERWISE)
def test_what_is_nested_otherwise_is_refused(
    function: Any, example: Any, other: Any, told: str
) -> None:
    model = Called(function)
    made = transform(model, preset="lossless", example_args=(example,))
    for one in (made, copy.deepcopy(made), by_pickle(made)):
        assert torch.equal(one(example), model(example))
        with pytest.raises(TypeError, match=told):
            one(other)
        with pytest.raises(TypeError, match="transform the model with an example like"):
            one(values=other)


def test_mappings_with_the_same_keys_are_taken_one_for_the_other() -> None:
    model = Called(in_turn)
    made = transform(model, preset="lossless", example_args=({"p": X, "q": Y},))
    assert torch.equal(made(OrderedDict(p=Y, q=X)), model({"p": Y, "q": X}))


def test_a_compiled_copy_refuses_them_too() -> None:
    model = Called(in_turn)
    made = transform(model, preset="lossless", example_args=([X, Y],))
    compiled = torch.compile(made, backend="eager")
    assert torch.equal(compiled([Y, X]), model([Y, X]))
    with pytest.raises(TypeError, match=r"with values = \[\*, \*\]"):
        compiled([X, Y, Y])


@pytest.mark.parametrize(
    "function",
    [
        lambda h, a: h * a if a.dtype == torch.float32 else h * 2 * a,
        lambda h, a: h * a if a.is_floating_point() else h * 2 * a,
        lambda h, a: (h + a).to(a.dtype),
    ],
    ids=["dtype", "is_floating_point", "cast"],
)
def test_a_dtype_that_the_model_reads_has_to_be_the_examples(function: Any) -> None:
    made = by_pickle(transform(Called(function), preset="lossless", example_args=(X,)))
    made(Y)
    with pytest.raises(ValueError, match=r"with values.dtype == torch.float32.*\(4, 8\) float16"):
        made(X.half())


def test_a_dtype_that_nobody_reads_is_free() -> None:
    model = Called(lambda h, a: nn.functional.layer_norm(h * a, (8,)))
    made = transform(model, preset="lossless", example_args=(X,))
    assert torch.equal(made(X.double()), model(X.double()))


class Two(Exported):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b)


def test_inputs_that_are_one_tensor_in_the_example_may_be_two() -> None:
    model = Two(lambda h, a, b: h * a + h.exp() * b)
    made = transform(model, preset="lossless", example_args=(X, X))
    for given in ((X, X), (X, Y)):
        assert torch.equal(made(*given), model(*given))


def test_a_model_that_asks_whether_its_inputs_are_one_is_refused() -> None:
    class Symbolic(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * 2 if a is b else a * b

    for model in (Symbolic(), Two(lambda h, a, b: h * 2 if a is b else h * b)):
        with pytest.raises(CaptureError, match="have the example give each its own"):
            transform(model, preset="lossless", example_args=(X, X))
