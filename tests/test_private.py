"""Each private name of PyTorch is there and is what it is taken for, and only private.py has it."""

import ast
import inspect
import re
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dropit_fx import private, private_hooks, private_inductor
from dropit_fx.private import minor
from dropit_fx.private_lookup import RUN, Name, look_up
from dropit_fx.private_names import TABLE

ROOT = Path(__file__).resolve().parent.parent
HERE = min(minor(torch.__version__), minor(RUN[-1]))  # newer ones are to have what the newest has

# What a name does beyond being there -------------------------------------------------------------

Check = Callable[[], None]
CHECKS: dict[str, Check] = {}


def of(*names: str) -> Callable[[Check], Check]:
    def decorate(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return decorate


def parameters(name: str, *expected: str) -> None:
    """A check that a function has the parameters that are passed by name, or by this position."""

    def check() -> None:
        found = inspect.signature(look_up(name)).parameters
        missing = set(expected) - set(found)
        assert not missing, f"it has no parameter {', '.join(sorted(missing))}: {tuple(found)}"

    CHECKS[name] = check


def members(name: str, *expected: str) -> None:
    def check() -> None:
        missing = [n for n in expected if not hasattr(look_up(name), n)]
        assert not missing, f"it has no {', '.join(missing)}"

    CHECKS[name] = check


def settable(name: str, kinds: type | tuple[type, ...]) -> None:
    def check() -> None:
        value = look_up(name)
        assert isinstance(value, kinds), f"its default is {value!r}"

    CHECKS[name] = check


def subclassed(name: str, *children: type) -> None:
    def check() -> None:
        outside = [c.__name__ for c in children if not issubclass(c, look_up(name))]
        assert not outside, f"{', '.join(outside)} derive from it no more"

    CHECKS[name] = check


_GRAPH_PASS = "torch._inductor.custom_graph_pass"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
_CUT = "torch._functorch.partitioners"
members("torch.utils._pytree", "tree_map", "tree_leaves", "tree_map_only", "tree_any", "keystr")
parameters("torch._subclasses.fake_tensor.FakeTensorMode", "allow_non_fake_inputs", "shape_env")
parameters("torch.nn.utils.stateless._reparametrize_module", "module", "tie_weights")
subclassed("torch.nn.modules.batchnorm._BatchNorm", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
subclassed("torch.nn.modules.batchnorm._NormBase", nn.BatchNorm2d, nn.InstanceNorm2d)
subclassed("torch.nn.modules.conv._ConvNd", nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
parameters("torch.fx.experimental.proxy_tensor.make_fx", "tracing_mode", "pre_dispatch")


@of("torch.fx.experimental.proxy_tensor.get_proxy_mode")
def told_while_a_graph_is_traced() -> None:
    seen = []
    private.make_fx(lambda x: seen.append(private.get_proxy_mode()) or x)(torch.ones(2))
    assert seen[0] is not None
    assert private.get_proxy_mode() is None


members(f"{_SHAPES}.DimDynamic", "STATIC", "DUCK")
parameters(f"{_SHAPES}.StatelessSymbolicContext", "dynamic_sizes")
parameters(
    "torch.export._unlift._convert_guards_code_to_fn", "guards_code", "paths_of_placeholders"
)
settable(f"{_SHAPES}.SYMPY_INTERP", dict)
settable("torch._dynamo.config.recompile_limit", int)
settable("torch._dynamo.config.accumulated_recompile_limit", int)
settable("torch._inductor.config.custom_partitioner_fn", type(None))
settable("torch._inductor.config.post_grad_custom_pre_pass", type(None))
settable("torch._inductor.config.post_grad_custom_post_pass", type(None))
settable("torch._inductor.config.realize_opcount_threshold", (int, type(None)))
settable("torch._inductor.config.realize_reads_threshold", int)
settable("torch._inductor.config.realize_acc_reads_threshold", (int, type(None)))
settable("torch._inductor.config.loop_ordering_after_fusion", bool)
settable("torch._inductor.config.allow_buffer_reuse", bool)
settable("torch._inductor.config.unsafe_marked_cacheable_functions", dict)
parameters("torch._inductor.list_mode_options", "mode")
parameters(
    "torch._inductor.compile_fx.compile_fx",
    *("model_", "example_inputs_", "config_patches", private_inductor.INNER_COMPILE),
)
parameters("torch._inductor.compile_fx.compile_fx_inner", "gm", "example_inputs")
parameters(
    "torch._inductor.scheduler.BaseSchedulerNode.get_read_write_buffer_accesses",
    *("self", "include_reads", "include_writes"),
)
parameters("torch._inductor.fx_passes.post_grad.post_grad_passes", "gm", "is_inference")
parameters("torch._inductor.graph.GraphLowering", "gm", "example_inputs", "is_inference")
members("torch._inductor.virtualized.V", "graph", "set_graph_handler", "set_fake_mode")
members("torch._dynamo.device_interface.CudaInterface", "Worker", "get_compute_capability")
settable("torch._functorch.config.enable_autograd_cache", bool)
parameters(
    f"{_CUT}.min_cut_rematerialization_partition",
    *("joint_module", "_joint_inputs", "compiler", "num_fwd_outputs"),
    "static_lifetime_input_indices",
)


@of("torch._subclasses.fake_tensor.FakeTensor")
def _a_fake_tensor_knows_its_mode() -> None:
    mode = private.FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(torch.ones(2))
    assert isinstance(fake, private.FakeTensor), "from_tensor makes another class"
    assert fake.fake_mode is mode, "its mode is not fake_mode"


@of("torch._guards.tracing")
def _a_tracer_in_no_context_takes_the_mode_of_its_inputs() -> None:
    mode, other = (private.FakeTensorMode(shape_env=private.ShapeEnv()) for _ in range(2))
    with private.tracing(torch._guards.TracingContext(other)), private.tracing(None):
        fake = mode.from_tensor(torch.ones(2))
        traced = private.make_fx(torch.sin, tracing_mode="symbolic")(fake)
    (sin,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert sin.meta[private.VALUE].fake_mode is mode, "it is the context's"


@of("torch._export.utils._compiling_state_context")
def _code_that_asks_is_told_that_it_is_exported() -> None:
    with private.compiling_state_context():
        assert torch.compiler.is_exporting(), "is_exporting() is False in it"
    assert not torch.compiler.is_exporting(), "is_exporting() stays True"


@of("torch.nn.modules.module._has_any_global_hook")
def _a_global_hook_is_seen() -> None:
    assert not private.has_any_global_hook(), "there are hooks already"
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert private.has_any_global_hook(), "it sees none"
    finally:
        handle.remove()


@of(
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
)
def _a_mode_sees_every_op_and_can_be_left() -> None:
    seen = []

    class Watch(private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).exp()
        with private.disable_current_modes():
            torch.ones(2).sin()
    assert torch.ops.aten.exp.default in seen, "it sees no ops"
    assert torch.ops.aten.sin.default not in seen, "it sees what runs without it"


@of("torch._ops.OpOverload", "torch._ops.OpOverload._schema")
def _an_overload_has_a_schema() -> None:
    add = torch.ops.aten.add.Tensor
    assert isinstance(add, private.OpOverload), "aten overloads are of another class"
    told = private.schema(add)
    *_, alpha = told.arguments
    found = told.name, alpha.name, alpha.default_value, alpha.kwarg_only
    assert found == ("aten::add", "alpha", 1, True), f"its schema reads {found}"


@of("torch.utils._sympy.printers.PythonPrinter")
def _conditions_on_sizes_print_as_python() -> None:
    import sympy

    size = sympy.Symbol("s0", positive=True, integer=True)
    printed = private.PythonPrinter().doprint(sympy.Ne(size, 1))
    assert eval(printed, {"s0": 2})
    assert not eval(printed, {"s0": 1})


@of("torch.SymInt.node.hint", f"{_SHAPES}.ShapeEnv")
def _a_symbolic_size_has_a_hint_without_a_guard() -> None:
    env = private.ShapeEnv(specialize_zero_one=False, duck_shape=True)
    mode = private.FakeTensorMode(shape_env=env)
    duck: Any = private.StatelessSymbolicContext(dynamic_sizes=[private.DimDynamic.DUCK])
    (size,) = mode.from_tensor(torch.ones(5), symbolic_context=duck).shape
    assert isinstance(size, torch.SymInt), "sizes are not symbolic"
    assert (private.hint(size), env.guards) == (5, []), "reading a hint leaves a guard"


@of("torch._C._storage_Use_Count")
def _users_of_a_storage_are_counted() -> None:
    room = torch.ones(64, dtype=torch.uint8)
    idle = private.storage_users(room)
    view = room.view(torch.float32).view(4, 4)
    assert private.storage_users(room) > idle, "a view of it"
    kept = torch.ones(4, 4, requires_grad=True) * view
    del view
    assert private.storage_users(room) > idle, "autograd keeps the view"
    del kept
    assert private.storage_users(room) == idle, "nothing holds it"


@of("torch.UntypedStorage._cdata")
def _storages_are_told_apart() -> None:
    with private.FakeTensorMode():
        x, y = torch.ones(4), torch.ones(4)
    same = private.storage_id(x) == private.storage_id(x.view(2, 2))
    assert same, "a view of a fake tensor has another"
    assert private.storage_id(x) != private.storage_id(y), "two fake tensors have the same"


@of("torch._assert")
def _an_assertion_is_a_node_of_a_trace() -> None:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            private.traced_assert(x.dim() == 1, "one dimension")
            return x

    traced = fx.symbolic_trace(Flat())
    traced(torch.ones(1))
    with pytest.raises(AssertionError, match="one dimension"):
        traced(torch.ones(1, 1))


@of("torch.Tensor._version")
def _writing_counts() -> None:
    x = torch.ones(2)
    before = private.version(x)
    x.add_(1)
    assert private.version(x) == before + 1, "writing in place does not count it up by one"


@of("torch.Tensor._base", "torch.ops.aten._unsafe_view")
def _views_are_told_and_unsafe_ones_are_none() -> None:
    x = torch.ones(2, 3)
    view = x.view(3, 2)
    assert private.base_of(view) is x, "a view is not told"
    assert private.base_of(x) is None, "what is no view is taken for one"
    with torch.no_grad():
        again = private.unsafe_view(view, view.shape)
    assert private.base_of(again) is None, "an unsafe view is one to autograd"
    assert private.storage_id(again) == private.storage_id(x), "it copies"


@of("torch._C._autograd._saved_tensors_hooks_set_tracing")
def _tracing_of_hooks_is_set_and_put_back() -> None:
    was = private.set_hooks_tracing(True)
    assert (was, private.set_hooks_tracing(was)) == (False, True), "it does not return what was set"


@of("torch.nn.BatchNorm2d._check_input_dim")
def _batch_norm_checks_dimensions() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="expected 4D"):
        norm(torch.ones(2, 3))
    with private.unchecked_dimensions(norm):
        norm(torch.ones(2, 3))


@of("torch.nn.Module._parameters", "torch.nn.Module._buffers", "torch.nn.Module._modules")
def _modules_hold_dictionaries() -> None:
    norm = nn.Sequential(nn.BatchNorm1d(2))
    assert list(getattr(norm, private.MODULE_DICTS[2])) == ["0"], "submodules are elsewhere"
    assert list(getattr(norm[0], private.MODULE_DICTS[0])) == ["weight", "bias"]
    assert private.buffers(norm[0]).keys() == dict(norm[0].named_buffers()).keys()


@of("torch.nn.Module._non_persistent_buffers_set")
def _buffers_are_left_out_of_the_state() -> None:
    norm = nn.BatchNorm1d(2)
    private.leave_unsaved(norm, ["running_mean", "not there"])
    assert private.unsaved_buffers(norm) == {"running_mean"}
    assert "running_mean" not in norm.state_dict(), "what it names is in the state dict"


@of(
    "torch.nn.Module._save_to_state_dict",
    "torch.nn.Module._load_from_state_dict",
    *(f"torch.nn.Module.{name}" for name in private.SAVING_HOOKS),
)
def _modules_have_a_say_in_their_state() -> None:
    said: list[str] = []
    module = nn.Linear(2, 2)
    assert not private.has_say_in_state(module)
    module.register_state_dict_pre_hook(lambda *_: said.append("saves"))
    module.register_state_dict_post_hook(lambda *_: said.append("saved"))
    module.register_load_state_dict_pre_hook(lambda *_: said.append("loads"))
    module.register_load_state_dict_post_hook(lambda *_: said.append("loaded"))
    assert all(map(vars(module).get, private.SAVING_HOOKS)), "hooks are elsewhere"
    lender = private.LoadsItself()
    lender.register_parameter("weight", nn.Parameter(torch.zeros(2, 2)))
    with private.lend_tensors([(lender, module)]):
        assert list(module.state_dict()) == ["weight"]
        private.load_own(module, {"weight": torch.ones(2, 2)}, "", {}, True, [], [], [])
    assert lender.weight.sum() == 4
    assert module.weight is not lender.weight
    assert said == ["saves", "saved", "loads"]
    assert private.has_say_in_state(nn.BatchNorm1d(2)), "it loads old checkpoints otherwise"


@of("CompiledFunctionBackward")
def _compiled_backwards_have_that_name() -> None:
    out = torch.compile(torch.sin, backend="aot_eager")(torch.ones(2, requires_grad=True))
    assert out.grad_fn.name() == private.COMPILED_BACKWARD


class Nested(nn.Module):
    def forward(self, pair: dict[str, torch.Tensor]) -> torch.Tensor:
        return pair["x"] / pair["y"]


@cache
def exported() -> Any:
    x = torch.ones(3)
    return torch.export.export(Nested(), ({"x": x, "y": x},), strict=False)


@of("torch.fx.Graph._codegen")
def _the_nesting_of_inputs_is_in_the_code_generator() -> None:
    info = getattr(private.codegen(exported().module().graph), "pytree_info", None)
    assert info is not None, "it has no pytree_info"
    assert info.in_spec.num_leaves == 2, "pytree_info.in_spec does not count two inputs"


@of("torch.fx.graph._PyTreeCodeGen")
def _graphs_of_export_flatten_their_inputs_by_this_call() -> None:
    graph_module = exported().module()
    assert type(private.codegen(graph_module.graph)) is private.PyTreeCodeGen
    assert private.FLATTENING in graph_module.code, f"{private.FLATTENING} is not in its code"
    assert [*exported().call_spec.in_spec.children()][1].type is dict, "no spec of keyword inputs"


@of("torch.fx.node._get_qualified_name")
def _functions_have_names() -> None:
    assert private.get_qualified_name(F.relu) == "torch.nn.functional.relu"


class Silent(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        return None


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.silent = private.never_removed(Silent)()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.silent(x)
        return x + 1


class Tracer(fx.Tracer):
    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@of("_is_impure")
def _a_call_without_readers_stays() -> None:
    model = Caller()
    graph = fx.GraphModule(model, Tracer().trace(model)).graph
    graph.eliminate_dead_code()
    assert graph.find_nodes(op="call_module", target="silent"), "fx removes the call all the same"


@of("meta['stack_trace']", "meta['nn_module_stack']")
def _nodes_know_where_they_come_from() -> None:
    (node,) = Tracer().trace(Caller()).find_nodes(op="call_module")
    assert "self.silent(x)" in (node.meta.get(private.TRACE) or node.stack_trace or "")
    stack = node.meta.get(private.MODULES)
    assert stack, "symbolic tracing leaves none"
    assert next(reversed(stack.values()))[0] == "silent", f"its last entry is {stack}"


@of("torch._dynamo.dont_skip_tracing")
def _a_function_stays_what_it_was() -> None:
    assert private.dont_skip_tracing(len)([1]) == 1


@of("torch._C._nn.pad", "torch._C._nn.adaptive_avg_pool2d", "torch._C._nn.adaptive_avg_pool3d")
def _dynamo_has_a_spelling_of_its_own() -> None:
    (graph,) = dynamo_graphs(
        lambda x: F.adaptive_avg_pool2d(F.pad(x, (1, 1)), 1), torch.ones(1, 4, 4)
    )
    targets = {n.target for n in graph.graph.nodes}
    known = {private.c_nn("pad"), private.c_nn("adaptive_avg_pool2d"), F.pad, F.adaptive_avg_pool2d}
    assert len(targets & known) == 2, f"Dynamo's graphs call {targets}"


def dynamo_graphs(f: Callable[..., Any], *args: Any) -> list[fx.GraphModule]:
    seen: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    torch.compile(f, backend=note)(*args)
    return seen


@of("torch.ops.higher_order.wrap_with_set_grad_enabled")
def _a_block_without_gradients_is_a_nested_graph() -> None:
    class Detached(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = x.exp()
            return x * y

    graph = torch.export.export(Detached(), (torch.ones(2),)).module().graph
    (call,) = graph.find_nodes(op="call_function", target=private.wrap_with_set_grad_enabled)
    assert call.args[0] is False
    assert call.args[1].op == "get_attr"


@of(
    "torch.ops.higher_order.tag_activation_checkpoint",
    "meta['_checkpoint_context_fn']",
    "meta['example_value']",
)
def _a_selective_checkpoint_is_a_tagged_region() -> None:
    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    def region(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(torch.sin, x, use_reentrant=False, context_fn=contexts)

    (graph,) = dynamo_graphs(region, torch.ones(2, requires_grad=True))
    op = private.tag_activation_checkpoint
    (node,) = graph.graph.find_nodes(op="call_function", target=op)
    body = graph.get_submodule(node.args[0].target)
    assert private.CHECKPOINT_CONTEXT in body.meta, f"the body's meta has {sorted(body.meta)}"
    (x,) = graph.graph.find_nodes(op="placeholder")
    value = x.meta.get(private.EXAMPLE_VALUE)
    assert isinstance(value, private.FakeTensor), f"an input's meta has {sorted(x.meta)}"


@of("meta['original_aten']")
def _a_node_of_a_traced_graph_knows_its_op() -> None:
    seen: list[Any] = []

    def note(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(n.meta.get(private_inductor.ORIGINAL_OP) for n in graph.graph.nodes)
        return private.make_boxed_func(graph.forward)

    inner = private.aot_autograd(fw_compiler=note, decompositions=private.select_decomp_table())
    torch.compile(F.silu, backend=inner)(torch.ones(3))
    assert "aten.silu.default" in map(str, seen), f"nodes know {set(seen)}"


@of("meta['tensor_dict']")
def _parameters_and_buffers_are_static_inputs() -> None:
    (graph,) = dynamo_graphs(torch.nn.BatchNorm1d(3), torch.ones(2, 3))
    key, mark = private.STATIC_INPUT
    static = [mark in n.meta[key] for n in graph.graph.find_nodes(op="placeholder")]
    assert sorted(static) == [False, True, True, True, True, True], f"static inputs: {static}"


@of("L_self_modules_*_parameters_*")
def _inputs_are_named_after_parameters() -> None:
    model = nn.Sequential()
    model.add_module("a_b", nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    (graph,) = dynamo_graphs(model, torch.ones(2, 3))
    inputs = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
    found = [name for name in map(private.parameter_of_input, inputs) if name]
    assert sorted(found) == sorted(n for n, _ in model.named_parameters()), f"inputs: {inputs}"


@of("lightning.pytorch.LightningModule._compiler_ctx")
def _lightning_remembers_what_it_unwraps() -> None:
    compiled = pytest.importorskip("lightning.pytorch.utilities.compile")
    model = compiled.pl.LightningModule()
    assert not private.compiled_for_lightning(model), "plain ones have it too"
    inside = compiled.from_compiled(torch.compile(model, backend="eager"))
    assert private.compiled_for_lightning(inside), "it is forgotten"


@of("torch.xpu._lazy_seed_tracker.manual_seed_all_cb")
def _seeding_leaves_another_object_each_time() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        first = private.last_seeding()
        torch.rand(2)
        assert private.last_seeding() is first
        torch.manual_seed(3)
    assert first is not None
    assert private.last_seeding() is not first


@of("_dynamo_marked_constant")
def _dynamo_runs_what_it_does_not_trace() -> None:
    ran = []

    @private.constant_to_dynamo
    def note() -> None:
        ran.append(torch.compiler.is_dynamo_compiling())

    def caller(x: torch.Tensor) -> torch.Tensor:
        note()
        return x + 1

    torch.compile(caller, backend="eager", fullgraph=True)(torch.ones(1))
    assert ran == [False], "Dynamo traces it, or does not run it"


@of("_stacklevel")
def _softmax_has_an_argument_of_no_meaning() -> None:
    for function in (F.softmax, F.log_softmax):
        assert list(inspect.signature(function).parameters)[2] == private.STACKLEVEL


@of("torch.ops.aten._unsafe_index")
def _places_are_read() -> None:
    found = private.unsafe_index.Tensor(torch.arange(4.0), [torch.tensor([[3, 1]])])
    assert found.tolist() == [[3.0, 1.0]]


@of("torch.ops.aten._unsafe_index_put")
def _places_are_written() -> None:
    found = private.unsafe_index_put(torch.zeros(4), [torch.tensor([3, 1])], torch.ones(2))
    assert found.tolist() == [0.0, 1.0, 0.0, 1.0]


@of("torch.ops.aten._native_batch_norm_legit_functional")
def _a_compiled_norm_has_statistics_in_the_dtype_of_its_weight() -> None:
    x, weight, zeros = torch.randn(8, 3, 5).bfloat16(), torch.ones(3), torch.zeros(3)
    stats = weight, weight, zeros, weight, True, 0.1, 1e-5
    _, mean, invstd, *_ = private.functional_batch_norm(x, *stats)
    assert mean.dtype == invstd.dtype == weight.dtype


@of("torch.ops.aten._native_batch_norm_legit")
def _batch_norm_returns_its_statistics() -> None:
    x = torch.randn(8, 3, 5)
    _, mean, inverse = private.native_batch_norm_legit.no_stats(x, None, None, True, 0.0, 1e-5)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(inverse, (x.var((0, 2), correction=0) + 1e-5).rsqrt())


@of("torch.ops.aten._softmax_backward_data", "torch.ops.aten._log_softmax_backward_data")
def _softmax_has_its_formula() -> None:
    x, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    for forward, backward in (
        (torch.softmax, private.softmax_backward_data),
        (torch.log_softmax, private.log_softmax_backward_data),
    ):
        y = forward(x, -1)
        (expected,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(backward(grad, y.detach(), -1, x.dtype), expected), "other bits"


@of("torch.ops.aten._grouped_mm", "torch._grouped_mm")
def _groups_end_where_the_offsets_say() -> None:
    a, b = torch.ones(24, 8), torch.stack((torch.ones(8, 8), torch.zeros(8, 8)))
    ends = torch.tensor([7, 24], dtype=torch.int32)
    for function in (private.grouped_mm, private.grouped_mm_of_torch):
        assert function(a, b, ends).sum(1).nonzero().flatten().tolist() == list(range(7))


@of("torch.ops.aten._safe_softmax")
def _softmax_of_what_is_masked_altogether_is_zero() -> None:
    x = torch.randn(3, 5)
    x[1] = -torch.inf
    found = private.safe_softmax(x, -1)
    assert not found[1].any()
    assert torch.equal(found[::2], x.softmax(-1)[::2]), "other bits"


@of("torch._C._select_conv_backend", "torch.ops.aten._embedding_bag")
def _what_is_larger_than_it_shows_is_told() -> None:
    x, weight = torch.ones(1, 4, 2, 2, 8), torch.ones(4, 4, 2, 2, 2)
    three = [1, 1, 1]
    told = private.conv_backend(x, weight, None, three, three, three, True, [0, 0, 0], 1)
    assert told.endswith("SlowTranspose3d"), f"another implementation runs: {told}"
    offsets, ones = torch.zeros(1, dtype=torch.long), torch.ones(4, dtype=torch.long)
    bags = private.embedding_bag(weight[0, 0, 0], ones, offsets, False, 1)[1]
    assert bags.shape == (4,), "its second result is another"


@of("torch._prims_common.suggest_memory_format")
def _a_layout_is_suggested() -> None:
    x = torch.ones(2, 3, 4, 5)
    assert private.suggest_memory_format(x) == torch.contiguous_format
    last = x.to(memory_format=torch.channels_last)
    assert private.suggest_memory_format(last) == torch.channels_last


@of("torch._C._autograd._top_saved_tensors_default_hooks")
def _the_innermost_hooks_are_told() -> None:
    assert private_hooks.hooks_in_force() is None, "there are some"
    seen: list[private_hooks.Hooks | None] = []

    def region(x: torch.Tensor) -> torch.Tensor:
        seen.append(private_hooks.hooks_in_force())
        return x.exp()

    hooks = len, abs
    with torch.autograd.graph.saved_tensors_hooks(*hooks):  # type: ignore[arg-type]
        assert private_hooks.hooks_in_force() == hooks
    checkpoint(region, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert [private_hooks.of_a_region(h) for h in (*seen, hooks, None)] == [True, False, False]


@of("torch._C._current_graph_task_id")
def _a_backward_is_told() -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x.exp()
    y.register_hook(lambda grad: seen.append(private_hooks.in_backward()))
    y.backward()
    assert (seen, private_hooks.in_backward()) == ([True], False)


@of("torch.multiprocessing.reductions.StorageWeakRef")
def _a_storage_is_known_to_be_gone() -> None:
    x = torch.ones(64)
    weak, view, before = private_hooks.weak_storage(x), x[3:], private.storage_id(x)
    del x
    assert not weak.expired(), "a view holds it"
    del view
    assert weak.expired(), "nothing holds it"
    others = [torch.ones(64) for _ in range(64)]
    assert before not in map(private.storage_id, others), "its id is used again"


@of("torch.nn.Module._call_impl")
def _modules_that_are_called_are_told() -> None:
    class Inner(nn.Module):
        def forward(self) -> list[nn.Module]:
            return list(private_hooks.modules_at_work())

    class Outer(nn.Module):
        def forward(self) -> list[nn.Module]:
            return inner()

    inner, outer = Inner(), Outer()
    assert outer() == [inner, outer]


def checkpointed_in_blocks(use_reentrant: bool) -> list[str]:
    """What happens when a region runs, where blocks are put around what saves its inputs."""
    said: list[str] = []

    @contextmanager
    def block(region: Any, args: Any) -> Iterator[Callable[[Any], Any]]:
        assert (region is None) == use_reentrant
        said.append("enter")
        yield lambda function: function
        said.append("leave")

    with blocks_around_checkpoints(block):
        x = torch.ones(2, requires_grad=True)
        region = lambda x: said.append("run") or x.exp()  # noqa: E731
        checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()
    return said


@contextmanager
def blocks_around_checkpoints(block: Any) -> Iterator[None]:
    """``save_checkpoints_in``, undone in the end."""
    owners = [
        look_up(n) for n in ("CheckpointFunction", "_CheckpointFrame") for n in [f"{_REGIONS}.{n}"]
    ]
    owners += [look_up(n) for n in [f"{_REGIONS}._NoopSaveInputs"] if private.has(f"{n}.apply")]
    before = [dict(vars(owner)) for owner in owners]
    private_hooks.save_checkpoints_in(block)
    try:
        yield
    finally:
        for owner, was in zip(owners, before, strict=True):
            for name in ("apply", "save_inputs"):
                if name in was:
                    setattr(owner, name, was[name])
                elif name in vars(owner):
                    delattr(owner, name)


_REGIONS = "torch.utils.checkpoint"


@of(f"{_REGIONS}._CheckpointFrame.save_inputs", f"{_REGIONS}._NoopSaveInputs.apply")
def _inputs_of_a_region_are_saved_in_a_block() -> None:
    assert checkpointed_in_blocks(use_reentrant=False) == ["enter", "leave", "run", "run"]


@of(f"{_REGIONS}.CheckpointFunction")
def _a_reentrant_region_runs_in_a_block() -> None:
    assert checkpointed_in_blocks(use_reentrant=True) == ["enter", "run", "leave", "run"]


@of(f"{_REGIONS}._CheckpointFrame")
def _a_region_tells_what_it_would_save_and_why_it_fails() -> None:
    class Failed(Exception):
        pass

    def fail(error: Exception) -> NoReturn:
        raise Failed from error

    def region(x: torch.Tensor, again: Any) -> torch.Tensor:
        runs.append(0)
        return (x if len(runs) == 1 else x[:1]).exp().sin()

    @contextmanager
    def block(one: Any, args: Any) -> Iterator[Callable[[Any], Any]]:
        function = private_hooks.function_of_region(one)
        assert function.func is region
        assert {"again": 3} in (function.keywords, *args)
        private_hooks.watch_region(one, telling, fail)
        yield lambda function: function

    def telling(x: torch.Tensor, again: bool) -> None:
        saved.append((len(x), again))

    runs: list[int] = []
    saved: list[tuple[int, bool]] = []
    with blocks_around_checkpoints(block):
        y = checkpoint(region, torch.ones(2, requires_grad=True), again=3, use_reentrant=False)
        with pytest.raises(Failed):
            y.sum().backward()
    assert saved[:2] == [(2, False), (2, False)]
    assert set(saved[2:]) == {(1, True)}


@of(f"{_REGIONS}._checkpoint_hook")
def _a_region_runs_forward_in_its_block() -> None:
    said: list[Any] = []

    @contextmanager
    def inside() -> Iterator[None]:
        said.append("enter")
        yield
        said.append("leave")

    @contextmanager
    def block(region: Any, args: Any) -> Iterator[Callable[[Any], Any]]:
        private_hooks.run_region_in(region, inside())
        said.append(region)
        yield lambda function: function

    def run(x: torch.Tensor) -> torch.Tensor:
        said.append(private_hooks.region_at_work(private_hooks.hooks_in_force()))
        return x.exp()

    with blocks_around_checkpoints(block):
        x = torch.ones(2, requires_grad=True)
        checkpoint(run, x, use_reentrant=False).sum().backward()
    region = said[0]
    assert said == [region, "enter", region, "leave", None], "made again, it is no forward"


@of("torch.autograd.graph.Node._sequence_nr")
def _later_nodes_have_higher_numbers() -> None:
    x = torch.ones(2, requires_grad=True)
    first, second = x.exp().grad_fn, x.exp().grad_fn
    assert first is not None
    assert second is not None
    assert private.sequence_number(second) > private.sequence_number(first)


@of("torch.autograd.graph.Node._raw_saved_*")
def _a_node_shows_what_it_saved() -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: ("packed", t), lambda pair: pair[1]):
        y = torch.ones(2, requires_grad=True).exp()
    assert y.grad_fn is not None
    ((name, (packed, _)),) = private.raw_saved(y.grad_fn)
    assert (name, packed) == ("result", "packed"), "it is not what the hook has made of it"


@of("torch.autograd.grad_mode._unsafe_preserve_version_counter")
def _versions_are_put_back() -> None:
    x = torch.ones(2)
    before = private.version(x)
    with private.unsafe_preserve_version_counter((x,)):
        x.add_(1)
    assert private.version(x) == before


@of("torch.Tensor._indices", "torch.Tensor._values")
def _sparse_tensors_show_their_parts() -> None:
    indices, values = private.sparse_parts(torch.eye(2).to_sparse())
    assert (indices.tolist(), values.tolist()) == ([[0, 1], [0, 1]], [1, 1])


@of("torch.profiler.profile.profiler.kineto_results")
def _a_profile_notes_allocations() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        with torch.profiler.record_function("mine 1"):
            torch.ones(1000)
        torch.ones(1000)
    events = private.memory_events(profiler)
    sizes = [nbytes for _, nbytes in events]
    assert sizes[0] >= 4000, f"its events are {sizes}"
    assert sum(sizes) == 0
    ((name, start, end),) = private.spans(profiler, "mine ")
    assert name == "mine 1"
    assert [start <= time <= end for time, _ in events] == [True, True, False, False]


@of("torch._dynamo.eval_frame.OptimizedModule._orig_mod", "torch.nn.Module._compiled_call_impl")
def _compiled_modules_are_told() -> None:
    model = nn.Linear(2, 2)
    assert private.uncompiled(torch.compile(model)) is model, "the wrapper hides its model"
    assert not private.compiled_in_place(model)
    model.compile()
    assert private.compiled_in_place(model), "module.compile() leaves no mark"
    private.undo_compile(model)
    assert not private.compiled_in_place(model)


@of("torch.nn.Module._wrapped_call_impl")
def _the_model_that_is_compiled_is_told() -> None:
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append(private.being_compiled())
        return gm.forward

    torch._dynamo.reset()
    model = nn.Linear(2, 2)
    wrapped = torch.compile(model, backend=backend)
    wrapped(torch.ones(2, 2))
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert seen[0][0] is wrapped, f"it is {seen[0]}"
    assert seen[1] is None
    assert private.being_compiled() is None


@of("torch._dynamo.lookup_backend")
def _backends_have_names() -> None:
    assert callable(private.lookup_backend("inductor"))


@of("torch._dynamo.exc.Unsupported.real_stack")
def _dynamo_tells_where_it_stops_and_for_whom() -> None:
    seen: list[Any] = []

    def stops(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
        return x

    def backend(graph: Any, inputs: Any) -> Any:
        return graph

    def note(args: Any) -> None:
        seen.append(private.stopped_tracing())

    private.at_end_of_compile(note)
    try:
        torch.compile(stops, backend=backend)(torch.ones(2))
    finally:
        torch._dynamo.callback_handler.remove_end_callback(note)
    [found] = [s for s in seen if s]
    first = stops.__code__.co_firstlineno
    assert found.backend is backend, f"the backend is {found.backend}"
    assert found.function == f"stops ({__file__}:{first})", found.function
    assert found.where == f"{__file__}:{first + 2}", found.where
    assert "x" in found.values, f"its variables are {sorted(found.values)}"


@of("torch.fx.experimental.symbolic_shapes.free_unbacked_symbols")
def _sizes_that_depend_on_values_have_symbols() -> None:
    mode = private.FakeTensorMode(shape_env=private.ShapeEnv())
    with mode:
        x = torch.ones(4)
        rows = x[x > 0]
    assert private.free_unbacked_symbols(rows)
    assert not private.free_unbacked_symbols(x)


@of("torch._inductor.list_options")
def _options_have_names() -> None:
    known = private.list_options()
    ours = "PARTITIONER", "PRE_PASS", "POST_PASS", "CACHEABLE"
    assert {getattr(private_inductor, name) for name in ours} <= set(known)


@of("torch._inductor.inductor_prims.force_stride_order")
def _a_value_is_written_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[private.VALUE] = torch.empty(4)
    graph.output(private_inductor.written_as(x))
    given = torch.arange(4.0)
    found = fx.GraphModule({}, graph)(given)
    assert torch.equal(found, given)


@of("torch._inductor.lowering.needs_realized_inputs")
def _calls_want_memory_and_loops_do_not() -> None:
    import torch._inductor.lowering  # fills it

    graph = fx.Graph()
    x = graph.placeholder("x")
    wanted = {
        op: private_inductor.wants_memory(graph.call_function(op, (x, x)))
        for op in (torch.ops.aten.mm.default, torch.ops.aten.add.Tensor)
    }
    assert list(wanted.values()) == [True, False]


@of(f"{_GRAPH_PASS}.CustomGraphPass", f"{_GRAPH_PASS}.CustomPartitionerFn")
def _passes_are_called_and_have_a_key() -> None:
    for kind in (private.CustomGraphPass, private.CustomPartitionerFn):
        assert kind.__abstractmethods__ == {"__call__", "uuid"}, "other methods are asked for"
    given = list(inspect.signature(private.CustomPartitionerFn.__call__).parameters)
    assert given == ["self", "gm", "joint_inputs", "kwargs"], f"a partitioner is given {given}"


@of(f"{_GRAPH_PASS}.get_hash_for_files")
def _files_have_a_hash() -> None:
    assert private.get_hash_for_files((__file__,))


@of(f"{_GRAPH_PASS}.get_custom_graph_passes")
def _several_passes_stay_several() -> None:
    assert look_up(f"{_GRAPH_PASS}.get_custom_graph_passes")([len, max]) == (len, max)


@of(f"{_CUT}.must_recompute", "meta['recompute']")
def _recomputing_is_in_the_meta() -> None:
    node = fx.Graph().placeholder("x")
    for policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.MUST_SAVE):
        node.meta[private.POLICY] = policy
        wanted = policy is CheckpointPolicy.MUST_RECOMPUTE
        assert private.must_recompute(node) is wanted, f"it does not heed {policy}"


@of("torch._functorch.config.activation_memory_budget")
def _a_budget_is_set_and_put_back() -> None:
    assert private_inductor.memory_budget() == 1
    with private_inductor.at_memory_budget(0.5):
        assert private_inductor.memory_budget() == 0.5
    assert private_inductor.memory_budget() == 1


@of("torch._functorch.config.force_non_lazy_backward_lowering")
def _backwards_are_compiled_with_their_forwards() -> None:
    compiled = []

    def note(graph: fx.GraphModule, inputs: object) -> object:
        compiled.append(graph)
        return private.make_boxed_func(graph.forward)

    at_once = private_inductor.backwards_at_once()
    assert at_once is not None
    aot = private.aot_autograd(fw_compiler=note, bw_compiler=note)
    with at_once:
        torch.compile(lambda x: x.exp(), backend=aot)(torch.ones(3, requires_grad=True))
    assert len(compiled) == 2, "the backward is not compiled yet"


@of("torch._inductor.lowering", "torch._inductor.decomposition.select_decomp_table")
def _inductor_decomposes() -> None:
    assert isinstance(private.lowering, types.ModuleType)
    assert len(private.select_decomp_table()) > 100


@of("torch._dynamo.backends.common.aot_autograd", "functorch.compile.make_boxed_func")
def _a_backend_is_made_of_compilers() -> None:
    seen: list[str] = []

    def nop(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append("compiled")
        return private.make_boxed_func(graph.forward)

    backend = private.aot_autograd(
        fw_compiler=nop,
        bw_compiler=nop,
        partition_fn=private.min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
        decompositions=private.select_decomp_table,
    )
    torch.compile(torch.sin, backend=backend)(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == ["compiled", "compiled"]


@of("torch._dynamo.backends.debugging.boxed_nop")
def _graphs_that_run_as_they_are_free_what_was_read() -> None:
    graph = fx.symbolic_trace(lambda x, y: (x.exp() + y).exp())
    run, inputs = private.boxed_nop(graph, []), [torch.ones(3), torch.ones(3)]
    held = weakref.ref(inputs[0])
    seen: list[bool] = []

    class Watch(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(held() is None)
            return func(*args, **(kwargs or {}))

    with Watch():
        run(inputs)
    assert seen == [False, True, True], "an input is there when its last reader has run"


@cache
def compiled_by_inductor() -> dict[str, dict[str, Any]]:
    """The metas of output nodes: of the joint graph, of the cut forward, of what inductor lowers.

    Under "placed": in which of the two graphs a node ended up that was to be in the backward.
    """
    seen: dict[str, dict[str, Any]] = {}

    def output(graph: fx.Graph) -> fx.Node:
        return graph.find_nodes(op="output")[0]

    class Cut(private.CustomPartitionerFn):
        def uuid(self) -> None:
            return None

        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            joint = output(gm.graph)
            seen["joint"] = dict(joint.meta) | {"outputs": len(joint.args[0])}
            (cos,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)
            seen["node"] = dict(cos.meta)
            cos.meta[private.PLACE] = private.IN_BACKWARD
            cut = private.min_cut_rematerialization_partition
            graphs = cut(gm, joint_inputs, **kwargs)
            seen["forward"] = dict(output(graphs[0].graph).meta)
            seen["placed"] = {
                name: bool(g.graph.find_nodes(op="call_function", target=cos.target))
                for name, g in zip(("forward", "backward"), graphs, strict=True)
            }
            return graphs

    class Pass(private.CustomGraphPass):
        def uuid(self) -> None:
            return None

        def __call__(self, graph: fx.Graph) -> None:
            seen.setdefault("lowered", dict(output(graph).meta))

    options: Any = {private_inductor.PARTITIONER: Cut(), private_inductor.POST_PASS: Pass()}
    with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(torch.sin, options=options)
        compiled(torch.ones(2, requires_grad=True)).sum().backward()
    return seen


@of("meta['partitioner_tag']")
def _a_tagged_node_is_in_the_backward() -> None:
    placed = compiled_by_inductor()["placed"]
    assert placed == {"forward": False, "backward": True}, f"it was placed in {placed}"


@of("meta['custom']")
def _nodes_are_marked() -> None:
    def marked(x: torch.Tensor) -> torch.Tensor:
        with torch.fx.traceback.annotate({"mark": "here"}):
            return x.exp()

    with torch.fx.traceback.preserve_node_meta():
        graph = private.make_fx(marked)(torch.ones(2)).graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    assert node.meta[private.CUSTOM] == {"mark": "here"}


@of("meta['val']")
def _nodes_of_a_joint_graph_have_values() -> None:
    value = compiled_by_inductor()["node"].get(private.VALUE)
    assert isinstance(value, private.FakeTensor), f"a node's is {value!r}"


@of("meta['desc']")
def _outputs_of_a_joint_graph_are_described() -> None:
    joint = compiled_by_inductor()["joint"]
    assert len(joint[private.OUTPUTS]) == joint["outputs"], "not each output has one"


@of("meta['output_stack_traces']")
def _outputs_of_a_cut_forward_have_traces() -> None:
    found = compiled_by_inductor()["forward"]
    has = private.OUTPUT_TRACES in found
    assert has == (minor("2.13") <= HERE), f"the output of a cut forward has {sorted(found)}"


@of("meta['user_visible_output_idxs']", "meta['original_output_strides']")
def _inductor_is_told_which_outputs_are_seen() -> None:
    found = compiled_by_inductor()["lowered"]
    missing = {private.VISIBLE, private.STRIDES} - set(found)
    assert not missing, f"the output that inductor lowers has {sorted(found)}"


# The tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_private_name_is_there_and_is_what_it_is_taken_for(row: Name) -> None:
    if not minor(row.since) <= HERE <= minor(row.until):
        span = f"from {row.since} to {row.until}"
        assert row.probe is False or not row.present, (
            f"{row.name} is in PyTorch {torch.__version__}, and its line says {span}."
        )
        return
    assert row.present, f"{row.name} is gone: {row.lack.text}. It was used for: {row.used}."
    assert row.probe is not False or row.name in CHECKS, f"no check of {row.name}"
    try:
        CHECKS.get(row.name, lambda: None)()
    except Exception as error:
        raise AssertionError(
            f"{row.name} has changed: {error} It is used for: {row.used}."
        ) from error


def test_every_check_is_of_a_name_and_every_name_has_one_line() -> None:
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names)
    assert set(CHECKS) <= set(names)
    for row in TABLE:
        assert {row.since, row.until} <= set(RUN), row.name
        assert row.used, row.name
        assert row.lack.text, row.name


def bound(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that these statements bind."""
    names: set[str] = set()
    for node in nodes:
        match node:
            case ast.Import() | ast.ImportFrom():
                names |= {a.asname or a.name for a in node.names}
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def test_every_name_to_import_has_a_type_and_a_line() -> None:
    tree = ast.parse(Path(private.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and "TYPE" in ast.unparse(n.test)]
    typed, lines = bound(block.body), {row.short for row in TABLE if row.probe is None}
    assert typed <= lines
    for name in typed:
        assert getattr(private, name) is not None
    nodes = [n for path in SOURCES for n in ast.walk(ast.parse(path.read_text()))]
    asked = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "dropit_fx.private"]
    assert {a.name for n in asked for a in n.names} <= typed | bound(tree.body)


# Only private.py ----------------------------------------------------------------------------------

SOURCES = [
    path
    for folder in ("dropit_fx", "passes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.name.startswith("private")
]


def is_hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


UNSTABLE = ("functorch", "torch.fx.experimental", "torch.ops.higher_order")
LAST = [re.sub(r".*\.|meta\['|'\]", "", row.name) for row in TABLE]
# the others are words as well, or public names of the same ops
LEAVES = {last for last in LAST if "_" in last and (is_hidden(last) or not hasattr(F, last))}


def is_private(dotted: str) -> bool:
    first, *parts = dotted.split(".")
    unstable = any(f"{dotted}.".startswith(f"{u}.") for u in UNSTABLE)
    return first in ("torch", "functorch") and (unstable or any(map(is_hidden, parts)))


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every private name of PyTorch's: imports, attributes, strings."""
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [a.name for a in node.names if is_private(a.name)]
            case ast.ImportFrom():
                names = [n for a in node.names if is_private(n := f"{node.module}.{a.name}")]
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                names = [node.attr] if node.attr in LEAVES and is_hidden(node.attr) else []
            case ast.Attribute(value=ast.Name(id="sys")):
                pass  # Python's own
            case ast.Attribute(attr="_replace"):
                pass  # of a named tuple, whose methods have names like that to be no field's
            case ast.Attribute():
                dotted = ast.unparse(node)
                names = [dotted] if is_hidden(node.attr) or is_private(dotted) else []
            case ast.Constant(value=str(text)) if " " not in text:
                known = text in LEAVES or text.startswith("_raw_saved")
                known |= "." in text and is_private(text)  # a package alone is a word
                names = [text] if known else []
            case ast.Subscript(value=ast.Attribute(attr="meta"), slice=ast.Constant(value=text)):
                names = [text]
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="meta"), attr="get" | "pop"),
                args=[ast.Constant(value=text), *_],
            ):
                names = [text]
            case ast.ClassDef():
                targets = [t for n in node.body if isinstance(n, ast.Assign) for t in n.targets]
                names = [t.id for t in targets if isinstance(t, ast.Name) and t.id in LEAVES]
        yield from ((getattr(node, "lineno", 0), name) for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_touches_a_private_name_of_pytorch(path: Path) -> None:
    found = [
        f"{path.name}:{line}: {name}" for line, name in private_names(ast.parse(path.read_text()))
    ]
    assert not found, f"reach it through dropit_fx/private.py: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "import torch.utils._pytree as pytree",
        "from torch.utils import _pytree",
        "from torch.fx.experimental import proxy_tensor",
        "from functorch.compile import make_boxed_func",
        "torch._C._nn.pad(x)",
        "torch.ops.higher_order.tag_activation_checkpoint(x)",
        "x.untyped_storage()._cdata",
        "aten._softmax_backward_data(x)",
        "self._buffers",
        "getattr(module, '_parameters')",
        "node.meta['example_value']",
        "node.meta['val']",
        "node.meta.get('val')",
        "'example_value' in node.meta",
        "mock.patch('torch._inductor.config.debug')",
        "dir(node).count('_raw_saved_self')",
        "class Module:\n    _is_impure = True",
    ],
)
def test_private_names_are_found_in_every_form(code: str) -> None:
    assert list(private_names(ast.parse(code)))


# Other versions -----------------------------------------------------------------------------------


HAD = tuple(row for row in TABLE if minor(row.since) <= HERE <= minor(row.until))


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> str:
    """A newer PyTorch that lacks a name."""
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    monkeypatch.setattr(private, "_looked_at", set())
    monkeypatch.setattr(private, "TABLE", HAD)
    cut = types.SimpleNamespace(**vars(look_up(_CUT)))
    del cut.must_recompute
    monkeypatch.setattr(torch._functorch, "partitioners", cut)
    monkeypatch.delitem(vars(private), "must_recompute", raising=False)
    return f"{_CUT}.must_recompute"


def test_a_newer_pytorch_is_warned_of_once_with_what_is_missing_and_what_is_off(gone: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            private.warn_of_missing("backend='dropit'")
    (warning,) = [w for w in caught if w.category is RuntimeWarning]
    text = str(warning.message)
    assert text.splitlines() == [
        f"dropit_fx was run with PyTorch {', '.join(RUN)}; in 9.9.0 it misses",
        f"  {gone}: dropit_fx.compile.backend cannot be imported",
    ]


def test_a_vital_name_that_is_missing_is_told_where_it_is_imported(gone: str) -> None:
    with pytest.warns(RuntimeWarning), pytest.raises(private.MissingName) as error:
        assert private.must_recompute
    assert str(error.value) == (
        f"PyTorch 9.9.0 has no {gone}: dropit_fx.compile.backend cannot be imported."
        f" dropit_fx was run with PyTorch {', '.join(RUN)}."
    )


def test_a_newer_pytorch_with_every_name_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    monkeypatch.setattr(private, "_looked_at", set())
    monkeypatch.setattr(private, "TABLE", HAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in sorted({row.lack.part for row in TABLE}):
            private.warn_of_missing(part)


def in_a_new_process(before: str, after: str) -> str:
    code = f"import warnings, torch\nwarnings.simplefilter('always')\n{before}\n{after}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_name_that_is_not_vital_leaves_the_rest_at_work() -> None:
    out = in_a_new_process(
        "torch.__version__ = '9.9.0'\ndel torch.nn.BatchNorm2d._check_input_dim\n"
        "del torch.fx.node._get_qualified_name",
        "import dropit_fx, dropit_fx.measure\n"
        "m = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())\n"
        "p = dropit_fx.transform(m, example_args=(torch.ones(64, 64),))\n"
        "print(dropit_fx.measure.saved_bytes(p, torch.ones(64, 64)))\n"
        "import copy\ncopy.deepcopy(p)",
    )
    assert out.count("RuntimeWarning") == 1, out
    assert "  torch.fx.node._get_qualified_name: rewritten models can be neither" in out
    assert re.search(r"^\d+$", out, re.MULTILINE), out
    assert "MissingName: PyTorch 9.9.0 has no torch.fx.node._get_qualified_name: rewritten" in out


def test_an_older_pytorch_is_refused_by_name() -> None:
    out = in_a_new_process("torch.__version__ = '2.10.0+cpu'", "import dropit_fx")
    assert out.strip().splitlines()[-1] == (
        f"ImportError: dropit_fx needs PyTorch {RUN[0]} or newer, this is 2.10.0+cpu:"
        f" pip install 'torch>={RUN[0]}'"
    )


def test_importing_the_package_loads_no_compiler() -> None:
    out = in_a_new_process("", "import sys, dropit_fx\nprint('torch._inductor' in sys.modules)")
    assert out.splitlines()[-1] == "False"
