"""The rows of ``bench gpu``: what one model, run one way, takes; and what one packed format takes.

Everything runs on CPUs too, with small models, so that a typo is found without a GPU; the figures
of the allocator are None there, but for the peak.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropit_fx import measure
from dropit_fx.bench.device import allocated, busy_seconds, peak_of, seconds, synchronize
from dropit_fx.bench.gpu_models import MODELS
from dropit_fx.bench.pareto import Variant
from dropit_fx.bench.step import Task
from dropit_fx.check.compare import losses
from dropit_fx.codecs import CODEC
from dropit_fx.config import load_config, presets
from dropit_fx.runtime import copies, packed_call

Row = dict[str, Any]
Gradients = list[Tensor | None]  # of each parameter, on the CPU

# Variants -----------------------------------------------------------------------------------------

PRESETS = ("balanced", "lossless", "max", "dropit")
BUDGETS = (0.5, 0.2)
DENSE, CHECKPOINT, OFFLOAD = "dense", "checkpoint", "save_on_cpu"
NO_LOGITS = "no logits"  # balanced with drop_logits: of language models
FUSED = "fused"  # balanced with packing fused by inductor
GRAPHS = "cuda graphs"  # compiled, and launched as CUDA graphs: what the host takes is not in it
MODES: dict[str, tuple[str, ...]] = {
    "eager": (DENSE, *PRESETS, NO_LOGITS, CHECKPOINT, OFFLOAD),
    "compiled": (DENSE, *PRESETS, FUSED, NO_LOGITS, CHECKPOINT, *(f"budget={b}" for b in BUDGETS)),
    GRAPHS: (DENSE, *PRESETS, FUSED, NO_LOGITS, CHECKPOINT),
}


def way(model: nn.Module, blocks: Sequence[str], mode: str, variant: str, inner: str) -> Any:
    """What is called in the place of ``model``, and the bench's record of its compilation."""
    if variant == CHECKPOINT:
        _checkpoint(model, blocks)
    balanced = "balanced" if variant in (NO_LOGITS, FUSED) else None
    preset = variant if variant in PRESETS else balanced
    record = Variant(
        variant,
        preset,
        budget=float(variant.partition("=")[2] or 1),
        checkpoint=variant == CHECKPOINT,
        drop_logits=variant == NO_LOGITS,
        fuse=variant == FUSED and inner == "inductor",
    )
    if mode == "compiled":
        return record.compiled(model, inner), record
    if mode == GRAPHS:
        graphs: dict[str, Any] = {"triton.cudagraphs": True} if inner == "inductor" else {}
        if not preset:
            return torch.compile(model, backend=inner, options=graphs or None), record
        options = record.options(inner) | graphs
        return torch.compile(model, backend="dropit", options=options), record
    return (record.compiled(model, "eager") if preset else model), record


def _checkpoint(model: nn.Module, blocks: Sequence[str]) -> None:
    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    for name in blocks:
        for block in model.get_submodule(name).children():
            block.forward = recomputed(block.forward)


# One row of a model -------------------------------------------------------------------------------


