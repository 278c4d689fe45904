"""Where a node comes from: the user's line and the user's module."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from dropit_fx.private import MODULES, TRACE

_OURS = str(Path(__file__).parent)


def node_where(node: fx.Node) -> str:
    """``file:line`` of the user's code that made the node, ``""`` where the tracer did not say."""
    trace = node.meta.get(TRACE) or node.stack_trace or ""
    best = ""
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith("File "):
            name, _, rest = line.removeprefix("File ").partition(", line ")
            name, number = name.strip('"'), rest.split(",")[0]
            if "/torch/" not in name and not name.startswith(_OURS):
                best = f"{name}:{number}"
    return best


def node_module(node: fx.Node) -> str:
    """Qualified name of the module that the node belongs to, ``""`` for the root.

    The tracers write it differently: ``blocks.0.attn``, ``L['self'].blocks.0.attn``,
    ``L['self']._modules['blocks']._modules['0']``.
    """
    stack = node.meta.get(MODULES)
    if not stack:
        return str(node.target) if node.op == "call_module" else ""
    name = str(list(stack.values())[-1][0])
    if name.startswith(("L[", "G[")):
        name = name.split("]", 1)[1]
    name = name.replace("._modules['", ".").replace("']", "").replace("['", ".")
    return name.removeprefix("L__self__").strip(".").split("@")[0]
