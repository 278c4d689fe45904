"""The one way to private and unstable names of PyTorch; ``private_names.py`` has a line for each.

Functions, classes and modules are imported from here under the last part of their name,
``from dropit_fx.private import compile_fx``, and looked up then: nothing is loaded before it is
wanted. What is an attribute of an object, a key of ``node.meta`` or an option has a helper below.

The first use of each part (``import dropit_fx``, ``torch.export``, the plug-in) warns once of its
names that this PyTorch lacks, with what does not work without them. A missing name raises
:class:`MissingName` where it is used, unless its line has another in its place.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.graph import Node

from dropit_fx.private_lookup import RUN, Name, look_up
from dropit_fx.private_names import TABLE

if TYPE_CHECKING:  # the names to import, with their types
    import torch._inductor.lowering as lowering
    import torch.utils._pytree as pytree
    from functorch.compile import make_boxed_func
    from torch._dynamo import dont_skip_tracing, lookup_backend
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._export.utils import _compiling_state_context as compiling_state_context
    from torch._functorch.partitioners import min_cut_rematerialization_partition, must_recompute
    from torch._guards import tracing
    from torch._inductor import list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.custom_graph_pass import (
        CustomGraphPass,
        CustomPartitionerFn,
        get_hash_for_files,
    )
    from torch._inductor.decomposition import select_decomp_table
    from torch._ops import OpOverload
    from torch._prims_common import suggest_memory_format
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.autograd.grad_mode import (
        _unsafe_preserve_version_counter as unsafe_preserve_version_counter,
    )
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
    from torch.fx.experimental.symbolic_shapes import (
        SYMPY_INTERP,
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
        free_unbacked_symbols,
    )
    from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
    from torch.fx.node import _get_qualified_name as get_qualified_name
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
    from torch.nn.utils.stateless import _reparametrize_module as reparametrize_module
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
    from torch.utils._sympy.printers import PythonPrinter

    batch_norm_impl_index: Callable[..., Any]
    peek_interpreter_stack: Callable[[], object]
    is_legacy_batchedtensor: Callable[[Tensor], bool]
    set_hooks_tracing: Callable[[bool], bool]
    tag_activation_checkpoint: Callable[..., Any]
    wrap_with_set_grad_enabled: Callable[..., Any]
    grouped_mm: Any
    grouped_mm_of_torch: Any
    log_softmax_backward_data: Callable[..., Tensor]
    softmax_backward_data: Callable[..., Tensor]
    safe_softmax: Callable[..., Tensor]
    native_batch_norm_legit: Any
    unsafe_index: Any
    unsafe_index_put: Any
    embedding_bag: Any
    functional_batch_norm: Any
    assert_scalar: Any
    traced_assert: Callable[[object, str], None]
    to_copy: Any
    unsafe_view: Any

P = ParamSpec("P")
R = TypeVar("R")


class MissingName(ImportError):
    """This PyTorch lacks a private name; the message says which, and what does not work."""


# Looking up -------------------------------------------------------------------------------------

_BY_NAME = {row.name: row for row in TABLE}
_BY_SHORT = {row.short: row for row in TABLE if row.probe is None}
_looked_at: set[str] = set()


def __getattr__(short: str) -> Any:
    row = _BY_SHORT.get(short)
    if row is None:
        raise AttributeError(f"module {__name__!r} has no attribute {short!r}")
    warn_of_missing(row.lack.part)
    try:
        found = look_up(row.name)
    except (AttributeError, ImportError) as error:
        if row.lack.vital:
            raise MissingName(_sentence(row)) from error
        found = row.instead or functools.partial(_raise, row)
    globals()[short] = found
    return found


def _sentence(row: Name) -> str:
    ran = f"dropit_fx was run with PyTorch {', '.join(RUN)}."
    return f"PyTorch {torch.__version__} has no {row.name}: {row.lack.text}. {ran}"


def _raise(row: Name, *args: Any, **kwargs: Any) -> NoReturn:
    raise MissingName(_sentence(row))


def _reads(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates what reads an attribute: its absence is told as that of an imported name is."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def reading(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except AttributeError as error:
                raise MissingName(_sentence(_BY_NAME[name])) from error

        return reading

    return decorate


def minor(version: str) -> tuple[int, int]:
    """``(2, 14)`` of ``"2.14.1+cpu"``."""
    major, rest = version.split(".")[:2]
    return int(major), int(rest)


def has(name: str) -> bool:
    """Whether this PyTorch has a name of the table, given in full."""
    return _BY_NAME[name].present


def expected(name: str) -> bool:
    """As :func:`has`, after a warning of all that is missing of the name's part."""
    warn_of_missing(_BY_NAME[name].lack.part)
    return has(name)


