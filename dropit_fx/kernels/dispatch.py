"""How an op is registered, and what it does on CUDA: import Triton late, and follow the tensor."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dropit_fx.kernels.format import Format

_log = logging.getLogger(__name__)
_warned: set[str] = set()
_format = functools.lru_cache(maxsize=1024)(Format)  # checked once, not in each call


def define(
    schema: str,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    *,
    triton: bool = True,
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """Registers an op of namespace `dropit`.

    Args:
        schema: Its name and signature. A packed format is plain integers there, last from `int
            keep` on: checkpoints and compiled graphs name them. Implementations get one `Format`.
        plain: In PyTorch, for every device: the oracle of the tests.
        fake: Makes the outputs for fake tensors, without values.
        cpu: What runs on a CPU instead.
        triton: Whether `dropit_fx.kernels.triton` has a function of this name, for CUDA. If not, an
            op without a kernel of its own for CPUs has `plain` there too.
        tags: Beside that of ops which follow PyTorch's rules.
    """
    name = schema.partition("(")[0]
    op = f"dropit::{name}"
    before, found, _ = schema.partition("int keep")
    at = before.count(",")

    def taking_numbers(run: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *args: run(*args[:at], _format(*args[at:]))) if found else run

    torch.library.define(op, schema.removeprefix(name), tags=(torch.Tag.pt2_compliant_tag, *tags))
    torch.library.impl(op, "CompositeExplicitAutograd", taking_numbers(plain))
    torch.library.register_fake(op, taking_numbers(fake))
    if cpu is not None:
        torch.library.impl(op, "CPU", taking_numbers(cpu))
    if triton:
        torch.library.impl(op, "CUDA", taking_numbers(on_cuda(name, plain)))
    elif cpu is None:
        torch.library.impl(op, "CUDA", taking_numbers(plain))


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
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return implementation()(x, *args)
        with torch.cuda.device(x.device):
            return implementation()(x, *args)

    return run


def warn_once(kind: str, text: str) -> None:
    """Logs `text` as a warning, the first time in this process that one of `kind` is given."""
    if kind not in _warned:
        _warned.add(kind)
        _log.warning("dropit_fx: %s", text)
