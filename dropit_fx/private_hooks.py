"""Saved-tensor hooks and checkpoints of PyTorch, as far as their names are private.

As ``private.py``, of which it is a part: ``private_names.py`` has a line for each name.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any, NoReturn
from unittest import mock

from torch import Tensor, nn

from dropit_fx.private import HOOK_DICTS, has
from dropit_fx.private_lookup import look_up

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # pack, unpack


def hooks_in_force() -> Hooks | None:
    """The saved-tensor hooks that a tensor that is saved now goes through."""
    name = "torch._C._autograd._top_saved_tensors_default_hooks"
    found: Hooks | None = look_up(name)(False) if has(name) else None
    return found


def of_a_region(hooks: Hooks | None) -> bool:
    """Whether these hooks are those of a checkpointed region: what it saves is made again."""
    module = getattr(hooks[0], "__module__", "") if hooks else ""
    return bool(module == "torch.utils.checkpoint")


def region_at_work(hooks: Hooks | None) -> Any:
    """The region whose forward these hooks are of; None where it is made again, or none runs."""
    cells = getattr(hooks[0], "__closure__", None) if hooks and of_a_region(hooks) else None
    held = (cell.cell_contents for cell in cells or ())
    return next((one for one in held if isinstance(one, region_class())), None)


def in_backward() -> bool:
    """Whether this thread is in a backward."""
    name = "torch._C._current_graph_task_id"
    return not has(name) or look_up(name)() != -1


def weak_storage(x: Tensor) -> Any:
    """A weak reference to a storage: while there is one, no other storage has the same id.

    Its ``expired()`` tells whether the storage is gone.
    """
    return look_up("torch.multiprocessing.reductions.StorageWeakRef")(x.untyped_storage())


def forward_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks of a module."""
    return list(getattr(module, HOOK_DICTS[2]).values())


def drop_hooks(module: nn.Module, kind: type) -> None:
    """Removes the forward hooks and pre-hooks of a module that are of a kind, or methods of one."""
    for hooks in (getattr(module, HOOK_DICTS[0]), getattr(module, HOOK_DICTS[2])):
        for key, hook in list(hooks.items()):
            if isinstance(hook, kind) or isinstance(getattr(hook, "__self__", None), kind):
                del hooks[key]


def modules_at_work(forwards: Collection[CodeType] = ()) -> Iterator[nn.Module]:
    """The modules that this thread is in a call of, the innermost first.

    Args:
        forwards: The code of methods that are called as such too, not by calling the module.
    """
    return _selves({look_up("torch.nn.Module._call_impl").__code__, *forwards})


def is_at_work(one: object, method: Callable[..., Any]) -> bool:
    """Whether this thread is in a call of a method of that object, the class's own."""
    return any(other is one for other in _selves({inspect.unwrap(method).__code__}))


