"""Where a call runs as PyTorch does: someone else has a say in what its ops do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dropit_fx.private import constant_to_dynamo, forward_mode_level, peek_interpreter_stack


@constant_to_dynamo
def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, or forward-mode differentiation.

    They differentiate, or batch, what is computed op by op: packed tensors are constants to them.
    """
    return peek_interpreter_stack() is not None or forward_mode_level() >= 0


def has_own_ops(values: Sequence[Any]) -> bool:
    """Whether a subclass of tensors has a say of its own in what ops do (no mode, no proxy).

    A parameter may be of such a class (quantised weights are), or of one that says nothing new.
    """
    return any(
        isinstance(v, Tensor)
        and type(v) not in (Tensor, nn.Parameter)
        and hasattr(type(v).__torch_function__, "__func__")
        and not (isinstance(v, nn.Parameter) and override_of(type(v)) is None)
        for v in values
    )


def override_of(kind: type[Tensor]) -> Callable[..., Any] | None:
    """The ``__torch_function__`` of a class of tensors, where that is none of PyTorch's own."""
    own = getattr(kind.__torch_function__, "__func__", None)
    return None if own is Tensor.__torch_function__.__func__ else own  # type: ignore[attr-defined]


def stays_dense(values: Sequence[Any]) -> bool:
    """Whether one of ``values`` has no memory to pack, or is complex: formulas are for real ones.

    Nor has an activation that is made of other tensors (DTensor) memory of its own. Asked in every
    call: a loop takes half the time of ``any``.
    """
    for v in values:
        if isinstance(v, Tensor) and (v.device.type == "meta" or v.is_complex()):
            return True
        if hasattr(type(v), "__tensor_flatten__") and not isinstance(v, nn.Parameter):
            return True
    return False


def is_complex(values: Sequence[Any]) -> bool:
    """Whether there is a complex tensor among ``values``."""
    return any(isinstance(v, Tensor) and v.is_complex() for v in values)
