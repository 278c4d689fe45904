"""What every op does on CUDA before its kernel runs: import Triton late, and follow the tensor."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_warned: set[str] = set()


def on_cuda(name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """The CUDA implementation of an op, launched on the device of the op's first argument.

    Args:
        name: the function of `dropit_fx.kernels.triton`, which is imported at the first call:
            importing Triton takes time. Its first argument is a tensor.
        fallback: what runs where Triton cannot be imported.
    """

    @functools.cache
    def implementation() -> Callable[..., Any]:
        try:
            found = importlib.import_module("dropit_fx.kernels.triton")
        except ImportError as error:
            warn_once("no Triton", f"no Triton ({error}), using the slower PyTorch kernels")
            return fallback
        return cast("Callable[..., Any]", getattr(found, name))

    def run(x: Tensor, *args: Any) -> Any:
        # Triton launches on the current device, which need not be that of x
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            return implementation()(x, *args)

    return run


def warn_once(kind: str, text: str) -> None:
    """Logs `text` as a warning, the first time in this process that one of `kind` is given."""
    if kind not in _warned:
        _warned.add(kind)
        _log.warning("dropit_fx: %s", text)
