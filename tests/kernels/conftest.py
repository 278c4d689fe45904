from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """The kernels in C divide their work, also where the tests are given one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)
