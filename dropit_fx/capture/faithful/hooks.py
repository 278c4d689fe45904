"""Which hooks a graph would lose, and how those that it need not lose go with it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dropit_fx.private import HOOK_DICTS, has_any_global_hook
from dropit_fx.runtime.overrides import override_of

INSIDE = "_dropit_hooks_inside"  # of a class whose forward runs PyTorch's hooks


class NotCarried(RuntimeError):
    """Something that the model does and a graph does not; the message says what, and where."""


def refuse_hooks(model: nn.Module) -> None:
    """Raises NotCarried where a hook would be lost: on a submodule, or on every module.

    Those of the model itself go over to the graph module. PyTorch's own (weight norm, pruning) are
    part of what is computed, and of the graph.
    """
    if has_any_global_hook():  # type: ignore[no-untyped-call]
        raise NotCarried("hooks are registered for all modules (register_module_forward_hook, ...)")
    for name, module in model.named_modules():
        if module is model:
            continue
        for kind in HOOK_DICTS:
            hooks = vars(module).get(kind)
            for hook in hooks.values() if isinstance(hooks, dict) else ():
                if callable(hook) and not is_torchs(hook) and not _asks_for_gradients(hook):
                    kind = kind.strip("_").replace("_", " ").removesuffix("s")
                    whose = f"module '{name}' ({type(module).__name__})"
                    raise NotCarried(f"{whose} has a {kind}, {place_of(hook)}")


def refuse_overrides(model: nn.Module) -> None:
    """Raises NotCarried for a parameter or buffer whose class says in Python what ops do.

    Runs on fake tensors do not see it: what is shown of a graph, and told of its bytes, is of other
    ops. Classes that are made of tensors (quantised ones, DTensor) are those classes there too.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor)
        own = override_of(kind)
        seen_there = hasattr(kind, "__tensor_flatten__")
        if own is not None and not seen_there and not kind.__module__.startswith("torch."):
            raise NotCarried(f"'{name}' is a {kind.__name__}: {place_of(own)} says what its ops do")


def _asks_for_gradients(hook: Any) -> bool:
    """Whether it is Hugging Face's of gradient checkpointing: embeddings require a gradient.

    Tracers run it, and the proof sees whether that is lost.
    """
    name = str(getattr(hook, "__qualname__", ""))
    return home_of(hook).startswith("transformers.") and "enable_input_require_grads" in name


def called(model: nn.Module) -> Callable[..., Any]:
    """What a call of the model runs, less its hooks: a class may checkpoint in its ``__call__``."""
    hooked = any(isinstance(h, dict) and h for h in map(vars(model).get, HOOK_DICTS))
    own = type(model).__call__ is not nn.Module.__call__
    return model if own and not hooked else model.forward


def place_of(function: Any) -> str:
    """``name (file:line)``."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def place_of_forward(module: nn.Module) -> str:
    """Where its class says what a call runs; of TorchScript's, which do not, the name."""
    forward = getattr(type(module), "forward", None)
    return type(module).__name__ if forward is None else place_of(forward)


@contextmanager
def torchs_hooks_inside(model: nn.Module) -> Iterator[None]:
    """Makes PyTorch's own pre-hooks of the model a part of its forward, for a while.

    They compute a weight from others before each call; tracers start at the forward.
    """
    kind, registered = type(model), vars(model)[HOOK_DICTS[0]]
    hooks = {key: h for key, h in registered.items() if is_torchs(h)}
    if not hooks:
        yield
        return

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for hook in hooks.values():
            hook(self, args)
        return kind.forward(self, *args, **kwargs)

    before = dict(registered)
    for key in hooks:  # some write into buffers: they run once in each call
        del registered[key]
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, INSIDE: [*hooks.values()]})
    try:
        yield
    finally:
        model.__class__ = kind
        registered.clear()
        registered.update(before)


def own_hooks(model: nn.Module, kind: str) -> Any:
    """The hooks of one of the model's dicts, or their flag, less PyTorch's own; a copy.

    Exported programs check their inputs in a hook, which reads what an exported module alone has.
    """
    hooks = vars(model)[kind]
    if not isinstance(hooks, dict):
        return hooks
    less = ("torch.nn.utils.", "torch.export.")
    return type(hooks)((k, h) for k, h in hooks.items() if not home_of(h).startswith(less))


def is_torchs(hook: Any) -> bool:
    """Whether it is PyTorch's own: weight norm, pruning."""
    return home_of(hook).startswith("torch.nn.utils.")


def home_of(hook: Any) -> str:
    """The name of the module that it, or its class, was defined in."""
    return str(getattr(hook, "__module__", None) or type(hook).__module__)