def _selves(codes: Collection[CodeType]) -> Iterator[Any]:
    """Whose calls of methods with this code the thread is in, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes and "self" in frame.f_locals:
            yield frame.f_locals["self"]
        frame = frame.f_back


def region_class() -> type:
    """The class of what holds the inputs of a checkpointed region, from forward to backward."""
    kind: type = look_up("torch.utils.checkpoint._CheckpointFrame")
    return kind


def held_by_region(region: Any) -> Iterator[Any]:
    """What one of that class holds of the tensors among its inputs, as hooks left it."""
    saver = getattr(region, "input_saver", None)  # before PyTorch 2.13
    saved = [] if saver is None else saver.grad_fn._raw_saved_tensors
    for one in getattr(region, "saved_args", saved):
        yield getattr(one, "data", None)


def function_of_region(region: Any) -> Any:
    """What one of that class runs, with keyword arguments that are not among its inputs."""
    again = region.recompute_fn
    cells = dict(zip(again.__code__.co_freevars, again.__closure__, strict=True))
    named = cells["kwargs"].cell_contents if "kwargs" in cells else {}  # since PyTorch 2.13
    return functools.partial(cells["fn"].cell_contents, **named)


def watch_region(
    region: Any, saved: Callable[[Tensor, bool], object], failed: Callable[[Exception], NoReturn]
) -> None:
    """Has one of that class tell each tensor that it would save.

    Args:
        region: One whose forward has not run yet.
        saved: Called with the tensor, and whether the region is made again; what it returns then
            has to equal what it returned first.
        failed: Called with the error where the region is made again otherwise than it ran.
    """
    metadata, watched = region.metadata_fn, weakref.ref(region)  # it is freed with its graph

    def telling(x: Tensor) -> Any:
        one = watched()
        return metadata(x), saved(x, one is None or one.forward_completed)

    region.metadata_fn = telling
    region.unpack_error_cb = region.unpack_error_cb or failed


_AROUND = "dropit_around"  # an attribute, of a region and of its hooks


def run_region_in(region: Any, block: AbstractContextManager[object]) -> None:
    """Has one of that class, whose forward has not run yet, run forward in a block."""
    setattr(region, _AROUND, block)


@functools.cache
def _run_regions_in_their_blocks() -> None:
    """The hooks in which a region runs enter its block, and leave it; once."""
    hooks = look_up("torch.utils.checkpoint._checkpoint_hook")
    begin, enter, leave = hooks.__init__, hooks.__enter__, hooks.__exit__

    def beginning(self: Any, region: Any) -> None:
        around = vars(region).pop(_AROUND, nullcontext())  # it is freed with the forward
        begin(self, region)
        setattr(self, _AROUND, around)

    def entering(self: Any) -> Any:
        getattr(self, _AROUND).__enter__()
        return enter(self)

    def leaving(self: Any, *error: Any) -> None:
        leave(self, *error)
        vars(self).pop(_AROUND).__exit__(*error)

    hooks.__init__, hooks.__enter__, hooks.__exit__ = beginning, entering, leaving


_INPUTS = "torch.utils.checkpoint._CheckpointFrame.save_inputs"
_OLDER = "torch.utils.checkpoint._NoopSaveInputs.apply"


def save_checkpoints_in(
    make: Callable[[Any, Any], AbstractContextManager[Callable[[Any], Any]]],
) -> None:
    """From now on, the inputs of every checkpoint are saved in ``with make(region, inputs):``.

    The region is of ``region_class()``, or None for a reentrant checkpoint. The block gives a
    wrapper for the function of a reentrant checkpoint, which runs inside it. There is no block
    where a compiler traces the checkpoint: then its inputs are stand-ins.
    """

    def blocks(region: Any, args: Any) -> AbstractContextManager[Callable[[Any], Any]]:
        traced = any(type(x).__module__.startswith("torch._subclasses") for x in args)
        return nullcontext(lambda function: function) if traced else make(region, args)

    if has(_INPUTS):
        frame = look_up(_INPUTS.rpartition(".")[0])
        save = frame.save_inputs

        def saving(self: Any, *args: Any) -> Any:
            with blocks(self, args):
                return save(self, *args)

        frame.save_inputs = saving
    else:
        saver = look_up(_OLDER.rpartition(".")[0])

        def saver_applying(cls: Any, *args: Any) -> Any:
            with blocks(sys._getframe(1).f_locals["new_frame"], args):
                return super(saver, cls).apply(*args)

        saver.apply = classmethod(saver_applying)
    _run_regions_in_their_blocks()
    reentrant = look_up("torch.utils.checkpoint.CheckpointFunction")

    def applying(cls: Any, function: Any, *args: Any) -> Any:
        with blocks(None, args) as wrapped:
            return super(reentrant, cls).apply(wrapped(function), *args)

    reentrant.apply = classmethod(applying)


@contextmanager
def checkpoints_run_by(
    around: Callable[[dict[str, Any], Callable[[], Iterator[None]]], Iterator[None]],
) -> Iterator[None]:
    """Replaces what this thread's checkpoints do around their regions: ``around(options, usual)``.

    It yields once, for the region to run, and is closed at the end where that raises; options are
    those that are not the defaults, and ``usual()`` does what PyTorch does.
    """
    name = "torch.utils.checkpoint._checkpoint_without_reentrant_generator"
    name += "_impl" if has(f"{name}_impl") else ""
    original, thread = look_up(name), threading.get_ident()
    signature = inspect.signature(original)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}

    def make(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        options = {n: given[n] for n, d in defaults.items() if n in given and given[n] != d}
        made = around(options, functools.partial(original, *args, **kwargs))
        begun.callback(lambda ref: (it := ref()) and it.close(), weakref.ref(made))  # type: ignore[attr-defined]
        return made

    with mock.patch(name, make), ExitStack() as begun:
        yield
