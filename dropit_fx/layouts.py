"""Convolutions laid out as inductor lays them out, before anything is packed.

On CPUs inductor computes convolutions channels-last, whatever the model says. Tensors are packed in
memory order, so a graph traced channels-first would have every one of them transposed on its way
into the packed form and back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dropit_fx.op_table import RULES
from dropit_fx.private import EXAMPLE_VALUE

_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
_CONVOLUTIONS: dict[Any, torch.memory_format] = {
    target: layout
    for dims, layout in _FORMATS.items()
    for name in (f"conv{dims}d", f"conv_transpose{dims}d")
    for target in RULES[name].targets
}


def channels_last(graph_module: fx.GraphModule) -> None:
    """Asks for channels-last results of convolutions, in place; they are views where they are so.

    The graph's own results keep the layout that they had.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (available and bool(torch.backends.mkldnn.enabled)):
        return
    graph = graph_module.graph
    for node in list(graph.nodes):
        layout = _CONVOLUTIONS.get(node.target) if node.op == "call_function" else None
        value = node.meta.get(EXAMPLE_VALUE)
        if layout is None or value is None or value.device.type != "cpu":
            continue
        if value.dim() != (4 if layout is torch.channels_last else 5):
            continue
        with graph.inserting_after(node):
            after = graph.call_method("contiguous", (node,), {"memory_format": layout})
        after.meta = {k: v for k, v in node.meta.items() if k != EXAMPLE_VALUE}
        node.replace_all_uses_with(after, delete_user_cb=lambda user, a=after: user is not a)
    graph.lint()
    graph_module.recompile()
