"""PyTorch's own samples of arguments for every row, compiled: the bits of dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from op_calls import LOSSLESS, assert_same, cotangent
from op_cases import RECORDS, complaints
from op_record import OpInfo
from torch import Tensor

from dropit_fx.compile.backend import compiled_graphs

OP_INFOS = {r.op_info.name: r.op_info for r in RECORDS.values() if isinstance(r.op_info, OpInfo)}


def test_op_db_is_asked_about_every_row() -> None:
    found = complaints(["op_info"])
    assert not found, "\n".join(found)
    asked = [r for r in RECORDS.values() if not isinstance(r.op_info, str)]
    assert len(OP_INFOS) == len(asked)  # each row has one of its own
    known = {o.aten_name for o in _op_db()}
    for name in RECORDS.keys() - {r.row for r in asked}:
        assert name not in {k.lstrip("_") for k in known}, f"op_db knows '{name}' now"


def _op_db() -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db


def samples(wanted: OpInfo, limit: int) -> list[Any]:
    (info,) = [
        o for o in _op_db() if (o.name, o.variant_test_name) == (wanted.name, wanted.variant)
    ]
    found = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    step = max(1, len(found) // limit)
    op = getattr(F, wanted.name.removeprefix("nn.functional.")) if wanted.reseeds else info.op
    return [(op, s.input, s.args, s.kwargs) for s in found[::step][:limit]]


@pytest.mark.parametrize(("backend", "limit"), [("dropit_eager", 2), ("aot_eager", 1)])
@pytest.mark.parametrize("name", OP_INFOS)
def test_op_db_samples_have_the_same_bits(name: str, backend: str, limit: int) -> None:
    eager = backend == "dropit_eager"
    options = {"config": LOSSLESS} if eager else {"config": LOSSLESS, "inner": "aot_eager"}
    seen = len(compiled_graphs())
    for op, *given in samples(OP_INFOS[name], limit):
        leaves, spec = pytree.tree_flatten(given)
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]

        def call(*leaves: Any, op: Any = op, spec: Any = spec) -> Any:
            operands = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
            x, args, kwargs = pytree.tree_unflatten(operands, spec)
            return op(x, *args, **kwargs)

        torch._dynamo.reset()
        compiled = torch.compile(
            call, backend="dropit_eager" if eager else "dropit", options=options, fullgraph=True
        )
        results = []
        for function in (call, compiled):
            torch.manual_seed(5)
            out = pytree.tree_leaves(function(*leaves))[0]
            grads = torch.autograd.grad(out, wanted, cotangent(out), allow_unused=True)
            results.append([out, *grads])
        assert_same(*results)
    assert len(compiled_graphs()) > seen
