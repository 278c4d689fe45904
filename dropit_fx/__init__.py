"""Train neural networks in less memory, by rewriting their graph."""

import importlib
from typing import Any

from dropit_fx import logs, measure, schedule
from dropit_fx.api import transform
from dropit_fx.auto_plan import AutoPlan
from dropit_fx.capture.trace import CaptureError
from dropit_fx.check import Check, check
from dropit_fx.config import Config, ConfigError, load_config
from dropit_fx.eager import pack_checkpoints, pack_saved
from dropit_fx.planner import Forecast, PlanError, forecast, plan
from dropit_fx.pointwise import pointwise
from dropit_fx.report.rows import Report, report
from dropit_fx.report.suggest import suggest
from dropit_fx.rules import Rule
from dropit_fx.selective import checkpoint_contexts

logs.read_environment()

__version__ = "0.1.0"
__all__ = [
    "AutoPlan",
    "CaptureError",
    "Check",
    "Config",
    "ConfigError",
    "Forecast",
    "PlanError",
    "Report",
    "Rule",
    "check",
    "checkpoint_contexts",
    "forecast",
    "load_config",
    "measure",
    "pack_checkpoints",
    "pack_saved",
    "plan",
    "pointwise",
    "report",
    "schedule",
    "suggest",
    "transform",
]


def __getattr__(name: str) -> Any:
    """The modules' names of before, when they are asked for: the compiler takes time to load."""
    if name in {"backend", "graph_module", "packed_call", "partition"}:
        return importlib.import_module(f"dropit_fx.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
