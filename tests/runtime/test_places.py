"""Where views lie in their storage, and that they come back from their elements alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dropit_fx.runtime.places import Place, place_of, take, view_of, whole

STORAGE = torch.arange(240.0)

VIEWS = {
    "all": STORAGE,
    "in another shape": STORAGE.view(4, 6, 10),
    "a permutation": STORAGE.view(4, 6, 10).permute(2, 0, 1),
    "a third of the last dimension": STORAGE.view(8, 30)[:, 10:20],
    "heads of it": STORAGE.view(2, 4, 30)[..., 10:20].view(2, 4, 2, 5).transpose(1, 2),
    "rows": STORAGE.view(24, 10)[3:7],
    "every other": STORAGE[1::2],
    "expanded": STORAGE.view(24, 1, 10).expand(24, 3, 10),
    "one number, expanded": STORAGE[7].expand(5, 5),
    "windows that overlap": STORAGE.unfold(0, 4, 2),
    "a number": STORAGE[3],
    "ones": STORAGE[5:6].view(1, 1, 1),
}


@pytest.mark.parametrize("x", VIEWS.values(), ids=VIEWS)
def test_a_view_comes_back_from_its_elements_and_from_all_of_its_storage(x: Tensor) -> None:
    for place in (place_of(x), whole(x)):
        flat = take(x, place)
        assert flat.numel() == place.numel
        assert torch.equal(view_of(x).of(flat.clone(), place), x)


def test_only_its_own_elements_are_taken() -> None:
    sizes = {name: place_of(x).numel for name, x in VIEWS.items()}
    assert sizes["a third of the last dimension"] == sizes["heads of it"] == 80
    assert sizes["every other"] == 120
    assert sizes["expanded"] == 240
    assert sizes["one number, expanded"] == 1


def test_views_of_the_same_elements_have_the_same_place() -> None:
    same = [VIEWS[n] for n in ("all", "in another shape", "a permutation", "expanded")]
    assert {place_of(x) for x in same} == {Place(0, ((240, 1),))}
    third, heads = VIEWS["a third of the last dimension"], VIEWS["heads of it"]
    assert place_of(third) == place_of(heads) != place_of(STORAGE.view(8, 30)[:, :10])


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    strides=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    offset=st.integers(0, 9),
)
def test_any_strides(sizes: list[int], strides: list[int], offset: int) -> None:
    x = STORAGE.repeat(3).as_strided(sizes, strides[: len(sizes)], offset)
    place = place_of(x)
    assert torch.equal(view_of(x).of(take(x, place).clone(), place), x)
