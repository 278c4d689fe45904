"""The proof that a captured graph does what its model does.

A tracer drops without a word what it does not see: custom backwards, tensor hooks, writes through
aliases, chance of fixed shape, a replaced ``forward``. So the model and the graph both run on fake
tensors, forward and backward, and every value is numbered by how it came about: the op, the numbers
of what it read, and for a random op what the generator's state was (value numbering). Equal numbers
are equal computations, in whatever order and with whatever names; views and in-place writes are
followed storage by storage. What must agree: outputs, gradients of parameters and inputs, and what
is written to parameters, buffers, inputs and constants.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dropit_fx.capture.fake import fake_mode_of, fake_state, fakes_of
from dropit_fx.capture.provenance import OURS, error_line, first_line
from dropit_fx.capture.untouched import Change, untouched
from dropit_fx.private import (
    HOOK_DICTS,
    FakeTensor,
    OpOverload,
    TorchDispatchMode,
    checkpoints_run_by,
    compiling_state_context,
    disable_current_modes,
    has_any_global_hook,
    pytree,
    schema,
    storage_id,
)

log = logging.getLogger(__name__)

_WORD = (1 << 61) - 1
# copies, and the gradient of a slice of everything, which export writes out
_SAME = ("aten::clone", "aten::lift_fresh", "aten::lift_fresh_copy", "aten::slice_backward")
_OVERWRITTEN = "modified by an inplace operation"
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_INSIDE = "_dropit_hooks_inside"  # of a class whose forward runs PyTorch's hooks


class NotCarried(RuntimeError):
    """Something that the model does and a graph does not; the message says what, and where."""


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
        hooks: Lines at which a tensor was given a hook.
        functions: Names of the custom ``autograd.Function`` s in the backward.
        checkpoints: How many regions are checkpointed.
    """

    outputs: tuple[Any, ...]
    grads: Mapping[str, int | None]
    written: Mapping[str, int]
    where: Mapping[int, str]
    hooks: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    checkpoints: int = 0


class Study:
    """What a model does in both modes, against which its graphs are held.

    Args:
        model: As the user has it; it is left so.
        args: Example inputs.
        kwargs: Example keyword inputs.

    Raises:
        NotCarried: In its own mode it does what no graph does: assigns attributes, draws in Python
            or NumPy, gives a tensor a hook.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs, self.training = args, kwargs, model.training
        self._of = model
        self._names = frozenset(n for n, _ in _named(model))
        self._model: dict[bool, Meaning | str] = {}
        for training in (self.training, not self.training):
            with _in_mode(model, training):
                self._model[training] = self._look(model, training)

    def _look(self, model: nn.Module, training: bool) -> Meaning | str:
        """What it does in one mode, or why that is not known."""
        found: Meaning | None = None
        failed: Exception | None = None
        with untouched(model, generators=training == self.training) as seen:
            try:
                found = meaning(model, _called(model), self.args, self.kwargs)
            except Exception as error:  # the user's code ran: anything can be raised
                failed = error
        changes = [c for c in seen.changes if not _is_benign(model, c)]
        reason = ""
        if found is not None and found.hooks:
            reason = f"a tensor is given a hook in {found.hooks[0]}"
        elif seen.chance:
            reason = f"it draws from {seen.chance[0]}, in {_place_of(type(model).forward)}"
        elif changes:
            reason = _assigned(model, changes[0])
        if reason and training == self.training:
            raise NotCarried(reason) from failed
        if reason and found is not None:
            log.warning("in %s mode, %s: the graph leaves that out", _MODES[training], reason)
        if found is not None:
            return found
        assert failed is not None
        return (
            "cannot be shown to be so, since the model does not run on fake tensors of the"
            f" example's shapes: {error_line(failed)}: {first_line(failed)}"
        )

    def difference(self, graph: nn.Module, training: bool, exported: bool = False) -> str:
        """What ``graph`` does otherwise than the model in this mode; ``""`` for nothing.

        Args:
            graph: A graph module with the model's parameters.
            training: The mode to look at.
            exported: It comes from ``torch.export``. A model's code may ask whether it is exported,
                and do the same by other ops then: what it does when told so counts as well.
        """
        model = self._model[training]
        if isinstance(model, str):
            return model
        with _in_mode(graph, training):
            found = meaning(graph, graph.forward, self.args, self.kwargs, self._names)
        wrong = difference(model, found)
        if not wrong or not exported:
            return wrong
        with _in_mode(self._of, training), untouched(self._of), compiling_state_context():
            told = meaning(self._of, self._of.forward, self.args, self.kwargs)
        return "" if not difference(told, found) else wrong


_MODES = ("eval", "training")


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Puts a module in training or eval mode for a while, if it is not."""
    if module.training == training:
        yield
        return
    with untouched(module):  # train() and eval() may be the user's own
        module.train(training)
        yield


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
                if callable(hook) and not _is_torchs(hook) and not _asks_for_gradients(hook):
                    kind = kind.strip("_").replace("_", " ").removesuffix("s")
                    whose = f"module '{name}' ({type(module).__name__})"
                    raise NotCarried(f"{whose} has a {kind}, {_place_of(hook)}")