def model_row(
    name: str,
    mode: str,
    variant: str,
    device: torch.device,
    references: dict[tuple[str, str], Gradients],
    inner: str = "inductor",
    rehearse: bool = False,
) -> Row:
    """Measures the training step of a model.

    Args:
        name: Of :data:`MODELS`.
        mode: Of :data:`MODES`.
        variant: Of ``MODES[mode]``.
        device: Where it runs.
        references: (name, mode) -> gradients of the dense step; the dense rows put theirs in.
        inner: What compiles in the mode ``"compiled"``.
        rehearse: Take the small models and few steps.

    Returns:
        ``step_seconds`` (median, with the optimizer), ``busy_seconds`` (of them, those in which the
        GPU works), ``cold_seconds`` (the first step), ``loss``, ``cosine`` and ``error`` of the
        gradient against the dense one (``against``; of a dense row: of its second step against its
        first), ``graphs`` compiled. But for :data:`GRAPHS`, also ``saved_bytes`` (by storage, on
        the host for ``save_on_cpu``); and of the allocator, above the level before the step,
        ``held_bytes`` (after the forward), ``forward_peak_bytes``, ``peak_bytes`` (with the
        parameters' gradients).
    """
    task = _task(name, device, rehearse)
    model = task.model
    run, record = way(model, MODELS[name].blocks, mode, variant, inner)
    offload = variant == OFFLOAD

    def loss() -> Tensor:
        pinned = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
        with pinned if offload else contextlib.nullcontext():
            return task.loss(run)

    trained = [p for p in model.parameters() if p.requires_grad]
    start = time.perf_counter()
    first = loss()
    torch.autograd.backward(first)
    synchronize(device)
    row: Row = {
        "cold_seconds": time.perf_counter() - start,
        "loss": first.item(),
        "parameters_bytes": sum(p.nbytes for p in model.parameters()),
    }
    del first
    if variant == DENSE:
        references[name, mode] = _to_host(trained)
    if mode != GRAPHS:  # whose memory is set aside before, for all steps
        model.zero_grad(set_to_none=True)
        row |= _memory(loss, device)
    against = mode if (name, mode) in references else "eager"
    if (name, against) not in references:
        references[name, against] = _dense_gradients(name, device, rehearse)
    row |= compare(trained, references[name, against]) | {"against": f"{DENSE}, {against}"}

    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

    def step() -> None:
        if mode == GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss())
        optimizer.step()

    row["step_seconds"] = statistics.median(
        seconds(step, device, *((1, 1) if rehearse else (2, 9)))
    )
    return row | {"busy_seconds": busy_seconds(step, device), "graphs": record.graphs}


def _memory(loss: Callable[[], Tensor], device: torch.device) -> Row:
    """What a forward keeps, and what it and its backward take; the gradients stay."""
    row: Row = {"saved_bytes": measure.saved_bytes(loss)}
    gc.collect()
    level = allocated(device, reset=True)
    value = loss()
    held, forward_peak = allocated(device), peak_of(device)
    torch.autograd.backward(value)
    peak = peak_of(device)
    del value
    if device.type == "cpu":
        level, peak = 0, measure.peak_memory(loss)
    for key, size in (("held", held), ("forward_peak", forward_peak), ("peak", peak)):
        row[f"{key}_bytes"] = None if size is None or level is None else size - level
    return row


def _task(name: str, device: torch.device, rehearse: bool) -> Task:
    """The same weights and the same batch at every call."""
    torch.manual_seed(0)
    with device:
        return MODELS[name].task(MODELS[name].title, rehearse)


def _to_host(parameters: Sequence[Tensor]) -> Gradients:
    return [None if p.grad is None else p.grad.cpu().clone() for p in parameters]


def _dense_gradients(name: str, device: torch.device, rehearse: bool) -> Gradients:
    task = _task(name, device, rehearse)
    torch.autograd.backward(task.loss(task.model))
    return _to_host([p for p in task.model.parameters() if p.requires_grad])


def compare(parameters: Sequence[Tensor], reference: Gradients) -> Row:
    """Cosine and relative error of all gradients as one vector, summed in float64.

    One parameter at a time: no second copy of all of them is on the device.
    """

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for i, (parameter, host) in enumerate(zip(parameters, reference, strict=True)):
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield str(i), torch.zeros_like(mine) if host is None else host.to(mine.device), mine

    whole, _ = losses(pairs())
    found = {"cosine": whole.cosine, "error": whole.relative}
    return {what: None if math.isnan(value) else value for what, value in found.items()}