def warn_of_missing(part: str) -> None:
    """On a PyTorch that it was not run with, warns of all that is missing of a part, once."""
    if part in _looked_at:
        return
    _looked_at.add(part)
    if minor(torch.__version__) in map(minor, RUN):
        return
    wanted = [row for row in TABLE if row.lack.part == part and row.until == RUN[-1]]
    missing = [row for row in wanted if not row.present]
    if missing:
        warnings.warn(
            f"dropit_fx was run with PyTorch {', '.join(RUN)}; in {torch.__version__} it misses\n"
            + "\n".join(f"  {row.name}: {row.lack.text}" for row in missing),
            RuntimeWarning,
            stacklevel=2,
        )


if minor(torch.__version__) < minor(RUN[0]):
    raise ImportError(
        f"dropit_fx needs PyTorch {RUN[0]} or newer, this is {torch.__version__}:"
        f" pip install 'torch>={RUN[0]}'"
    )
warn_of_missing("import dropit_fx")


# Attributes of objects --------------------------------------------------------------------------


@_reads("torch.UntypedStorage._cdata")
def storage_id(tensor: Tensor) -> int:
    """Identifies a storage for as long as something holds it."""
    return int(tensor.untyped_storage()._cdata)


def counts_storage_users() -> bool:
    """Whether :func:`storage_users` can be asked."""
    return has("torch._C._storage_Use_Count")


def storage_users(tensor: Tensor) -> int:
    """How many tensors and Python objects hold a storage, the asked one among them."""
    storage = tensor.untyped_storage()
    return int(look_up("torch._C._storage_Use_Count")(storage._cdata))


def last_seeding() -> object:
    """Another object after each ``torch.manual_seed``; always None where PyTorch does not tell."""
    # XPUs are never in use beside other devices, so that their seed waits to be set
    return getattr(getattr(torch.xpu, "_lazy_seed_tracker", None), "manual_seed_all_cb", None)


@_reads("torch.Tensor._version")
def version(tensor: Tensor) -> int:
    """How often a tensor has been written in place; those of inference mode do not count: 0."""
    return 0 if tensor.is_inference() else tensor._version


@_reads("torch.Tensor._base")
def base_of(tensor: Tensor) -> Tensor | None:
    """What autograd takes a tensor for a view of."""
    return tensor._base


@_reads("torch.SymInt.node.hint")
def hint(size: Any) -> Any:
    """The number that a symbolic size stands for in the example, without a guard on it."""
    return size if isinstance(size, int) or size.node.hint is None else size.node.hint


@_reads("torch._ops.OpOverload._schema")
def schema(op: OpOverload) -> torch.FunctionSchema:
    """Name, arguments and defaults of an ATen overload."""
    return op._schema


@_reads("torch.Tensor._indices")
def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a COO tensor, coalesced or not."""
    return tensor._indices(), tensor._values()


def cudnn_reserve_nbytes(x: Tensor) -> int:
    """Bytes that cuDNN's batch norm of ``x`` hands to its backward; 0 without a GPU to ask."""
    name = "torch._C._get_cudnn_batch_norm_reserve_space_size"
    return int(look_up(name)(x, True)) if torch.cuda.is_available() and has(name) else 0


