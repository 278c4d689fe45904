"""The bound on what is spent in sympy: it ends that, nothing else, and looks without a frame."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dropit_fx.capture.bounded import TooLong, sympy_bounded


def in_file(name: str, code: str) -> Callable[..., Any]:
    """The function ``run`` of some code, as of a file of this name."""
    found: dict[str, Any] = {}
    exec(compile(code, name, "exec"), found)
    run: Callable[..., Any] = found["run"]
    return run


SPIN = "import time\ndef run(end):\n    while time.monotonic() < end:\n        pass"
IN_SYMPY = in_file("/lib/sympy/core/mod.py", SPIN)
OF_SIZES = in_file("/lib/torch/symbolic_shapes.py", "def run(spin, end):\n    spin(end)")


def test_what_is_spent_in_sympy_is_bounded() -> None:
    start = time.monotonic()
    with pytest.raises(TooLong, match="of comparing sizes"), sympy_bounded(0.2):
        OF_SIZES(IN_SYMPY, start + 60)
    assert time.monotonic() < start + 50


def test_no_folder_for_temporary_files_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    end = time.monotonic() + 60
    with pytest.raises(TooLong), sympy_bounded(0.2):
        OF_SIZES(IN_SYMPY, end)
    assert time.monotonic() < end


@pytest.mark.parametrize("run", [IN_SYMPY, in_file("/lib/model.py", SPIN)])
def test_nothing_else_is(run: Callable[..., Any]) -> None:
    """Not sympy for another reason than sizes, and not the code of a model."""

    def bounded() -> None:
        with sympy_bounded(0.1):
            run(time.monotonic() + 0.5)

    with ThreadPoolExecutor(1) as pool:  # whose stack is not deep
        pool.submit(bounded).result()


def test_a_thread_is_bounded_by_itself() -> None:
    """Others that run meanwhile, and what they are in, do not count."""
    end = time.monotonic() + 0.7
    other = threading.Thread(target=OF_SIZES, args=(IN_SYMPY, end))
    other.start()
    with sympy_bounded(0.1):
        in_file("/lib/model.py", SPIN)(end)
    other.join()
