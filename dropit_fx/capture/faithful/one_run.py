"""What one run computes, forward and backward, all values numbered; what another does otherwise."""

from __future__ import annotations

import functools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dropit_fx.capture.faithful.numbering import WORD, Numbers, constant, frozen
from dropit_fx.capture.fake import fake_mode_of, fake_state, fakes_of
from dropit_fx.holders import nodes_behind
from dropit_fx.private import pytree
from dropit_fx.private_hooks import checkpoints_run_by

_OVERWRITTEN = "modified by an inplace operation"
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What one run computed, in numbers: equal for equal computations.

    Attributes:
        outputs: For each leaf of the result: a number and whether it requires a gradient, or the
            plain value.
        grads: Name of a parameter or input -> number of its gradient, None where there is none.
        written: Name of a parameter, buffer, input or constant -> number of what it is afterwards,
            where that is not what it was.
        where: Number of each value -> the module and the line that made it, in order.
        lost: What no graph carries over, and the line.
        functions: Names of the custom ``autograd.Function`` s in the backward.
        checkpoints: How many regions are checkpointed.
        attached: Attributes that inputs, outputs, parameters and buffers are given
            (``output 0.note``).
        structure: The tree spec of the result.
    """

    outputs: tuple[Any, ...]
    grads: Mapping[str, int | None]
    written: Mapping[str, int]
    where: Mapping[int, str]
    lost: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    checkpoints: int = 0
    attached: tuple[str, ...] = ()
    structure: Any = None


def meaning(
    module: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Collection[str] | None = None,
    shared: bool = False,
) -> Meaning:
    """Runs ``run(*args, **kwargs)`` and its backward on fake tensors, and numbers what comes out.

    The caller puts back what the run leaves in ``module`` and in random states.

    Args:
        module: Whose parameters and buffers are read.
        run: Its forward.
        args: Its inputs; only shapes and dtypes are read.
        kwargs: Its keyword inputs.
        names: Of the model's parameters and buffers; what else a graph holds are constants. None:
            all of them are.
        shared: Inputs that are one tensor are one in the run, too, of which a model may ask
            (``a is b``). Usually each is its own: a graph that reads one for the other shows.
    """
    constants = {
        n: constant(b) for n, b in module.named_buffers() if names is not None and n not in names
    }
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    fakes = fakes_of(leaves)
    if shared:
        first: dict[int, Any] = {}
        fakes = tuple(first.setdefault(id(v), f) for v, f in zip(leaves, fakes, strict=True))
    mode = fake_mode_of(fakes)
    numbers = Numbers(module)
    watch = _Lost(numbers.here)
    with (
        torch.random.fork_rng(devices=()),
        warnings.catch_warnings(),
        mode,
        torch.enable_grad(),
        fake_state(module, mode, real=constants),  # as those of the model are
    ):
        warnings.simplefilter("ignore")
        torch.clear_autocast_cache()  # an earlier run's copies of weights have no number here
        torch.default_generator.manual_seed(0)
        state = _state(module)
        inputs = {f"input {i}": t for i, t in enumerate(fakes) if isinstance(t, Tensor)}
        for name, tensor in (*state.items(), *inputs.items()):
            numbers.name(tensor, name, constants.get(name))
        had = {n: {*vars(t)} for n, t in (*state.items(), *inputs.items())}
        before = {n: numbers.of(t) for n, t in (*state.items(), *inputs.items())}
        given_args, given_kwargs = pytree.tree_unflatten(list(fakes), spec)
        with numbers:
            with watch, _counting_checkpoints() as checkpoints:
                result = run(*given_args, **given_kwargs)
            outputs, structure = pytree.tree_flatten(result)
            grads, functions = _backward(outputs, state | inputs, numbers)
        after = {n: numbers.of(t) for n, t in (*_state(module).items(), *inputs.items())}
        written = {n: number for n, number in after.items() if before.get(n) != number}
        grads = {n: g for n, g in grads.items() if n not in constants}
        return Meaning(
            outputs=tuple(
                (numbers.of(t), t.requires_grad) if isinstance(t, Tensor) else frozen(t)
                for t in outputs
            ),
            grads=grads,
            written=written | numbers.written_constants(),
            where=numbers.where,
            lost=tuple(watch.found),
            functions=functions,
            checkpoints=len(checkpoints),
            attached=tuple(_attached(state | inputs, had, outputs, mode)),
            structure=structure,
        )


def _attached(
    known: Mapping[str, Tensor], had: Mapping[str, set[str]], outputs: list[Any], mode: Any
) -> Iterator[str]:
    """``Meaning.attached``."""
    torchs = {*vars(mode.from_tensor(torch.empty(0))), "_is_param"}
    made = {f"output {i}": t for i, t in enumerate(outputs) if isinstance(t, Tensor)}
    for label, tensor in (*known.items(), *made.items()):
        for name in vars(tensor):
            if name not in torchs and name not in had.get(label, ()):
                yield f"{label}.{name}"


def difference(model: Meaning, graph: Meaning) -> str:
    """What the graph does otherwise than the model, with the model's line; ``""`` for nothing."""
    wrong = ""
    if len(model.outputs) != len(graph.outputs):
        wrong = f"it returns {len(model.outputs)} values, the graph {len(graph.outputs)}"
    elif model.outputs != graph.outputs:
        at = next(
            i for i, (a, b) in enumerate(zip(model.outputs, graph.outputs, strict=True)) if a != b
        )
        wrong = f"output {at} is computed otherwise"
        a, b = model.outputs[at], graph.outputs[at]
        if isinstance(a, tuple) and isinstance(b, tuple) and a[:1] == b[:1]:
            wrong = f"output {at} requires {'a' if a[1] else 'no'} gradient in the model alone"
    elif model.written != graph.written:
        wrong = f"what is written to {_some(_differing(model.written, graph.written))} differs"
    elif names := _differing(model.grads, graph.grads):
        wrong = f"the gradient of {_some(names)} differs"
        if model.functions:
            wrong += f" (custom backward: {', '.join(model.functions)})"
    elif model.checkpoints > graph.checkpoints:  # some models do so in training mode alone
        wrong = f"of {model.checkpoints} checkpointed regions the graph has {graph.checkpoints}"
    if not wrong:
        return ""
    line = next((where for number, where in model.where.items() if number not in graph.where), "")
    return f"is not faithful: {wrong}{f'; the first op that it lacks: {line}' if line else ''}"