def _asks_for_gradients(hook: Any) -> bool:
    """Whether it is Hugging Face's of gradient checkpointing: embeddings require a gradient.

    Tracers run it, and the proof sees whether that is lost.
    """
    name = str(getattr(hook, "__qualname__", ""))
    return _home(hook).startswith("transformers.") and "enable_input_require_grads" in name


def _called(model: nn.Module) -> Callable[..., Any]:
    """What a call of the model runs, less its hooks: a class may checkpoint in its ``__call__``."""
    hooked = any(isinstance(h, dict) and h for h in map(vars(model).get, HOOK_DICTS))
    own = type(model).__call__ is not nn.Module.__call__
    return model if own and not hooked else model.forward


def _place_of(function: Any) -> str:
    """``name (file:line)``."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _assigned(model: nn.Module, change: Change) -> str:
    """Says which attribute, of which module, is assigned where."""
    owner, name = model.get_submodule(change.module), change.module
    whose = f"module '{name}' ({type(owner).__name__})" if name else "the model itself"
    found = f"{whose} changes {change.attribute!r} while it runs"
    return f"{found}, in {_place_of(type(owner).forward)} (a cache: call the model once)"


def _is_benign(model: nn.Module, change: Change) -> bool:
    """A memory of results, PyTorch's own bookkeeping, or what its hooks make of parameters."""
    if hasattr(change.new, "cache_info"):
        return True
    if change.attribute.endswith(".grad"):  # of parameters that are fake already: our own backward
        return True
    if isinstance(change.new, FakeTensor) and change.old is change.new:
        return True  # fake already, and written: the proof compares what is written
    owner, attribute = model.get_submodule(change.module), change.attribute
    if type(owner).__module__.startswith("torch.nn.") and attribute.startswith("_flat_weight"):
        return True  # of recurrent layers
    parameters = dict(owner.named_parameters(recurse=False))
    made = any(f"{attribute}_{end}" in parameters for end in ("orig", "g"))
    moved = vars(type(owner)).get(_INSIDE, ())
    return made and any(map(_is_torchs, (*moved, *vars(owner)[HOOK_DICTS[0]].values())))


@contextmanager
def torchs_hooks_inside(model: nn.Module) -> Iterator[None]:
    """Makes PyTorch's own pre-hooks of the model a part of its forward, for a while.

    They compute a weight from others before each call; tracers start at the forward.
    """
    kind, registered = type(model), vars(model)[HOOK_DICTS[0]]
    hooks = {key: h for key, h in registered.items() if _is_torchs(h)}
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
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, _INSIDE: [*hooks.values()]})
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
    return type(hooks)((k, h) for k, h in hooks.items() if not _home(h).startswith(less))


def _is_torchs(hook: Any) -> bool:
    return _home(hook).startswith("torch.nn.utils.")


