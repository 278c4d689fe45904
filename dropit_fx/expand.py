"""Opens ops that hide others: multi-head attention becomes its linears, products and softmax.

So does ``einsum``: it is a ``bmm`` of operands that are permuted and reshaped.

The ops inside are those that PyTorch itself runs: its own function is traced to aten calls, with
symbolic batch and sequence sizes, and the trace takes the place of the one opaque node.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dropit_fx.private import (
    ORIGIN,
    DimDynamic,
    FakeTensorMode,
    ShapeEnv,
    StatelessSymbolicContext,
    make_fx,
    pytree,
)

log = logging.getLogger(__name__)


def opaque_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that :func:`expand` would open."""
    return [
        n for n in graph_module.graph.nodes if _attention_module(graph_module, n) or _is_call(n)
    ]


def _is_call(node: fx.Node) -> bool:
    return node.target in (F.multi_head_attention_forward, torch.einsum)


def _attention_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    # attention dropout follows the module's mode, which a trace would freeze
    return module if isinstance(module, nn.MultiheadAttention) and not module.dropout else None


def expand(graph_module: fx.GraphModule, values: dict[str, Any]) -> None:
    """Replaces each opaque node by the aten ops inside it, in place.

    Args:
        graph_module: The graph.
        values: Node name -> fake tensor, for the nodes that feed an opaque one.
    """
    for node in opaque_nodes(graph_module):
        try:
            _expand_node(graph_module, node, values)
        except Exception as error:  # it then stays whole, counted exactly and kept dense
            log.warning("%s stays opaque: %s", node.name, error)
    graph_module.recompile()


def _expand_node(graph_module: fx.GraphModule, node: fx.Node, values: dict[str, Any]) -> None:
    graph = graph_module.graph
    sources = list(dict.fromkeys(node.all_input_nodes))
    parameters: dict[str, Tensor] = {}
    module = _attention_module(graph_module, node)
    if module is not None:
        parameters = dict(module.named_parameters())
    names = list(parameters)

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(sources, tensors, strict=False))
        args, kwargs = pytree.tree_map_only(fx.Node, given.__getitem__, (node.args, node.kwargs))
        if module is None:
            assert callable(node.target)
            return node.target(*args, **kwargs)
        state = dict(zip(names, tensors[len(sources) :], strict=True))
        return torch.func.functional_call(module, state, args, kwargs)

    tensors = [values[s.name] for s in sources] + list(parameters.values())
    # before dispatch, einsum is one op still
    inner = _trace(run, tensors, pre_dispatch=node.target is not torch.einsum)
    copied: dict[fx.Node, fx.Node] = {}
    placeholders = inner.graph.find_nodes(op="placeholder")
    with graph.inserting_before(node):
        for i, placeholder in enumerate(placeholders):
            if i < len(sources):
                copied[placeholder] = sources[i]
            else:
                copied[placeholder] = graph.get_attr(f"{node.target}.{names[i - len(sources)]}")
        for other in inner.graph.nodes:
            if other.op in ("placeholder", "output"):
                continue
            if other.op == "get_attr":
                raise RuntimeError(f"a constant inside ({other.target})")
            new = graph.node_copy(other, copied.__getitem__)
            new.meta = {k: v for k, v in node.meta.items() if k in ORIGIN}
            copied[other] = new
    result = inner.graph.find_nodes(op="output")[0].args[0]
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(copied[result])
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise RuntimeError("its result is not taken apart")
        chosen = result[user.args[1]]
        if chosen is not None:
            user.replace_all_uses_with(copied[chosen])
        graph.erase_node(user)
    graph.erase_node(node)


def _trace(
    run: Callable[..., Any], tensors: list[Tensor], pre_dispatch: bool = True
) -> fx.GraphModule:
    """Aten graph of ``run``; activations have symbolic sizes, parameters their own."""
    mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=True))
    fakes = []
    for tensor in tensors:
        dynamic = DimDynamic.STATIC if isinstance(tensor, nn.Parameter) else DimDynamic.DUCK
        # uninitialised memory of the right shape: only sizes and strides are read
        blank = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=[dynamic] * tensor.dim()
        )
        fakes.append(mode.from_tensor(blank, symbolic_context=context))
    return make_fx(run, tracing_mode="symbolic", pre_dispatch=pre_dispatch)(*fakes)