def _differing(model: Mapping[str, Any], graph: Mapping[str, Any]) -> list[str]:
    """The names whose values differ; a graph has no parameter that nothing reads."""
    return [n for n in {**model, **graph} if model.get(n) != graph.get(n)]


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@contextmanager
def _counting_checkpoints() -> Iterator[list[object]]:
    """Yields a list with an item for each checkpointed region that runs."""
    found: list[object] = []

    def around(options: object, usual: Callable[[], Iterator[None]]) -> Iterator[None]:
        found.append(options)
        yield from usual()

    with checkpoints_run_by(around):
        yield found


def named(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under every name that they have."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are tied under the first of their names."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(named(module), key=lambda pair: pair[0]):
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _backward(
    outputs: list[Any], leaves: dict[str, Tensor], numbers: Numbers
) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Numbers of the gradients, and the custom functions on their way."""
    differentiated = [
        t for t in outputs if isinstance(t, Tensor) and t.requires_grad and t.grad_fn is not None
    ]
    wanted = {n: t for n, t in leaves.items() if t.requires_grad and t.is_leaf}
    if not differentiated or not wanted:
        return dict.fromkeys(wanted), ()
    behind: list[Any] = nodes_behind(differentiated, 0)
    custom = [n for n in behind if isinstance(n, torch.autograd.function.BackwardCFunction)]
    functions = tuple(dict.fromkeys(type(n).__name__.removesuffix("Backward") for n in custom))
    theirs = [n.variable for n in behind if hasattr(n, "variable")]  # some are the model's own
    absent = not torch.cuda.is_available()
    if absent and any(t.device.type == "cuda" for t in differentiated):
        return {}, functions  # fake tensors of a GPU that is not there: no backward runs
    cotangents = []
    for i, t in enumerate(differentiated):
        cotangents.append(torch.empty_like(t, requires_grad=False))
        numbers.name(cotangents[-1], f"cotangent {i}")
    grads: dict[str, int | None] = dict.fromkeys(wanted)

    def arrives(name: str, grad: Tensor) -> None:
        grads[name] = ((grads[name] or 0) + numbers.of(grad)) & WORD

    for name, tensor in wanted.items():  # whether .grad is a copy depends on who else holds it
        tensor.register_hook(functools.partial(arrives, name))  # type: ignore[no-untyped-call]
    had = [t.grad for t in theirs]
    for tensor in theirs:
        tensor.grad = None
    try:  # grad() stops at reentrant checkpoints
        torch.autograd.backward(differentiated, cotangents)
    except RuntimeError as error:
        if _OVERWRITTEN not in str(error):
            raise
        return {_OVERWRITTEN: 1}, functions  # the same is due in the graph
    finally:
        for tensor, grad in zip(theirs, had, strict=True):
            tensor.grad = grad
    return grads, functions


class _Lost(TorchFunctionMode):
    """Notes what tracers lose: hooks of tensors, and the weight of ``F.l1_loss``.

    That hands all of its arguments but the weight to whoever traces it.
    """

    def __init__(self, here: Callable[[], str]) -> None:
        super().__init__()
        self.here = here
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _HOOKS and getattr(Tensor, func.__name__) == func:
            self.found.append(f"a tensor is given a hook in {self.here()}")
            return RemovableHandle(OrderedDict()) if func.__name__ != "retain_grad" else None
        if func is F.l1_loss and sys._getframe(2).f_locals.get("weight") is not None:
            self.found.append(
                f"F.l1_loss forgets its weight where it is traced ((x - y).abs() * weight has it),"
                f" in {self.here()}"
            )
        return func(*args, **(kwargs or {}))
