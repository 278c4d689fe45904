"""Where a node comes from: the user's line and the user's module."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch import fx

from dropit_fx.private import MODULES, TRACE

OURS = str(Path(__file__).parent.parent)  # where no line of the user stands


def node_where(node: fx.Node) -> str:
    """``file:line`` of the user's code that made the node, ``""`` where the tracer did not say."""
    *_, last = ["", *_users_lines(node.meta.get(TRACE) or node.stack_trace or "")]
    return last


def is_users(file: str) -> bool:
    """Whether code is the user's: neither PyTorch's nor ours."""
    return "/torch/" not in file and not file.startswith(OURS)


def line_at_work() -> tuple[str, str]:
    """``file:line`` of the user's code that runs now, and the innermost function that is not ours.

    Both are ``""`` where there is none.
    """
    frame: FrameType | None = sys._getframe(1)
    function = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(OURS):
            function = function or frame.f_code.co_name
            if is_users(file):
                return f"{file}:{frame.f_lineno}", function
        frame = frame.f_back
    return "", function


def _users_lines(traceback: str) -> Iterator[str]:
    """``file:line`` of each line of a printed traceback that is the user's."""
    for file, number in re.findall(r'^\s*File "?(.*?)"?, line (\d+)', traceback, re.MULTILINE):
        if is_users(file):
            yield f"{file}:{number}"


def node_module(node: fx.Node) -> str:
    """Qualified name of the module that the node belongs to, ``""`` for the root.

    The tracers write it differently: ``blocks.0.attn``, ``L['self'].blocks.0.attn``,
    ``L['self']._modules['blocks']._modules['0']``.
    """
    stack = node.meta.get(MODULES)
    if not stack:
        return str(node.target) if node.op == "call_module" else ""
    return _cleaned(str(list(stack.values())[-1][0]))


def node_modules(node: fx.Node) -> list[tuple[str, str]]:
    """The calls that the node is in, outermost first: what tells a call from others, and its name.

    Names are as of :func:`node_module`. A module that is called twice has one name.
    """
    stack = node.meta.get(MODULES) or {}
    return [(f"{key} {name}", _cleaned(str(name))) for key, (name, *_) in stack.items()]


def _cleaned(name: str) -> str:
    if name.startswith(("L[", "G[")):
        name = name.split("]", 1)[1]
    name = name.replace("._modules['", ".").replace("']", "").replace("['", ".")
    return name.removeprefix("L__self__").strip(".").split("@")[0]


_TRANSFORMS = {
    "_increment_nesting": "torch.func transforms a part of it",
    "_dual_level": "a part of it is differentiated forwards (torch.autograd.forward_ad)",
    "_make_dual": "a part of it is differentiated forwards (torch.autograd.forward_ad)",
}


def transformed_in(graph_module: fx.GraphModule) -> str:
    """What transforms a part of a graph, and the line; ``""`` where nothing does.

    What is computed with there has no memory of its own, and an error between two nodes would leave
    the transform at work.
    """
    graphs = [m.graph for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
    for n in (n for graph in graphs for n in graph.nodes):
        for name, said in _TRANSFORMS.items():
            if n.op == "call_function" and name in str(n.target):
                where = node_where(n)
                return said + (f", in {where}" if where else "")
    return ""


def first_line(error: BaseException) -> str:
    """``Type: message``, of the message its first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def error_line(error: BaseException) -> str:
    """``file:line: code`` of the innermost frame that is the user's: not of torch, not ours."""
    for line in _users_lines(str(error)):  # torch.export tells the user's line in its message
        return line
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if is_users(f.filename) and "<" not in f.filename]
    if not theirs:
        return "no line of the model"
    frame = theirs[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"