def conv_backend(*convolution: Any) -> str:
    """Which of PyTorch's implementations a call of ``aten::convolution`` runs."""
    name = "torch._C._select_conv_backend"
    return str(look_up(name)(*convolution)) if has(name) else ""


def c_nn(name: str) -> Any:
    """``torch._C._nn.<name>``, as Dynamo's graphs call it; PyTorch's public function without."""
    return getattr(torch._C._nn, name, getattr(F, name))


MODULE_DICTS = ("_parameters", "_buffers", "_modules")
HOOK_DICTS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
COMPILED_BACKWARD = "CompiledFunctionBackward"  # what autograd calls one of AOTAutograd
LOADED_HOOKS = "_load_state_dict_post_hooks"
SAVING_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    LOADED_HOOKS,
)
SAVING_METHODS = (
    *("state_dict", "_save_to_state_dict", "get_extra_state"),
    *("load_state_dict", "_load_from_state_dict", "set_extra_state"),
)
UNSAVED = "_non_persistent_buffers_set"
MODULE_STATE = ("training", *MODULE_DICTS, UNSAVED, *HOOK_DICTS, LOADED_HOOKS)


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Those of the module itself, to be read or replaced; none where it is not initialised."""
    found: dict[str, Tensor | None] = module.__dict__.get("_buffers") or {}
    return found


def parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """Those of the module itself, as :func:`buffers`."""
    found: dict[str, Tensor | None] = module.__dict__.get("_parameters") or {}
    return found


class LoadsItself(nn.Module):
    """A module whose own tensors are loaded by :meth:`load_as_part`."""

    def _load_from_state_dict(self, *args: Any) -> None:
        self.load_as_part(*args)

    def load_as_part(self, *args: Any) -> None:
        """Loads its own tensors, not those of submodules; the arguments are PyTorch's."""
        super()._load_from_state_dict(*args)


def load_own(module: nn.Module, *args: Any) -> None:
    """Loads a module's own tensors as its class says, with its hooks."""
    module._load_from_state_dict(*args)


def has_say_in_state(module: nn.Module) -> bool:
    """Whether a module saves or loads otherwise than tensor by tensor: its hooks, or its class."""
    kind, usual = type(module), nn.Module
    methods = any(getattr(kind, n) is not getattr(usual, n) for n in SAVING_METHODS)
    return methods or any(vars(module).get(hooks) for hooks in SAVING_HOOKS)


