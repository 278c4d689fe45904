"""Train neural networks in less memory, by rewriting their graph."""

from dropit_fx import backend, graph_module, logs, measure, packed_call, partition
from dropit_fx.api import transform
from dropit_fx.capture.trace import CaptureError
from dropit_fx.check import Check, check
from dropit_fx.config import Config, ConfigError, load_config
from dropit_fx.pointwise import pointwise
from dropit_fx.report.rows import Report, report

logs.read_environment()

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "Check",
    "Config",
    "ConfigError",
    "Report",
    "backend",
    "check",
    "graph_module",
    "load_config",
    "measure",
    "packed_call",
    "partition",
    "pointwise",
    "report",
    "transform",
]
