"""Tests that need a GPU: skipped as a whole where there is none, or rehearsed on the CPU.

`DROPIT_GPU_REHEARSAL=1` runs the same tests with the device "cpu" and small sizes: it says nothing
about a GPU, and finds what would stop the tests themselves there.
"""

import os
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("DROPIT_GPU_REHEARSAL") == "1"
REASON = "no GPU: torch.cuda.is_available() is False"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REHEARSAL or torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def rehearsal() -> bool:
    return REHEARSAL


@pytest.fixture(scope="session")
def device(rehearsal: bool) -> torch.device:
    return torch.device("cpu") if rehearsal else torch.device("cuda", 0)


@pytest.fixture
def other_device(rehearsal: bool, device: torch.device) -> torch.device:
    """A second one, while the first is current."""
    if rehearsal:
        return device
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    return torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def no_memory_left_over(rehearsal: bool) -> object:
    yield
    if not rehearsal:
        torch.cuda.empty_cache()
