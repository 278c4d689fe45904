import gc
import linecache
import os
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

# Before transformers or huggingface_hub are imported: the tests never reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before inductor is imported, here or in a process that a test starts: the processor is believed
# what it says of its vectors. Else each new cache begins with programs that try them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# The cores belong to the workers of `make test`, not to two more processes of each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import cpp_kernels
import hypothesis
import numpy as np
import pytest
import torch

from dropit_fx.holders import alive

# Fake tensors ask whether there is a GPU at each op, and each time its driver is searched for.
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# They note the stack with each fake mode and each seed, and ask the disk for the age of each file.
linecache.checkcache = lambda filename=None: None

# No deadline: the first example of a test may compile a kernel.
hypothesis.settings.register_profile("dropit_fx", deadline=None, print_blob=True)
hypothesis.settings.load_profile("dropit_fx")

# A worker of `make test` needs them all: what libraries hold is set aside once.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in (
        "torch._inductor.compile_fx",
        "torch.testing._internal.common_methods_invocations",
        "transformers.models.bert.modeling_bert",
        *("lightning", "matplotlib.figure", "peft", "sklearn.datasets", "timm", "torchvision"),
    ):
        import_module(name)
cpp_kernels.compile_graphs_as_one_file()


_young_objects = gc.get_objects
_still_found: list[Callable[[], object]] = []


def _all_objects(generation: int | None = None) -> list[object]:
    return _young_objects(generation) + [x for find in _still_found if (x := find()) is not None]


def set_aside() -> None:
    """Freezes all that lives, so that neither collections nor searches walk through it any more.

    A quarter of the suite's time went there. What is searched for is still found: measuring bytes
    and proving a graph look for tensors, modules and generators of random numbers, of which NumPy's
    take no weak reference.
    """
    gc.collect()
    _still_found[:] = [
        *map(weakref.ref, alive(torch.Tensor, torch.nn.Module, random.Random)),
        *(partial(_itself, x) for x in alive(np.random.Generator, np.random.RandomState)),
    ]
    gc.freeze()


def _itself(found: object) -> object:
    return found


gc.get_objects = _all_objects
set_aside()


def pytest_collection_finish() -> None:
    set_aside()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        set_aside()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with what takes longest come first: no worker is left with it when others have ended.

    As a whole: a fixture of a file would be made once more for those of its tests that come later.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    """Seeds PyTorch, and forgets what Dynamo compiled: its recompile limit counts across tests."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
