"""What a plan is: a config of explicit rules, with what was told of each, that reads as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from dropit_fx.config import PRESET_KEYS
from dropit_fx.rules import Config, Rule


@dataclass(frozen=True, kw_only=True)
class PlannedConfig(Config):
    """A config that keeps a step under a peak.

    Attributes:
        asked: The peak that was asked for, in bytes.
        dense: The peak of the dense step.
        predicted: The peak of the step under this config, told of the rewritten graph.
        error: Of the gradient of all parameters, relative to its norm, as it was told.
        seconds: By which an eager step is longer than the dense one, as it was told.
        gap: By how much of the squared error the least possible one may be smaller.
        notes: What is to be said of each rule, in their order.
        about: What the plan was made of: model, inputs, versions.
    """

    asked: int = field(default=0, compare=False)
    dense: int = field(default=0, compare=False)
    predicted: int = field(default=0, compare=False)
    error: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    gap: float = field(default=0.0, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    about: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def to_yaml(self) -> str:
        """The config as a file, with comments: what it was planned for, and what rules cost."""
        lines = [f"# {name}: {text}".replace("\n", " ") for name, text in self.about.items()]
        settings = {"preset": self.preset} | {k: getattr(self, k) for k in PRESET_KEYS}
        lines += [f"{k}: {_scalar(v)}" for k, v in settings.items()]
        lines += ["rules:" if self.rules else "rules: []"]
        for i, rule in enumerate(self.rules):
            lines += [f"  # {self.notes[i]}"] if i < len(self.notes) else []
            lines.append(f"  - {_inline(rule)}")
        return "\n".join(lines) + "\n"

    def save(self, path: str | PathLike[str]) -> None:
        """Writes :meth:`to_yaml` to a file that ``transform`` and ``load_config`` read."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


def _inline(rule: Rule) -> str:
    said: dict[str, Any] = {}
    for name, globs in (("module", rule.module), ("op", rule.op)):
        said |= {} if globs == ("*",) else {name: globs[0] if len(globs) == 1 else list(globs)}
    said |= {"codec": rule.codec, **dict(rule.options)}
    said |= {"derive": True} if rule.derive else {}
    return _scalar(said)


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
