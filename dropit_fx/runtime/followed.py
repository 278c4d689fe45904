"""What a region computes that is the same when it is made again from rounded inputs.

Told op by op: values are the same that are made, by ops that are seen, of such values alone. What
comes about unseen may differ: in compiled code, in kernels launched by hand, from numbers of NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropit_fx.holders import tensors_in, written_by
from dropit_fx.private import OpOverload, TorchDispatchMode, schema, storage_id
from dropit_fx.private_hooks import weak_storage
from dropit_fx.runtime.saved_hooks import is_plain

_LOOKUPS = "aten::index", "aten::_unsafe_index"  # whose masks alone decide the size of the result
# What takes of its operand no more than shape and dtype
_LIKE = tuple(
    f"aten::{n}"
    for n in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
)
_MASKS = torch.bool, torch.uint8
# What reads memory without an op
_READS = Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr
_SHOWN = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape


class Followed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which a region runs.

    Args:
        given: What the region finds, beside parameters.
        rounded: What of it may be rounded, with all that shares its memory.
    """

    supports_higher_order_operators = True

    def __init__(self, given: Iterable[Tensor], rounded: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[Any, bool]] = {}  # held, so that no other has the key
        self._strayed = False
        for x in given:
            self._note(x, same=True)
        for x in rounded:
            self._note(x, same=False)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled: another kernel would round otherwise."""
        return True

    def same(self, x: Tensor) -> bool:
        """Whether a tensor holds the same values when the region is made again."""
        if not is_plain(x):
            return False
        _, same = self._storages.get(storage_id(x), (None, isinstance(x, nn.Parameter)))
        return same

    def stray(self) -> None:
        """Python has seen a value that may differ: so may whatever it does from now on."""
        self._strayed = True

    def _note(self, x: Tensor, same: bool) -> None:
        if is_plain(x):
            self._storages[storage_id(x)] = weak_storage(x), same

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read, seen = tensors_in((args, kwargs)), isinstance(func, OpOverload)
        same = seen and not self._strayed
        same = same and (_is_made_of_python(func, args) or all(map(self.same, read)))
        if seen and not same and self._shows(func, args):
            self.stray()
        result = func(*args, **kwargs)
        if not same:
            for x in written_by(func, args, kwargs) if seen else read:
                self._note(x, same=False)
        made = same and "empty" not in schema(func).name  # something unseen may fill it
        for x in tensors_in(result):
            self._note(x, made)
        return result

    def _shows(self, op: OpOverload, args: Any) -> bool:
        """Whether Python learns of the values of what may differ: a number, or a size by them."""
        if schema(op).name in _LOOKUPS:
            masks = (x for x in args[1] if x is not None and x.dtype in _MASKS)
            return not all(map(self.same, masks))
        # of ops of others nothing says whether the size of a result is one by values
        return op.namespace != "aten" or any(tag in op.tags for tag in _SHOWN)


def _is_made_of_python(op: OpOverload, args: Any) -> bool:
    """Whether Python alone says what values there are: numbers, which an op would have shown."""
    number = schema(op).name == "aten::lift_fresh" and not args[0].dim()
    return number or schema(op).name in _LIKE


class Shown(TorchFunctionMode):
    """Notices values that Python reads without an op. Dynamo would trace this mode."""

    def __init__(self, followed: Followed) -> None:
        super().__init__()
        self._followed = followed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS and not self._followed.same(args[0]):
            self._followed.stray()
        return func(*args, **(kwargs or {}))
