"""Models on a GPU that is not there: fake parameters, fake inputs, and the attention that it takes.

Fake tensors tell what autograd keeps. Which attention kernel runs is decided by the properties of
the card, so the tests say which; each is called as PyTorch's composite calls it
(``sdp_utils_cpp.cpp``, ``transformers/attention.cpp``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from models import Case
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from dropit_fx.api import rewrite
from dropit_fx.capture.trace import capture
from dropit_fx.config import make_config
from dropit_fx.passes.plan import Plan

aten = torch.ops.aten
KERNELS = ("flash", "efficient", "cudnn", "math")


@dataclass
class Faked:
    """A captured model and its inputs, all of fake tensors in one mode."""

    graph: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    autocast: bool

    def copy(self) -> fx.GraphModule:
        """Another graph of the same parameters."""
        return fx.GraphModule(self.graph, copy.deepcopy(self.graph.graph))

    def plan(self, kernel: str) -> Plan:
        """What the passes make of a copy of it in preset `balanced`, with this attention kernel."""
        graph = self.copy()
        with autocast_on(self.device, self.autocast), Attention(kernel):
            return rewrite(graph, make_config(preset="balanced"), self.args, self.kwargs)


def captured(
    case: Case, device: str, dtype: torch.dtype, autocast: bool, layout: torch.memory_format
) -> Faked:
    """A case captured as ``transform`` does it, with everything fake."""
    model, args, kwargs = faked(case, device, dtype, layout)
    with autocast_on(device, autocast):
        graph = capture(model, args, kwargs)
    return Faked(graph, args, kwargs, device, autocast)


def faked(
    case: Case,
    device: str,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model and its inputs with everything fake: floats in ``dtype``, images in ``layout``."""
    model, (args, kwargs) = case.build(), case.inputs()
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        as_ = dtype if tensor.is_floating_point() else tensor.dtype
        strides = tensor.stride()
        if tensor.dim() == 4:
            strides = tensor.contiguous(memory_format=layout).stride()
        with mode:
            return torch.empty_strided(tensor.shape, strides, dtype=as_, device=device)

    known: dict[int, Tensor] = {}
    for part in model.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    new = fake(tensor)
                    known[id(tensor)] = (
                        nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
                    )
                tensors[name] = known[id(tensor)]  # type: ignore[assignment]
    args, kwargs = pytree.tree_map_only(Tensor, fake, (args, kwargs))
    return model, args, kwargs


@contextmanager
def autocast_on(device: str, on: bool = True) -> Iterator[None]:
    """``torch.autocast`` in bfloat16; its own context refuses a CUDA that is not there."""
    was, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, on)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, was)
        torch.set_autocast_dtype(device, dtype)


class Attention(TorchFunctionMode):
    """Sends the attention of CUDA tensors to one kernel, where that kernel takes it."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel
        self.ran: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        ours = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
        if func in ours and args[0].device.type == "cuda":
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q, k, v = query, key, value
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
        kernel, mask = self._takes(q, attn_mask), attn_mask
        self.ran.append(kernel)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        if kernel == "math":
            how: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            return aten._scaled_dot_product_attention_math(
                q, k, v, mask, dropout_p, is_causal, **how
            )[0]
        if kernel == "flash":
            short = -q.shape[-1] % 8
            if short:
                q, k, v = (F.pad(t, (0, short)) for t in (q, k, v))
            out = aten._scaled_dot_product_flash_attention(
                q, k, v, dropout_p, is_causal, False, scale=scale
            )[0]
            return out[..., : out.shape[-1] - short]
        if mask is not None:
            mask = mask.expand(*q.shape[:-1], k.shape[-2])
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(
                q, k, v, mask, trains, dropout_p, is_causal, False, scale=scale
            )[0]
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, trains, dropout_p, is_causal, scale=scale
        )[0]

    def _takes(self, q: Tensor, mask: Tensor | None) -> str:
        """Flash takes no mask, and neither flash nor cuDNN float32: the next in line does."""
        halves = q.dtype != torch.float32
        if self.kernel in ("flash", "cudnn") and not (
            halves and (mask is None or self.kernel == "cudnn")
        ):
            return "efficient"
        return self.kernel
