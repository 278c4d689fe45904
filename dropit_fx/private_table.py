"""All private names: the lines of ``private_names.py``, and those of ``private_inductor.py``."""

from __future__ import annotations

from dropit_fx import private_names
from dropit_fx.private_names import RUN, Lack, Name, look_up

__all__ = ("RUN", "TABLE", "Name", "look_up")

_ROOFLINE = Lack("bench roofline", "bench roofline fails")
_ABSENT = Lack("bench roofline", "bench roofline counts the kernels of CPUs alone")
_COUNT, _TOLD = "the kernels of a step and their bytes", "schedules for a GPU that is not there"

TABLE: tuple[Name, ...] = (
    *private_names.TABLE,
    Name("torch._inductor.graph.GraphLowering", _ROOFLINE, _COUNT),
    Name("torch._inductor.graph.GraphLowering._update_scheduler", _ROOFLINE, _COUNT),
    Name(
        "torch._inductor.scheduler.BaseSchedulerNode.get_read_write_buffer_accesses",
        *(_ROOFLINE, _COUNT),
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
    Name(
        "torch._functorch.config.force_non_lazy_backward_lowering",
        *(_ROOFLINE, "scheduling a backward that never runs"),
    ),
    Name("meta['original_aten']", _ROOFLINE, "names of kernels", probe=False),
    Name("torch._dynamo.device_interface.CudaInterface", _ABSENT, _TOLD),
    Name("torch.cuda._lazy_init", _ABSENT, _TOLD),
    Name("torch._subclasses.fake_tensor.init_gpu_context", _ABSENT, _TOLD),
    Name("torch._inductor.scheduler.has_triton", _ABSENT, _TOLD),
    Name("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", _ABSENT, _TOLD),
)