def _home(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def meaning(
    module: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Collection[str] | None = None,
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
    """
    constants = {
        n: _constant(b) for n, b in module.named_buffers() if names is not None and n not in names
    }
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    fakes = fakes_of(leaves)
    mode = fake_mode_of(fakes)
    numbers = _Numbers(module)
    watch = _TensorHooks(numbers.here)
    with (
        torch.random.fork_rng(devices=()),
        warnings.catch_warnings(),
        mode,
        torch.enable_grad(),
        fake_state(module, mode),
    ):
        warnings.simplefilter("ignore")
        torch.clear_autocast_cache()  # an earlier run's copies of weights have no number here
        torch.default_generator.manual_seed(0)
        state = _state(module)
        inputs = {f"input {i}": t for i, t in enumerate(fakes) if isinstance(t, Tensor)}
        for name, tensor in (*state.items(), *inputs.items()):
            numbers.name(tensor, name, constants.get(name))
        before = {n: numbers.of(t) for n, t in (*state.items(), *inputs.items())}
        given_args, given_kwargs = pytree.tree_unflatten(list(fakes), spec)
        with numbers:
            with watch, _counting_checkpoints() as checkpoints:
                result = run(*given_args, **given_kwargs)
            outputs = pytree.tree_leaves(result)
            grads, functions = _backward(outputs, state | inputs, numbers)
        after = {n: numbers.of(t) for n, t in (*_state(module).items(), *inputs.items())}
        written = {n: number for n, number in after.items() if before.get(n) != number}
        grads = {n: g for n, g in grads.items() if n not in constants}
        return Meaning(
            outputs=tuple(
                (numbers.of(t), t.requires_grad) if isinstance(t, Tensor) else _frozen(t)
                for t in outputs
            ),
            grads=grads,
            written=written | numbers.written_constants(),
            where=numbers.where,
            hooks=tuple(watch.found),
            functions=functions,
            checkpoints=len(checkpoints),
        )


@contextmanager
def _counting_checkpoints() -> Iterator[list[object]]:
    """Yields a list with an item for each checkpointed region that runs."""
    found: list[object] = []

    def around(options: object, usual: Callable[[], Iterator[None]]) -> Iterator[None]:
        found.append(options)
        yield from usual()

    with checkpoints_run_by(around):
        yield found


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


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under every name that they have."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are tied under the first of their names."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(_named(module), key=lambda pair: pair[0]):
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _backward(
    outputs: list[Any], leaves: dict[str, Tensor], numbers: _Numbers
) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Numbers of the gradients, and the custom functions on their way."""
    differentiated = [
        t for t in outputs if isinstance(t, Tensor) and t.requires_grad and t.grad_fn is not None
    ]
    wanted = {n: t for n, t in leaves.items() if t.requires_grad and t.is_leaf}
    if not differentiated or not wanted:
        return dict.fromkeys(wanted), ()
    functions = _custom_functions(differentiated)
    absent = not torch.cuda.is_available()
    if absent and any(t.device.type == "cuda" for t in differentiated):
        return {}, functions  # fake tensors of a GPU that is not there: no backward runs
    cotangents = []
    for i, t in enumerate(differentiated):
        cotangents.append(torch.empty_like(t, requires_grad=False))
        numbers.name(cotangents[-1], f"cotangent {i}")
    grads: dict[str, int | None] = dict.fromkeys(wanted)

    def arrives(name: str, grad: Tensor) -> None:
        grads[name] = ((grads[name] or 0) + numbers.of(grad)) & _WORD

    for name, tensor in wanted.items():  # whether .grad is a copy depends on who else holds it
        tensor.register_hook(functools.partial(arrives, name))  # type: ignore[no-untyped-call]
    try:  # grad() stops at reentrant checkpoints
        torch.autograd.backward(differentiated, cotangents)
    except RuntimeError as error:
        if _OVERWRITTEN not in str(error):
            raise
        return {_OVERWRITTEN: 1}, functions  # the same is due in the graph
    return grads, functions


def _custom_functions(outputs: list[Tensor]) -> tuple[str, ...]:
    stack: list[Any] = [t.grad_fn for t in outputs]
    seen, found = set[Any](), dict[str, None]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[type(node).__name__.removesuffix("Backward")] = None
        stack.extend(following for following, _ in node.next_functions)
    return tuple(found)


class _TensorHooks(TorchFunctionMode):
    """Notes where a tensor is given a hook."""

    def __init__(self, here: Callable[[], str]) -> None:
        super().__init__()
        self.here = here
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _HOOKS and getattr(Tensor, func.__name__) == func:
            self.found.append(self.here())
            return RemovableHandle(OrderedDict()) if func.__name__ != "retain_grad" else None
        return func(*args, **(kwargs or {}))


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers every value that is made while it is on, in the forward and in the backward.

    A storage has a number for its content; a tensor's number is that with its place in the
    storage. An op that writes gives the storage a new one.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(m): n for n, m in module.named_modules()}
        self.where: dict[int, str] = {}
        self._content: dict[int, int] = {}
        self._constants: dict[int, tuple[int, Tensor]] = {}
        self._held: list[Any] = []  # a key is a storage's address, good while the storage lives

    def name(self, tensor: Tensor, label: str, content: int | None = None) -> None:
        """Says what a tensor holds: what is called so, or the constant of this number."""
        self._set(tensor, hash(("given", label)) if content is None else content)

    def of(self, tensor: Tensor) -> int:
        """The number of a tensor."""
        place: tuple[Any, ...] = tuple(tensor.shape), tensor.dtype
        if tensor.layout == torch.strided:
            place += tuple(tensor.stride()), tensor.storage_offset()
        return hash((self._content_of(tensor), *place))

    def written_constants(self) -> dict[str, int]:
        """Constants that are not what they were when they were first seen."""
        found = {}
        for key, (first, tensor) in self._constants.items():
            if self._content[key] != first:
                found[f"constant of shape {tuple(tensor.shape)} ({first:x})"] = self._content[key]
        return found

    def here(self) -> str:
        """``module 'blocks.0' (file.py:12)``: the innermost module and line of the user's."""
        frame: FrameType | None = inspect.currentframe()
        line = module = ""
        while frame is not None and (not line or not module):
            code = frame.f_code
            theirs = "/torch/" not in code.co_filename and not code.co_filename.startswith(OURS)
            if not line and theirs and "<" not in code.co_filename:
                line = f"{code.co_filename}:{frame.f_lineno}"
            owner = frame.f_locals.get("self") if code.co_argcount else None
            if not module and owner is not None and id(owner) in self.names:
                module = self.names[id(owner)] or "the model itself"
            frame = frame.f_back
        module = f"module '{module}'" if module else "a backward"
        return f"{module} ({line})" if line else module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") == "prim":  # it asks for a device
            return func(*args, **kwargs)
        if not isinstance(func, OpOverload):
            with self:  # a higher-order op: what its body does is what counts
                return func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        key = self._key(func, args, kwargs)
        written = _written(func, args, kwargs)
        constant = given and not any(isinstance(t, FakeTensor) for t in given)
        if constant and not written and torch.Tag.nondeterministic_seeded not in func.tags:
            with disable_current_modes():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if schema(func).name in _SAME:
            key = self._copied(args[0], out, key)
        known = {self._key_of(t) for t in given}
        if schema(func).name == "aten::copy_":
            key = self._copied(args[1], args[0], key)
        for tensor in written:
            old = self._content_of(tensor)
            whole = _covers(tensor)
            self._set(tensor, key if whole else hash(("write", old, self.of(tensor), key)))
            self.where.setdefault(self.of(tensor), self.here())
        for i, tensor in enumerate(pytree.tree_leaves(out)):
            if isinstance(tensor, Tensor) and self._key_of(tensor) not in known:
                if isinstance(tensor, FakeTensor):
                    self._set(tensor, hash((key, i)) if i else key)
                self.where.setdefault(self.of(tensor), self.here())
        return out

    def _key(self, func: Any, args: Any, kwargs: Any) -> int:
        """How an op's result comes about."""
        base = schema(func).name.rpartition("::")[2]
        base = base.removesuffix("_") if not base.endswith("__") else base
        if base == "add" and not isinstance(args[1], Tensor) and args[1] == 0:
            return self._content_of(args[0])  # as a count of batches does in eval mode
        if base == "add" and len(args) == 2 and not kwargs:
            a, b = args
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
                # sums of gradients come in an order that no one means
                return (self.of(a) + self.of(b)) & _WORD
        drawn: Any = ()
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn = _draw()
        return hash((base, self._frozen((args, kwargs)), drawn))

    def _copied(self, source: Tensor, out: Tensor, key: int) -> int:
        """The content of a copy: the source's, where that is all of a storage as the copy is."""
        if source.shape != out.shape or {source.layout, out.layout} != {torch.strided}:
            return key
        place = [(t.stride(), t.storage_offset(), t.dtype, _covers(t)) for t in (source, out)]
        whole = place[0] == place[1] and place[0][-1]
        return self._content_of(source) if whole else hash(("copy", self.of(source)))

    def _frozen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, tuple | list):
            return tuple(map(self._frozen, value))
        if isinstance(value, dict):
            return tuple((k, self._frozen(v)) for k, v in sorted(value.items()))
        return _frozen(value)

    def _key_of(self, tensor: Tensor) -> int:
        return storage_id(tensor) if tensor.layout == torch.strided else id(tensor)

    def _content_of(self, tensor: Tensor) -> int:
        key = self._key_of(tensor)
        if key not in self._content:
            self._set(tensor, _constant(tensor))
            self._constants[key] = self._content[key], tensor
        return self._content[key]

    def _set(self, tensor: Tensor, number: int) -> None:
        self._held.append(tensor.untyped_storage() if tensor.layout == torch.strided else tensor)
        self._content[self._key_of(tensor)] = number


def _frozen(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return type(value).__name__, value


def _constant(tensor: Tensor) -> int:
    """By value: a tracer may have copied it."""
    real = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    if real is None or real.is_meta or real.layout != torch.strided:
        return hash(("unknown", tuple(tensor.shape), tensor.dtype))
    with disable_current_modes(), torch.no_grad():
        flat = torch.empty(0, dtype=real.dtype, device=real.device).set_(real.untyped_storage())
        data = flat.detach().cpu().contiguous().view(torch.uint8)
        return hash(("constant", data.numpy().tobytes()))


def _draw() -> int:
    """The generator's state, which then moves on: fake tensors draw nothing."""
    with disable_current_modes():
        state = hash(torch.random.get_rng_state().numpy().tobytes())
        torch.rand(1)
    return state


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for i, argument in enumerate(schema(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _covers(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    if tensor.layout != torch.strided:
        return True
    return bool(tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes())
