"""Where a graph does otherwise than its model, told with the model's line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropit_fx.capture.faithful.one_run import Meaning


def difference(model: Meaning, graph: Meaning) -> str:
    """What the graph does otherwise than the model, with the model's line; ``""`` for nothing."""
    wrong = ""
    if len(model.outputs) != len(graph.outputs):
        wrong = f"it returns {len(model.outputs)} values, the graph {len(graph.outputs)}"
    elif model.outputs != graph.outputs:
        at = next(
            i for i, (a, b) in enumerate(zip(model.outputs, graph.outputs, strict=True)) if a != b
        )
        wrong = f"output {at} is computed otherwise"
        a, b = model.outputs[at], graph.outputs[at]
        if isinstance(a, tuple) and isinstance(b, tuple) and a[:1] == b[:1]:
            wrong = f"output {at} requires {'a' if a[1] else 'no'} gradient in the model alone"
    elif model.written != graph.written:
        wrong = f"what is written to {_some(_differing(model.written, graph.written))} differs"
    elif names := _differing(model.grads, graph.grads):
        wrong = f"the gradient of {_some(names)} differs"
        if model.functions:
            wrong += f" (custom backward: {', '.join(model.functions)})"
    elif model.checkpoints > graph.checkpoints:  # some models do so in training mode alone
        wrong = f"of {model.checkpoints} checkpointed regions the graph has {graph.checkpoints}"
    if not wrong:
        return ""
    line = next((where for number, where in model.where.items() if number not in graph.where), "")
    return f"is not faithful: {wrong}{f'; the first op that it lacks: {line}' if line else ''}"


def _differing(model: Mapping[str, Any], graph: Mapping[str, Any]) -> list[str]:
    """The names whose values differ; a graph has no parameter that nothing reads."""
    return [n for n in {**model, **graph} if model.get(n) != graph.get(n)]


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