@contextmanager
def lend_tensors(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """For a while the second module of each pair has the parameters and buffers of the first."""
    kinds = (*MODULE_DICTS[:2], UNSAVED)
    held = [(vars(lender), vars(part)) for lender, part in pairs if lender is not part]
    before = [{kind: part[kind] for kind in kinds} for _, part in held]
    try:
        for lender, part in held:
            part.update({kind: lender[kind] for kind in kinds})
        yield
    finally:
        for (_, part), own in zip(held, before, strict=True):
            part.update(own)


@_reads("torch.nn.Module._non_persistent_buffers_set")
def unsaved_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that are no part of the state dict."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, part in model.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }


def leave_unsaved(model: nn.Module, names: Iterable[str]) -> None:
    """Keeps buffers out of the state dict; names that ``model`` does not have are passed over."""
    owners = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        path, _, leaf = name.rpartition(".")
        if path in owners and leaf in buffers(owners[path]):
            owners[path]._non_persistent_buffers_set.add(leaf)


def unchecked_dimensions(norm: BatchNorm) -> AbstractContextManager[Any]:
    """Leaves out batch norm's check of the number of dimensions."""
    return mock.patch.object(norm, "_check_input_dim", return_value=None)


def never_removed(module: type[R]) -> type[R]:
    """Decorates a module class: fx keeps calls whose result nobody reads."""
    module._is_impure = True  # type: ignore[attr-defined]
    return module


def constant_to_dynamo(function: Callable[[], R]) -> Callable[[], R]:
    """Decorates what Dynamo calls, and does not look into, while it traces a caller.

    As ``torch.compiler.assume_constant_result``, which loads Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def parameter_of_input(name: str) -> str:
    """The parameter that an input of a graph of Dynamo's is, by its name; ``""`` of any other."""
    _, *parts = re.split(r"_(modules|parameters)_", name)  # L_self_modules_fc_parameters_weight_
    return ".".join(parts[1::2]).removesuffix("_") if "parameters" in parts[::2] else ""


def codegen(graph: fx.Graph) -> Any:
    """What writes the code of a graph; its ``pytree_info``, if any, is the nesting of inputs."""
    return getattr(graph, "_codegen", None)


# what an exported graph calls, in its code, with its inputs and their tree spec
FLATTENING = "fx_pytree.tree_flatten_spec("


def compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def undo_compile(module: nn.Module) -> None:
    """Undoes ``module.compile()``."""
    module._compiled_call_impl = None


def compiled_for_lightning(module: nn.Module) -> bool:
    """Whether Lightning's ``Trainer`` was handed this module compiled: it unwraps it."""
    return bool(getattr(module, "_compiler_ctx", None))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper, or the model itself.

    The wrapper is told by its class: a graph of what it holds has a part of the same name.
    """
    wrapper = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())  # if it is loaded
    inside: nn.Module = model._orig_mod if isinstance(model, wrapper) else model
    return inside


# Autograd and the profiler ------------------------------------------------------------------------


@_reads("torch.autograd.graph.Node._sequence_nr")
def sequence_number(node: Node) -> int:
    """Numbers a thread's autograd nodes as they are made; that of leaves is the highest."""
    return int(node._sequence_nr())


def raw_saved(node: Node) -> Iterator[tuple[str, Any]]:
    """What an autograd node holds: a name, "" in Python functions, and the value as hooks left it.

    Raises:
        MissingName: PyTorch no longer shows it; without the check, nothing would seem to be saved.
    """
    if not shows_saved():
        raise MissingName(_sentence(_BY_NAME["torch.autograd.graph.Node._raw_saved_*"]))
    for attribute in (a for a in dir(node) if a.startswith("_raw_saved_")):
        name = attribute.removeprefix("_raw_saved_")
        name = "" if name == "tensors" else name  # so Python functions call all of them
        saved = getattr(node, attribute)
        for one in saved if isinstance(saved, tuple | list) else (saved,):
            yield name, one.data


def closed_over(node: Node) -> Iterator[Any]:
    """What the backward of a Python function finds in its closure: so Dynamo's graphs keep things.

    Each call of a custom function that Dynamo has traced is a class of its own.
    """
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    for cell in getattr(backward, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents


@functools.cache
def shows_saved() -> bool:
    """Whether :func:`raw_saved` works in this PyTorch."""
    return has("torch.autograd.graph.Node._raw_saved_*")


@_reads("torch.profiler.profile.profiler.kineto_results")
def spans(profiler: torch.profiler.profile, prefix: str) -> list[tuple[str, int, int]]:
    """Name, start and end in ns of what was recorded under names that begin so."""
    run: Any = profiler.profiler
    return [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in run.kineto_results.events()
        if event.name().startswith(prefix)
    ]


@_reads("torch.profiler.profile.profiler.kineto_results")
def memory_events(profiler: torch.profiler.profile) -> list[tuple[int, int]]:
    """Time in ns and bytes, negative where memory is freed, of what a CPU profile has noted."""
    run: Any = profiler.profiler
    return [
        (event.start_ns(), event.nbytes())
        for event in run.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]


def forward_mode_level() -> int:
    """How many levels of forward-mode differentiation there are, less one."""
    # read in every packed call: not looked up by name
    return getattr(torch.autograd.forward_ad, "_current_level", -1)


def dynamo_skips(function: Callable[..., Any]) -> None:
    """Lets Dynamo pass over the frames of a function, and those below; it may be inlined still."""
    name = "torch._C._dynamo.eval_frame.set_code_exec_strategy"
    if has(name):
        skip = look_up("torch._C._dynamo.eval_frame._FrameAction").SKIP
        strategy = look_up("torch._C._dynamo.eval_frame._FrameExecStrategy")(skip, skip)
        look_up(name)(function.__code__, strategy)


class Stopped(NamedTuple):
    """An attempt of Dynamo's that ended without a graph."""

    backend: Any  # that it was made for
    function: str  # with its file and line
    where: str  # file and line at which it stopped
    reason: str
    values: Mapping[str, Any]  # of the function's variables


def at_end_of_compile(call: Callable[[Any], None]) -> None:
    """Has Dynamo call it at the end of each attempt to compile a function, once."""
    if has("torch._dynamo.on_compile_end"):
        handler = look_up("torch._dynamo.callback_handler")
        if call not in handler.end_callbacks:
            look_up("torch._dynamo.on_compile_end")(call)


def _frames() -> Iterator[FrameType]:
    """From the caller outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _attempt() -> dict[str, Any] | None:
    """What Dynamo knows of the function that it compiles just now."""
    known = (f.f_locals for f in _frames())
    return next((k for k in known if {"code", "compiler_fn"} <= k.keys()), None)


def being_compiled() -> tuple[nn.Module, Hashable] | None:
    """The module whose call is compiled just now, and the same value for the same part of it.

    The innermost that was handed to ``torch.compile``, or told to ``compile()``; None for a
    function. A part is a function of one of its modules: graph breaks make several.
    """
    calls = (f for f in _frames() if f.f_code is nn.Module._wrapped_call_impl.__code__)
    called = (f.f_locals["self"] for f in calls)
    model = next((m for m in called if uncompiled(m) is not m or compiled_in_place(m)), None)
    known = _attempt()
    if model is None or known is None:
        return None
    values = dict(known.get("locals", {})).values()
    return model, (known["code"], *(id(v) for v in values if isinstance(v, nn.Module)))


def stopped_tracing() -> Stopped | None:
    """What ended Dynamo's attempt, where no graph came of it; asked at its end."""
    error: Any = sys.exception()
    stack = getattr(error, "real_stack", None)
    known = _attempt()
    if not stack or known is None:
        return None
    code = known["code"]
    name = code.co_qualname.rpartition("<locals>.")[2]
    backend = known["compiler_fn"]
    for inner in (
        "_torchdynamo_orig_backend",
        "compiler_fn",
        "func",
    ):  # of torch.compile's wrappers
        backend = getattr(backend, inner, backend)
    return Stopped(
        backend=backend,
        function=f"{name} ({code.co_filename}:{code.co_firstlineno})",
        where=f"{stack[-1].filename}:{stack[-1].lineno}",
        reason=str(error),
        values=known.get("locals", {}),
    )


# Keys of node.meta --------------------------------------------------------------------------------

EXAMPLE_VALUE = "example_value"
STATIC_INPUT = ("tensor_dict", "_dynamo_static_input_type")  # of parameters and buffers
MODULES = "nn_module_stack"
TRACE = "stack_trace"
ORIGIN = (MODULES, TRACE)
CHECKPOINT_CONTEXT = "_checkpoint_context_fn"
VALUE = "val"
PLACE, IN_BACKWARD = "partitioner_tag", "must_be_in_backward"
BACKWARD = ("is_backward", IN_BACKWARD)
CUSTOM = "custom"
POLICY = "recompute"
OUTPUTS = "desc"
OUTPUT_TRACES = "output_stack_traces"
VISIBLE = "user_visible_output_idxs"
STRIDES = "original_output_strides"
STACKLEVEL = "_stacklevel"


@contextmanager
def guards_made_by(make: Callable[..., Any]) -> Iterator[None]:
    """Replaces what ``ExportedProgram.module()`` makes of the conditions on its inputs."""
    name = "torch.export._unlift._convert_guards_code_to_fn"
    with mock.patch(name, make) if expected(name) else nullcontext():
        yield
