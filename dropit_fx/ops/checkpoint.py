"""Checkpointed regions: what is recomputed keeps its inputs. ``packed_checkpoint`` runs the row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dropit_fx.ops.rule import OpRule, Read, Use
from dropit_fx.private import CHECKPOINT_CONTEXT, tag_activation_checkpoint


def _checkpoint(body: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return tag_activation_checkpoint(body, *inputs, **options)


def _selective(args: Mapping[str, Any]) -> str:
    if CHECKPOINT_CONTEXT in args["body"].meta:
        return "a selective checkpoint looks values up by the ops of its forward"
    return ""


CHECKPOINT = OpRule(
    name="checkpoint",
    targets=(tag_activation_checkpoint,),
    reads=(Read(operand="inputs", use=Use.REDUCE, needed_by=("inputs",)),),
    run=_checkpoint,
    obstacle=_selective,
)
