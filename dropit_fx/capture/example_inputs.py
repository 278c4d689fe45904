"""Example inputs: as given, as the model tells them, or guessed from its first layer.

Only their shapes and dtypes are read.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropit_fx.capture.fake import as_activation, blank, fake_mode_of, fake_state
from dropit_fx.capture.trace import CaptureError
from dropit_fx.capture.untouched import untouched
from dropit_fx.private import ConvNd, codegen, pytree, storage_id

log = logging.getLogger(__name__)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def resolve(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> Inputs:
    """The example inputs, guessed where none are given.

    Raises:
        TypeError: ``args`` is no tuple or list (a bare tensor is a common slip).
        CaptureError: None are given and they cannot be guessed.
    """
    if args is not None and not isinstance(args, tuple | list):
        raise TypeError(
            f"example_args is a tuple of inputs, not a {type(args).__name__}: write (x,)"
        )
    if args is None and kwargs is None:
        return guess(model)
    return tuple(args or ()), dict(kwargs or {})


def guess(model: nn.Module) -> Inputs:
    """Inputs of a shape that the model tells, or its first layer.

    Models tell it by timm's config or by Hugging Face's ``dummy_inputs``.

    Raises:
        CaptureError: No shape makes the model run.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tried = []
    for args, kwargs in _candidates(model):
        place: Inputs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        try:
            _dry_run(model, *place)
        except Exception as error:  # the user's code ran: anything can be raised
            tried.append(
                f"{_shapes(args, kwargs)}: {str(error).splitlines()[0] if str(error) else error!r}"
            )
            continue
        return place
    detail = "\n  ".join(tried) or "no layer tells what the input looks like"
    raise CaptureError(
        f"the shapes of {type(model).__name__}'s inputs are needed and could not be guessed;"
        f" give example_args or example_kwargs. Tried:\n  {detail}"
    )


def record(
    model: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Inputs]:
    """What each named submodule is called with in one run of the model, as blank tensors.

    They require a gradient where they can: as leaves what the model itself was given, and as
    activations what it has made.

    Raises:
        CaptureError: The model stops before one of them, on fake tensors and on real ones.
    """
    for run in (_dry_run, _real_run):
        seen: dict[str, Inputs] = {}
        outside: set[int] = set()
        try:
            run(model, args, kwargs, _Watch(names, seen, outside))
        except Exception as error:  # the user's code ran: anything can be raised
            failed = error
        else:
            break
        if all(n in seen for n in names):
            break
    else:
        missing = next(n for n in names if n not in seen)
        raise CaptureError(
            f"{type(model).__name__} does not run on inputs of the example's shapes, and"
            f" stopped before submodule '{missing}': {type(failed).__name__}: {failed}"
        ) from failed

    def alike(t: Tensor) -> Tensor:
        made = blank(t)
        leaf = storage_id(t) in outside or not made.requires_grad
        return made if leaf else as_activation(made)

    return {n: pytree.tree_map_only(Tensor, alike, given) for n, given in seen.items()}


@dataclass
class _Watch:
    """Notes what submodules are called with while a model runs."""

    names: list[str]
    seen: dict[str, Inputs]
    outside: set[int]  # storages of the model's inputs, parameters and buffers

    @contextmanager
    def on(self, model: nn.Module, *given: Any) -> Iterator[None]:
        tensors = (*pytree.tree_leaves(given), *model.parameters(), *model.buffers())
        self.outside |= {storage_id(t) for t in tensors if isinstance(t, Tensor)}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.seen.setdefault(name, (args, kwargs))

            return hook

        hooks = [
            model.get_submodule(n).register_forward_pre_hook(
                note(n), prepend=True, with_kwargs=True
            )
            for n in self.names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _real_run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: _Watch
) -> None:
    """Runs a copy of the model: a run leaves traces, in statistics and wherever a model likes.

    What a copy shares with the model (globals, class attributes, random states) is put back, and
    the whole model where it cannot be copied.
    """
    try:
        run = copy.deepcopy(model)
    except Exception as error:  # a model may hold anything: locks, files, non-leaf tensors
        log.info("%s cannot be copied: %s", type(model).__name__, error)
        run = model
    with untouched(model, values=run is model), torch.no_grad():
        given = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        with watch.on(run, *given):
            run(*given[0], **given[1])


def _dry_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: _Watch | None = None,
) -> None:
    """Runs the model on fake tensors; nothing of them stays in it."""
    mode = fake_mode_of(())
    fakes = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    watching = watch.on if watch is not None else lambda *given: nullcontext()
    with untouched(model), mode, torch.no_grad(), fake_state(model, mode), watching(model, fakes):
        model(*fakes[0], **fakes[1])


def _candidates(model: nn.Module) -> list[Inputs]:
    out: list[Inputs] = []
    told = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = told.get("input_size") if isinstance(told, Mapping) else None
    if size:
        out.append(((torch.zeros(2, *size),), {}))
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        out.append(((), dict(dummy)))
    first = next((m for m in model.modules() if _input_shapes(m)), None)
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if first is not None and len(required) == 1:
        is_lookup = isinstance(first, nn.Embedding)
        dtype = torch.long if is_lookup else next(first.parameters()).dtype
        out += [((torch.zeros(shape, dtype=dtype),), {}) for shape in _input_shapes(first)]
    return out


def _input_shapes(layer: nn.Module) -> list[tuple[int, ...]]:
    if isinstance(layer, ConvNd):
        dims = len(layer.kernel_size)
        return [(2, layer.in_channels, *[n] * dims) for n in (224, 64, 32, 28)]
    if isinstance(layer, nn.Linear):
        return [(4, layer.in_features), (2, 8, layer.in_features)]
    return [(2, 16)] if isinstance(layer, nn.Embedding) else []


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves = pytree.tree_leaves((args, kwargs))
    return ", ".join(str(tuple(t.shape)) for t in leaves if isinstance(t, Tensor))


def placeholder_values(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The example inputs in the order of the graph's placeholders; defaults where none is given."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    info = getattr(codegen(graph_module.graph), "pytree_info", None)
    if info is not None and info.in_spec is not None:
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        if len(leaves) == len(placeholders):
            return tuple(leaves)
        raise CaptureError(
            f"the graph takes {len(placeholders)} inputs, the example has {len(leaves)}; its"
            " example_kwargs must be those that it was exported with, in their order"
        )
    names = [str(n.target) for n in placeholders]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    missing = [n.name for n in placeholders if n.target not in values and not n.args]
    if missing or len(args) > len(names):
        raise CaptureError(
            f"example_args does not fit the model's inputs ({', '.join(names)})"
            + (f"; missing: {', '.join(missing)}" if missing else "")
        )
    return tuple(values[str(n.target)] if n.target in values else n.args[0] for n in placeholders)
