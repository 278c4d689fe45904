"""Where a node comes from: the user's line and the user's module."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import fx

from dropit_fx.private import MODULES, TRACE

OURS = str(Path(__file__).parent.parent)  # where no line of the user stands


def node_where(node: fx.Node) -> str:
    """``file:line`` of the user's code that made the node, ``""`` where the tracer did not say."""
    trace = node.meta.get(TRACE) or node.stack_trace or ""
    best = ""
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith("File "):
            name, _, rest = line.removeprefix("File ").partition(", line ")
            name, number = name.strip('"'), rest.split(",")[0]
            if "/torch/" not in name and not name.startswith(OURS):
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


def first_line(error: BaseException) -> str:
    """``Type: message``, of the message its first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def error_line(error: BaseException) -> str:
    """``file:line: code`` of the innermost frame that is the user's: not of torch, not ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (torch.__path__[0], OURS)
    theirs = [f for f in frames if not f.filename.startswith(ours) and "<" not in f.filename]
    for line in str(error).splitlines():  # torch.export tells the user's line in its message
        line = line.strip()
        if line.startswith("File ") and not any(o in line for o in ours):
            name, _, rest = line.removeprefix("File ").partition(", line ")
            return f"{name.strip(chr(34))}:{rest.split(',')[0].split()[0]}"
    if not theirs:
        return "no line of the model"
    frame = theirs[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"
