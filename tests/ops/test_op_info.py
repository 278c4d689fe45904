"""PyTorch's own samples of arguments for every row, compiled: the bits of dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from op_cases import (
    LOSSLESS,
    assert_same,
    cotangent,
)
from torch import Tensor

from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.ops.table import OP_RULES

OP_DB = {
    "nn.functional.linear": "linear",
    "nn.functional.conv1d": "conv1d",
    "nn.functional.conv2d": "conv2d",
    "nn.functional.conv3d": "conv3d",
    "nn.functional.conv_transpose1d": "conv_transpose1d",
    "nn.functional.conv_transpose2d": "conv_transpose2d",
    "nn.functional.conv_transpose3d": "conv_transpose3d",
    "matmul": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "baddbmm": "baddbmm",
    "nn.functional.relu": "relu",
    "nn.functional.relu6": "relu6",
    "nn.functional.leaky_relu": "leaky_relu",
    "nn.functional.hardtanh": "hardtanh",
    "nn.functional.dropout": "dropout",
    "nn.functional.max_pool1d": "max_pool1d",
    "nn.functional.max_pool2d": "max_pool2d",
    "nn.functional.max_pool3d": "max_pool3d",
    **{
        f"nn.functional.{name}": name
        for name in (
            *("gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "hardswish"),
            *("hardsigmoid", "logsigmoid", "softsign", "layer_norm", "group_norm", "rms_norm"),
            *("batch_norm", "scaled_dot_product_attention", "cross_entropy", "nll_loss"),
            *("embedding", "pad"),
            *(f"avg_pool{d}d" for d in (1, 2, 3)),
            *(f"adaptive_avg_pool{d}d" for d in (1, 2, 3)),
        )
    },
    **{n: n for n in ("sigmoid", "tanh", "mul", "div", "pow", "softmax", "log_softmax")},
    **{n: n for n in ("exp", "sin", "cos", "clamp", "where", "masked_fill")},
    **{n: n for n in ("index_select", "gather")},
}


def test_op_db_is_asked_about_every_row() -> None:
    assert set(OP_DB.values()) == {r.name for r in OP_RULES}


def samples(name: str, limit: int) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    variant = {"div": "no_rounding_mode", "nn.functional.pad": "reflect"}.get(name, "")
    (info,) = [o for o in op_db if o.name == name and o.variant_test_name == variant]
    found = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    step = max(1, len(found) // limit)
    # op_db reseeds where an op draws random numbers, in a way that Dynamo cannot follow
    plain = ("dropout", "scaled_dot_product_attention")
    short = name.removeprefix("nn.functional.")
    op = getattr(F, short) if short in plain else info.op
    return [(op, s.input, s.args, s.kwargs) for s in found[::step][:limit]]


@pytest.mark.parametrize(("backend", "limit"), [("dropit_eager", 2), ("aot_eager", 1)])
@pytest.mark.parametrize("name", OP_DB)
def test_op_db_samples_have_the_same_bits(name: str, backend: str, limit: int) -> None:
    eager = backend == "dropit_eager"
    options = {"config": LOSSLESS} if eager else {"config": LOSSLESS, "inner": "aot_eager"}
    seen = len(compiled_graphs())
    for op, *given in samples(name, limit):
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
