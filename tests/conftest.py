import os
import sys
from collections.abc import Iterator

# Before transformers or huggingface_hub are imported: the tests never reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

# No deadline: the first example of a test may compile a kernel.
hypothesis.settings.register_profile("dropit_fx", deadline=None, print_blob=True)
hypothesis.settings.load_profile("dropit_fx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: no worker is left with it when the others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    """Seeds PyTorch, and forgets what Dynamo compiled: its recompile limit counts across tests."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
