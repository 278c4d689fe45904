"""The CPU as a device that offloads, by a link that a test has made."""

from __future__ import annotations

from typing import Any

import pytest

from dropit_fx.runtime import offload


def connect(monkeypatch: pytest.MonkeyPatch, link: Any) -> None:
    """For the time of a test; every packed copy is large enough."""
    monkeypatch.setattr(offload, "LINKS", {"cpu": lambda device: link})
    monkeypatch.setattr(offload, "_lanes", {})
    monkeypatch.setattr(offload, "SMALLEST", 1)
