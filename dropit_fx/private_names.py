"""The private and unstable names of PyTorch that dropit_fx touches: a line for each.

``private.py`` is the one way to them; no other module may name one (``tests/test_private.py``). One
is Lightning's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dropit_fx.private_lookup import Lack, Name


def _node() -> Any:
    return torch.ones(1, requires_grad=True).exp().grad_fn


def _native_batch_norm(*arguments: Any) -> tuple[Any, ...]:
    out, mean, invstd = torch.native_batch_norm(*arguments[:-1])
    return out, mean, invstd, mean.new_empty(0, dtype=torch.uint8), 0


_IMPORT = Lack("import dropit_fx", "`import dropit_fx` fails", vital=True)
_CAPTURE = Lack("import dropit_fx", "dropit_fx.transform fails")
_SEEN = Lack("import dropit_fx", "reports count what is saved wrongly, or fail")
_MEASURE = Lack("import dropit_fx", "dropit_fx.measure fails")
_OFFLOAD = Lack("import dropit_fx", "packed tensors are not offloaded")
_HOOKS = Lack("import dropit_fx", "pack_checkpoints and pack_saved fail")
_COPY = Lack("import dropit_fx", "rewritten models can be neither copied nor pickled")
_OPAQUE = Lack("import dropit_fx", "nn.MultiheadAttention stays whole: counted, not packed")
_SPELLING = Lack("import dropit_fx", "calls that torch.compile writes so are not packed")
_TOLD = Lack("import dropit_fx", "messages and rules do not know the user's modules and lines")
_EXPORT = Lack("torch.export", "models that only torch.export takes are refused", vital=True)
_PLUGIN = Lack("backend='dropit'", "torch.compile(model, backend='dropit') fails")
_GUARD = Lack("backend='dropit'", "dropit_fx.compile.backend cannot be imported", vital=True)
_UNSEEN = Lack("backend='dropit'", "compiled models may save dense tensors beside packed ones")
_INNER = Lack("backend='dropit'", "of the inner backends, only 'inductor' and 'eager' work")
_BUDGET = Lack("backend='dropit'", "memory budgets are not heeded")
_SECOND = Lack(
    "import dropit_fx", "autograd.grad(create_graph=True) inside of compiled code is not refused"
)
_ROOFLINE = Lack("bench roofline", "bench roofline fails")
_ABSENT = Lack("bench roofline", "bench roofline counts the kernels of CPUs alone")


def _lack(text: str, part: str = "import dropit_fx") -> Lack:
    return Lack(part, text)


_VIEWS = _lack("what linear returns for inputs of three dimensions cannot be written in place")
_REALISED = _lack("fused packing reads and writes more memory than it need", "backend='dropit'")
_COPIES = _lack("channels-last copies of weights may be saved", "backend='dropit'")
_UNTOLD = _lack("nobody says where torch.compile gives no graph", "backend='dropit'")
_VARIANTS = _lack(
    "bench pareto may run its later variants uncompiled, and says so", "backend='dropit'"
)


def _of(
    owner: str, lack: Lack, used: str, *names: str, on: Callable[[], object] | None = None
) -> tuple[Name, ...]:
    """Names of one owner that are used for one thing; ``on`` makes an object that has them."""
    probes = {name: partial(lambda n: getattr(on(), n), name) for name in names} if on else {}
    return tuple(Name(f"{owner}.{n}", lack, used, probe=probes.get(n)) for n in names)


TABLE: tuple[Name, ...] = (
    # graphs, arguments, fake tensors
    Name("torch.utils._pytree", _IMPORT, "arguments of any nesting"),
    Name("torch._subclasses.fake_tensor.FakeTensor", _IMPORT, "telling fakes from real tensors"),
    Name("torch._subclasses.fake_tensor.FakeTensorMode", _IMPORT, "running graphs at no cost"),
    Name(
        "_dynamo_marked_constant",
        _lack("rewritten models do not compile under autocast but with backend='dropit'"),
        "running a function while Dynamo traces its caller",
        probe=False,
    ),
    Name("torch._ops.OpOverload", _IMPORT, "telling ATen calls from others"),
    Name(
        "torch._ops.OpOverload._schema",
        _CAPTURE,
        "default arguments of ATen calls, and which write into their input",
        probe=lambda: torch.ops.aten.add.Tensor._schema,
    ),
    Name(
        "torch.utils._python_dispatch.TorchDispatchMode",
        _IMPORT,
        "numbering what a model and its graph compute",
    ),
    Name(
        "torch._export.utils._compiling_state_context",
        _EXPORT,
        "what a model's code does that asks whether it is exported",
    ),
    Name("torch.nn.modules.module._has_any_global_hook", _CAPTURE, "hooks that a graph would lose"),
    Name(
        "torch.utils._python_dispatch._disable_current_modes",
        _CAPTURE,
        "constants of a model, computed while it runs on fake tensors",
    ),
    Name(
        "torch.nn.utils.stateless._reparametrize_module",
        _CAPTURE,
        "fake parameters for the time of a run",
    ),
    Name(
        "torch.SymInt.node.hint",
        _PLUGIN,
        "sizes of the example where they are dynamic",
        probe=False,
    ),
    Name(
        "torch.fx.experimental.symbolic_shapes.free_unbacked_symbols",
        _SEEN,
        "telling sizes that depend on values",
    ),
    Name("torch.UntypedStorage._cdata", _SEEN, "telling storages apart"),
    Name("torch.multiprocessing.reductions.StorageWeakRef", _SEEN, "telling dead storages"),
    Name("torch._C._storage_Use_Count", _OFFLOAD, "using host memory again that nothing holds"),
    Name("torch.Tensor._version", _SEEN, "telling values apart that were written in place"),
    Name("torch.Tensor._base", _VIEWS, "telling what is a view, and of what"),
    Name("torch.ops.aten._unsafe_view", _VIEWS, "results that autograd does not take for views"),
    Name(
        "torch._C._autograd._saved_tensors_hooks_set_tracing",
        _lack("graphs that torch.compile splits for DistributedDataParallel are not packed"),
        "asking autograd what it saves while a caller traces",
        alias="set_hooks_tracing",
        instead=lambda on: on,
    ),
    # tracing of models, and the graph modules that come out
    Name("torch.nn.modules.batchnorm._NormBase", _IMPORT, "norms that stay modules"),
    Name("torch.nn.modules.batchnorm._BatchNorm", _IMPORT, "norms that the tracer looks into"),
    Name(
        "torch.nn.BatchNorm2d._check_input_dim",
        _lack("models with batch norm are captured by torch.export, which needs an example"),
        "left out while tracing: proxies have no dimensions",
    ),
    Name("torch.nn.modules.conv._ConvNd", _IMPORT, "guessing inputs from a first layer"),
    *_of(
        "torch.nn.Module",
        *(_CAPTURE, "the order of parameters, buffers and submodules; constants of a trace"),
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
        on=nn.Module,
    ),
    *_of(
        "torch.nn.Module",
        *(_CAPTURE, "modules that save or load otherwise than tensor by tensor"),
        *("_save_to_state_dict", "_load_from_state_dict"),
        *("_state_dict_pre_hooks", "_state_dict_hooks"),
        *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        on=nn.Module,
    ),
    Name(
        "torch.fx.Graph._codegen",
        _lack("graphs of torch.export with nested inputs are refused, or lose them in copies"),
        "how the inputs of a graph are nested",
        probe=lambda: fx.Graph()._codegen,
    ),
    Name("torch.fx.graph._PyTreeCodeGen", _IMPORT, "checking how inputs are nested"),
    Name("torch.fx.node._get_qualified_name", _COPY, "names of functions in pickles"),
    Name(
        "_is_impure",
        _lack("checks of exported models' inputs may be lost"),
        "telling fx to keep a module that returns nothing",
        probe=False,
    ),
    Name(
        "CompiledFunctionBackward",
        _lack("second derivatives of compiled models are refused in PyTorch's words"),
        "telling the backward of a compiled graph",
        probe=False,
    ),
    Name("meta['stack_trace']", _TOLD, "the user's line of a node", probe=False),
    Name("meta['nn_module_stack']", _TOLD, "the user's module of a node", probe=False),
    Name(
        "torch.fx.experimental.proxy_tensor.make_fx", _OPAQUE, "looking into nn.MultiheadAttention"
    ),
    Name("torch._guards.tracing", _OPAQUE, "looking into it in fake tensors' own mode"),
    *_of(
        "torch.fx.experimental.symbolic_shapes",
        *(_OPAQUE, "its batch and sequence"),
        *("DimDynamic", "ShapeEnv", "StatelessSymbolicContext"),
    ),
    Name(
        "torch.utils._sympy.printers.PythonPrinter",
        _OPAQUE,
        "conditions on the sizes of what is opened, as Python",
    ),
    Name(
        "torch.fx.experimental.symbolic_shapes.SYMPY_INTERP",
        _EXPORT,
        "functions in the conditions on an exported model's inputs",
    ),
    Name(
        "torch._dynamo.dont_skip_tracing",
        _lack("exported models with conditions on their inputs compile in pieces", "torch.export"),
        "compiling these conditions",
        instead=lambda function: function,
    ),
    Name(
        "torch.export._unlift._convert_guards_code_to_fn",
        _lack("exported models with conditions on their inputs do not pickle", "torch.export"),
        "replaced while exporting, by a check that pickles",
    ),
    Name(
        "torch.utils.checkpoint._checkpoint_without_reentrant_generator",
        _CAPTURE,
        "seeing what a model that is traced checkpoints",
    ),
    Name(
        "torch.utils.checkpoint._checkpoint_without_reentrant_generator_impl",
        _CAPTURE,
        "the same",
        since="2.14.1",
    ),
    # saved-tensor hooks that pack (private_hooks.py)
    Name(
        "torch._C._autograd._top_saved_tensors_default_hooks",
        _lack("other saved-tensor hooks around pack_saved see nothing of what it packs"),
        "handing on to them what is packed, and telling those of a checkpointed region",
    ),
    Name("torch._C._current_graph_task_id", _HOOKS, "telling whether a backward runs"),
    Name("torch.nn.Module._call_impl", _HOOKS, "telling whose checkpoint it is"),
    Name("torch.utils.checkpoint.CheckpointFunction", _HOOKS, "packing its inputs"),
    Name(
        "torch.utils.checkpoint._CheckpointFrame.save_inputs",
        *(_HOOKS, "packing the inputs of a region"),
        since="2.13.0",
    ),
    Name("torch.utils.checkpoint._NoopSaveInputs.apply", _HOOKS, "the same", until="2.11.0"),
    Name(
        "torch.utils.checkpoint._CheckpointFrame",
        *(_HOOKS, "seeing what a region would save, and saying why it cannot be made again"),
    ),
    Name("torch.utils.checkpoint._checkpoint_hook", _HOOKS, "following what a region computes"),
    # transforms of functions, and what Dynamo makes of ours
    Name(
        "torch._C._functorch.peek_interpreter_stack",
        _lack("packed models fail under torch.func"),
        "telling that a transform is at work: the ops then run as PyTorch runs them",
        instead=lambda: None,
    ),
    Name(
        "torch._C._functorch.is_legacy_batchedtensor",
        _lack("is_grads_batched=True fails through packed ops in PyTorch's words"),
        "refusing many gradients at once, and saying what to do instead",
        instead=lambda x: False,
    ),
    Name(
        "torch.autograd.forward_ad._current_level",
        _lack("packed models fail in forward mode"),
        "telling that forward-mode differentiation is on",
    ),
    *_of(
        "torch._C._dynamo.eval_frame",
        *(_SECOND, "keeping Dynamo from compiling backwards by themselves"),
        *("set_code_exec_strategy", "_FrameAction", "_FrameExecStrategy"),
    ),
    # ops
    *_of(
        "torch._C._nn",
        *(_SPELLING, "F.pad and pooling in Dynamo's graphs"),
        *("pad", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    ),
    Name(
        "torch.ops.higher_order.tag_activation_checkpoint",
        _lack("checkpointed regions stay as they are"),
        "regions that torch.compile recomputes",
    ),
    Name(
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        _lack("a block under no_grad that raises may leave gradients switched off"),
        "blocks of exported graphs under no_grad",
    ),
    Name(
        "torch.fx.experimental.proxy_tensor.get_proxy_mode",
        _lack("weights that are computed are saved by the plug-in"),
        "telling that a joint graph is traced: its partitioner makes computed weights again",
        instead=lambda: None,
    ),
    Name(
        "meta['_checkpoint_context_fn']",
        _lack("selective checkpoints are treated as plain ones"),
        "telling selective checkpoints",
        probe=False,
    ),
    Name(
        "_stacklevel",
        _SPELLING,
        "an argument of F.softmax and F.log_softmax that changes nothing",
        probe=lambda: inspect.signature(F.softmax).parameters["_stacklevel"],
    ),
    Name(
        "torch.xpu._lazy_seed_tracker.manual_seed_all_cb",
        _lack("after torch.manual_seed, chance is the same only where something else drew too"),
        "noticing torch.manual_seed: it leaves this behind whatever devices there are",
        probe=lambda: torch.xpu._lazy_seed_tracker.manual_seed_all_cb,
    ),
    Name(
        "torch.ops.aten._unsafe_index",
        _lack("fused packing checks each of its indices"),
        "reading at places that are known to be inside",
        instead=torch.ops.aten.index,
    ),
    Name(
        "torch.ops.aten._unsafe_index_put",
        _lack("fused packing checks each of its indices"),
        "writing at places that are known to be inside",
        instead=torch.ops.aten.index_put,
    ),
    Name(
        "torch.ops.aten._native_batch_norm_legit",
        _lack("inputs of batch norm cannot be packed"),
        "mean and deviation of channels",
    ),
    Name(
        "torch._batch_norm_impl_index",
        _lack("on CUDA, batch norm runs PyTorch's own kernel where dense runs cuDNN's"),
        "batch norm's forward in the kernel that F.batch_norm picks",
        instead=_native_batch_norm,
    ),
    Name(
        "torch._C._get_cudnn_batch_norm_reserve_space_size",
        _lack("reports leave out what cuDNN's batch norm hands to its backward"),
        "bytes that a fake tensor leaves out",
    ),
    Name(
        "torch._C._select_conv_backend",
        _lack("reports count less than the memory of some transposed convolutions' results"),
        "bytes that a fake tensor leaves out",
    ),
    Name("torch.ops.aten._embedding_bag", _SEEN, "bytes that a fake tensor leaves out"),
    Name(
        "torch.ops.aten._native_batch_norm_legit_functional",
        _SEEN,
        "the statistics of a compiled norm under autocast",
        alias="functional_batch_norm",
    ),
    Name("torch.ops.aten._assert_scalar", _SEEN, "conditions on sizes that depend on values"),
    Name("torch._assert", _CAPTURE, "checks that a symbolic trace keeps", alias="traced_assert"),
    Name("torch.ops.aten._to_copy", _SPELLING, "dtype casts in exported graphs"),
    Name("torch.ops.aten._grouped_mm", _IMPORT, "products of groups of rows"),
    Name("torch._grouped_mm", _IMPORT, "their function", alias="grouped_mm_of_torch"),
    Name("torch.ops.aten._safe_softmax", _lack("attention with dropout fails"), "its weights"),
    Name("torch.ops.aten._softmax_backward_data", _lack("softmax cannot be packed"), "backward"),
    Name(
        "torch.ops.aten._log_softmax_backward_data",
        _lack("log_softmax and cross_entropy cannot be packed"),
        "their backward",
    ),
    Name(
        "torch._prims_common.suggest_memory_format",
        _lack("group_norm cannot be packed"),
        "the layout in which it is computed on a CPU",
    ),
    # measuring
    *_of("torch.autograd.graph.Node", _MEASURE, "telling a step's nodes", "_sequence_nr", on=_node),
    Name(
        "torch.autograd.graph.Node._raw_saved_*",
        _MEASURE,
        "what a node has saved",
        probe=lambda: _node()._raw_saved_result,
    ),
    Name(
        "torch.autograd.grad_mode._unsafe_preserve_version_counter",
        _lack("a graph made before a measurement may refuse its backward after it"),
        "putting buffers back unnoticed",
        instead=lambda tensors: nullcontext(),
    ),
    *_of("torch.Tensor", _MEASURE, "bytes of sparse tensors", "_indices", "_values"),
    Name(
        "torch.profiler.profile.profiler.kineto_results",
        _lack("dropit_fx.measure.peak_memory fails on CPUs"),
        "what was allocated and freed, in order",
        probe=False,
    ),
    # models that are compiled
    Name(
        "torch._dynamo.eval_frame.OptimizedModule._orig_mod",
        _lack("report(torch.compile(rewritten)) finds nothing"),
        "the model inside",
        probe=False,
    ),
    Name(
        "torch.nn.Module._compiled_call_impl",
        _lack("DropITCallback fails"),
        "telling whether a model is compiled in place, and undoing it",
    ),
    Name(
        "torch.nn.Module._wrapped_call_impl",
        _lack("report(torch.compile(model, backend='dropit')) finds nothing", "backend='dropit'"),
        "the module that is called while Dynamo compiles",
    ),
    Name("meta['example_value']", _PLUGIN, "the fake value of a node of Dynamo's", probe=False),
    Name(
        "meta['tensor_dict']",
        _lack("a product with a buffer of the model counts as one of activations"),
        "which inputs of a graph of Dynamo's are parameters and buffers",
        probe=False,
    ),
    Name(
        "L_self_modules_*_parameters_*",
        _lack("rules with `train` find no parameter in torch.compile's graphs", "backend='dropit'"),
        "which parameter an input of a graph of Dynamo's is",
        probe=False,
    ),
    Name(
        "lightning.pytorch.LightningModule._compiler_ctx",
        _lack("FreezeLayers does not ask for variants= of a compiled module", "Lightning"),
        "telling that it is compiled: Trainer unwraps it",
        probe=False,
    ),
    Name("torch._dynamo.on_compile_end", _UNTOLD, "noticing that Dynamo gives no graph"),
    Name("torch._dynamo.callback_handler.end_callbacks", _UNTOLD, "being called once"),
    Name(
        "torch._dynamo.exc.Unsupported.real_stack",
        *(_UNTOLD, "the line at which it stopped, and of which function for which backend"),
        probe=False,
    ),
    Name("torch._dynamo.lookup_backend", _INNER, "inner backends by name"),
    *_of(
        "torch._dynamo.config",
        *(_VARIANTS, "compiling one model in many ways"),
        *("recompile_limit", "accumulated_recompile_limit"),
    ),
    Name("torch._inductor.list_options", _PLUGIN, "telling options of inductor's from slips"),
    Name("torch._inductor.list_mode_options", _PLUGIN, "torch.compile(mode=...)"),
    *_of(
        "torch._inductor.compile_fx",
        *(_PLUGIN, "compiling the rewritten graph, and its forwards and backwards"),
        *("compile_fx", "compile_fx_inner"),
    ),
    *_of(
        "torch._inductor.custom_graph_pass",
        *(_GUARD, "the partitioner guard, the pass behind the cut, and their cache keys"),
        *("CustomGraphPass", "CustomPartitionerFn", "get_hash_for_files"),
    ),
    Name(
        "torch._inductor.custom_graph_pass.get_custom_graph_passes",
        _lack("several passes are handed over as one, without is_inference", "backend='dropit'"),
        "telling whether inductor takes a list of passes",
        since="2.13.0",
    ),
    Name(
        "torch._inductor.graph.GraphLowering.decide_layout_opt",
        _lack(
            "convolutions are packed as they are laid out, not as inductor does", "backend='dropit'"
        ),
        "asking whether inductor lays out convolutions channels-last",
    ),
    Name("torch._inductor.config.custom_partitioner_fn", _PLUGIN, "handing over the guard"),
    Name(
        "torch._inductor.config.post_grad_custom_pre_pass",
        _lack(
            "packing stays custom ops in compiled graphs: `fuse` does nothing", "backend='dropit'"
        ),
        "handing over the pass that replaces packing by plain tensor ops",
    ),
    Name(
        "torch._inductor.inductor_prims.force_stride_order",
        *(_REALISED, "writing once what several calls of attention read"),
    ),
    Name(
        "torch._inductor.lowering.needs_realized_inputs",
        *(_REALISED, "packing what a call reads in the loop that makes it"),
    ),
    *(
        Name(f"torch._inductor.config.realize_{name}_threshold", _REALISED, "reading bytes again")
        for name in ("opcount", "reads", "acc_reads")
    ),
    Name(
        "torch._inductor.config.loop_ordering_after_fusion",
        *(_REALISED, "packing in the loop that makes the values"),
    ),
    Name(
        "torch._inductor.config.allow_buffer_reuse",
        _lack("compiled steps hold memory for later use: their peak is higher", "backend='dropit'"),
        "freeing what has no reader left",
    ),
    Name(
        "torch._inductor.config.post_grad_custom_post_pass",
        _COPIES,
        "handing over the pass behind the cut",
    ),
    Name(
        "torch._inductor.config.unsafe_marked_cacheable_functions",
        _lack("packed models are compiled anew in each process", "backend='dropit'"),
        "compile caches for packed models",
    ),
    Name(
        "torch._functorch.partitioners.min_cut_rematerialization_partition",
        _GUARD,
        "the cut between forward and backward",
    ),
    Name("torch._functorch.partitioners.must_recompute", _GUARD, "telling checkpointed nodes"),
    Name("torch._functorch.config.activation_memory_budget", _BUDGET, "recomputing beside packing"),
    Name(
        "torch._functorch.config.force_non_lazy_backward_lowering",
        _lack(
            "peaks of compiled steps are told of the eager one; bench roofline fails",
            "backend='dropit'",
        ),
        "running or scheduling a backward before its forward has run",
    ),
    Name("meta['partitioner_tag']", _UNSEEN, "unpacking in the backward", probe=False),
    Name("meta['custom']", _UNSEEN, "marking what codecs pack", probe=False),
    Name("meta['recompute']", _UNSEEN, "packed tensors stay saved under a budget", probe=False),
    Name("meta['val']", _UNSEEN, "the fake value of a node of AOTAutograd's", probe=False),
    Name("meta['desc']", _PLUGIN, "descriptions of the outputs of a joint graph", probe=False),
    Name(
        "meta['output_stack_traces']",
        _lack("nothing: it is left alone where there is none", "backend='dropit'"),
        "the same of where they were made",
        since="2.13.0",
        probe=False,
    ),
    Name(
        "meta['user_visible_output_idxs']",
        _COPIES,
        "outputs that are returned in their own layout",
        probe=False,
    ),
    Name("meta['original_output_strides']", _COPIES, "that layout", probe=False),
    Name("torch._dynamo.backends.common.aot_autograd", _INNER, "backends without inductor"),
    Name("torch._dynamo.backends.debugging.boxed_nop", _INNER, "backends that free what was read"),
    Name("functorch.compile.make_boxed_func", _ROOFLINE, "kernels that are counted, not run"),
    Name("torch._inductor.lowering", _INNER, "loaded for the decomposition of max_pool2d"),
    Name("torch._inductor.decomposition.select_decomp_table", _INNER, "aot_eager_decomp_partition"),
    # schedules, asked without a GPU (private_inductor.py)
    *_of(
        "torch._inductor",
        *(_ROOFLINE, "the kernels of a step and their bytes"),
        *("graph.GraphLowering", "graph.GraphLowering._update_scheduler"),
        "scheduler.BaseSchedulerNode.get_read_write_buffer_accesses",
    ),
    Name(
        "torch._inductor.dependencies.MemoryDep.get_numel", _ROOFLINE, "bytes of parts of buffers"
    ),
    Name("torch._inductor.virtualized.V", _ROOFLINE, "what inductor knows while it schedules"),
    Name("torch._inductor.debug.DebugContext", _ROOFLINE, "lowering a graph by itself"),
    Name(
        "torch._inductor.fx_passes.post_grad.post_grad_passes",
        *(_ROOFLINE, "inductor's passes behind the cut"),
    ),
    Name("torch._inductor.config.force_disable_caches", _ROOFLINE, "scheduling it each time"),
    Name("torch._functorch.config.enable_autograd_cache", _ROOFLINE, "scheduling it each time"),
    Name("meta['original_aten']", _ROOFLINE, "names of kernels", probe=False),
    *_of(
        "torch",
        *(_ABSENT, "schedules for a GPU that is not there"),
        *("_dynamo.device_interface.CudaInterface", "cuda._lazy_init"),
        *("_subclasses.fake_tensor.init_gpu_context", "_inductor.scheduler.has_triton"),
        "_inductor.runtime.triton_helpers.set_driver_to_gpu",
    ),
)
