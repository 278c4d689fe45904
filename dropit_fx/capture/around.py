"""A model's own hooks, around its forward: what they make of its inputs and of its result.

They go with the graph and run around it in each call. What the forward is given is what they make,
so the graph is traced with that; and what they keep for the backward is a part of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dropit_fx.capture.faithful.hooks import home_of, place_of
from dropit_fx.capture.fake import blank_as, fake_mode_of, fake_state, fakes_of
from dropit_fx.private import HOOK_DICTS, pytree

log = logging.getLogger(__name__)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_BEFORE, _BEHIND = HOOK_DICTS[0], HOOK_DICTS[2]
_LIBRARIES = ("torch.", "dropit_fx.")


def hooks_of(model: nn.Module, kinds: tuple[str, ...] = (_BEFORE, _BEHIND)) -> list[Any]:
    """The model's forward hooks; none where a library's are among them, which move parameters."""
    hooks = [hook for kind in kinds for hook in (vars(model).get(kind) or {}).values()]
    return [] if any(home_of(hook).startswith(_LIBRARIES) for hook in hooks) else hooks


def said(model: nn.Module) -> str:
    """Which hooks these are, and where they are written."""
    return ", ".join(map(place_of, hooks_of(model)))


def called_with(model: nn.Module, forward: Callable[..., Any], given: Inputs) -> Any:
    """What a call of the model gives whose forward is another: its hooks run around that."""
    with _forward(model, forward):
        return nn.Module.__call__(model, *given[0], **given[1])


def hooked(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """What the model's forward is given in a call, on which its hooks run once, on fake tensors.

    What a hook has made is blank memory of the same layout. Where the hooks do not run on fake
    tensors, the inputs are as they were.
    """
    given: Inputs = tuple(args), dict(kwargs)
    if not hooks_of(model, (_BEFORE,)):
        return given
    leaves, spec = pytree.tree_flatten(given)
    fakes = fakes_of(leaves)
    mode = fake_mode_of(fakes)
    own = {id(fake): value for fake, value in zip(fakes, leaves, strict=True)}
    seen: list[Inputs] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        raise _Seen

    try:
        with torch.random.fork_rng(devices=()), mode, torch.enable_grad(), fake_state(model, mode):
            called_with(model, forward, pytree.tree_unflatten(list(fakes), spec))
    except Exception as error:  # the user's code ran: anything can be raised
        if not seen:
            log.info("on fake tensors: %s, of %s", error, said(model))
            return given

    def real(value: Any) -> Any:
        if id(value) in own:
            return own[id(value)]
        return blank_as(value) if isinstance(value, Tensor) else value

    made: Inputs = pytree.tree_map(real, seen[0])
    return made


class _Seen(Exception):
    """The forward was reached, and its inputs are seen."""


@contextmanager
def _forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another function is the model's forward for a while."""
    own = vars(model)
    before = {name: value for name, value in own.items() if name == "forward"}
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        own.update(before)