# One row of a kernel ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One way to pack: ``pack(x)`` gives the parts, ``unpack(parts)`` the tensor again.

    Attributes:
        shape: Of x; the first number is what a rehearsal cuts.
        pack: Called with bfloat16.
        unpack: Gives as many elements as x has.
    """

    shape: tuple[int, ...]
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    unpack: Callable[[tuple[Tensor, ...], Tensor], Tensor]


_FLAT = (512, 197 * 1536)  # the GELU of DeiT-S at batch 512: many times a cache
_MAPS = (256, 64, 112, 112)  # the first batch norm of ResNet-50, channels last


def preset_codecs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every codec with options that some preset names: label -> (codec, all its options)."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for rule in (r for preset in presets() for r in load_config({"preset": preset}).rules):
        codec = CODEC[rule.codec]
        options = rule.full_options()
        if codec.name in ("mink", "quant"):
            said = [
                f"{o.name}={options[o.name]}"
                for o in codec.options
                if options[o.name] != (None if o.name in ("gamma", "bits") else o.default)
            ]
            found[f"{codec.name}({', '.join(said)})"] = codec.name, options
    return found


def kernels() -> dict[str, Kernel]:
    """Name -> kernel: every format of the presets, and what is no format."""
    found = {
        label: _of_codec(codec, options) for label, (codec, options) in preset_codecs().items()
    }
    for bits in (1, 3):
        few = {"function": "gelu", "bits": bits}
        found[f"few_bit(bits={bits})"] = _of_codec("few_bit", few)
    ops = torch.ops.dropit
    found["relu's mask"] = Kernel(
        _FLAT,
        lambda x: (ops.pack_between(x.flatten(), 0.0, None),),
        lambda parts, x: ops.apply_mask(parts[0], x.flatten(), 0.0),
    )
    found["quant(bits=6), by channel"] = _by_channel(
        bits=6, block=256, range="uniform", rounding="nearest"
    )
    return found


def _of_codec(codec: str, options: dict[str, Any]) -> Kernel:
    return Kernel(
        _FLAT,
        lambda x: CODEC[codec].pack(x.flatten(), options),
        lambda parts, x: CODEC[codec].unpack(parts, options, x.numel(), x.dtype),
    )


def _by_channel(**options: Any) -> Kernel:
    """Of maps, as the passes pack them: each channel with a scale of its own."""
    options["by_channel"] = True

    def pack(x: Tensor) -> tuple[Tensor, ...]:
        reader = torch.empty(0, requires_grad=True)
        with torch.enable_grad():
            packed = packed_call.pack(x, (reader,), "quant", options)
        assert packed is not None
        return packed.parts

    def unpack(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        said = copies.Packed(parts, "quant", tuple(options.items()), x.dtype)
        return copies.unpack(said, x)

    return Kernel(_MAPS, pack, unpack)


def kernel_row(name: str, device: torch.device, rehearse: bool = False) -> Row:
    """Times the packing and unpacking of one bfloat16 tensor.

    Args:
        name: Of :func:`kernels`.
        device: Where it runs.
        rehearse: Take a small tensor and one round.

    Returns:
        ``numel``, ``bits`` an element; ``copy_seconds`` of a copy of the tensor; of ``pack`` and
        ``unpack``: ``_seconds`` (median), ``_host_seconds`` (until the call returns),
        ``_of_copy`` (bytes read and written once, a second, of the same figure of the copy),
        ``_transient`` (the allocator's peak beyond what comes out, bytes an element).
    """
    kernel = kernels()[name]
    shape = (1, *kernel.shape[1:]) if rehearse else kernel.shape
    x = torch.randn(shape, device=device).to(torch.bfloat16)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    other = torch.empty_like(x)
    rounds = (1, 2) if rehearse else (5, 30)
    with torch.no_grad():
        parts = kernel.pack(x)
        size = sum(p.nbytes for p in parts)
        copy = statistics.median(seconds(lambda: other.copy_(x), device, *rounds))
        row: Row = {"numel": x.numel(), "bits": 8 * size / x.numel(), "copy_seconds": copy}
        for what, run in (
            ("pack", lambda: kernel.pack(x)),
            ("unpack", lambda: kernel.unpack(parts, x)),
        ):
            reads = 2 if name.startswith("relu") and what == "unpack" else 1
            moved = size + reads * x.nbytes
            took = statistics.median(seconds(run, device, *rounds))
            row |= {
                f"{what}_seconds": took,
                f"{what}_host_seconds": _host_seconds(run, device),
                f"{what}_of_copy": (moved / took) / (2 * x.nbytes / copy),
                f"{what}_transient": _transient(run, device, x.numel()),
            }
    return row


def _transient(run: Callable[[], Any], device: torch.device, numel: int) -> float | None:
    level = allocated(device, reset=True)
    out = run()
    held, peak = allocated(device), peak_of(device)
    del out
    return None if peak is None or held is None or level is None else (peak - held) / numel


def _host_seconds(run: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    elapsed = (time.perf_counter() - start) / rounds
    synchronize(device)
    return elapsed
