"""What was found: a line for each thing that was checked, as a table, and the verdict."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from rich.table import Table

from dropit_fx.report.rows import as_text, plain_table

_WORDS = {True: "ok", False: "FAILED", None: ""}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: What it is: ``"output"``, ``"buffers"``, ...
        passed: Whether it is as it must be; None where it is shown and decides nothing.
        text: What was found, for people.
    """

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True, kw_only=True)
class GradientError:
    """What a gradient loses.

    Attributes:
        name: Of the parameter (``"input 0"`` for an input that requires a gradient).
        relative: Norm of the difference over the norm of the dense gradient.
        cosine: Between the two, 1 where they point the same way.
    """

    name: str
    relative: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """What ``check`` found; true where nothing failed.

    Attributes:
        findings: A line for each thing that was checked, in order.
        dense_bytes: Measured: what the dense model saves for the backward, in bytes.
        predicted_bytes: What the report says that the rewritten one saves, in bytes.
        measured_bytes: What it was seen to save, in bytes.
        relative_error: Of the gradient of all parameters: norm of the difference over the dense
            norm; NaN where it was not found.
        cosine: Between both gradients of all parameters; NaN where it was not found.
        worst: The parameters whose gradients lose most, worst first.
        first_loss: The loss of the first step, of the rewritten model; NaN where there was none.
    """

    findings: tuple[Finding, ...]
    dense_bytes: int = 0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    relative_error: float = math.nan
    cosine: float = math.nan
    worst: tuple[GradientError, ...] = ()
    first_loss: float = math.nan

    def __bool__(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the findings that failed."""
        return tuple(f.name for f in self.findings if f.passed is False)

    @property
    def verdict(self) -> str:
        """One line: passed, or what failed."""
        if not self.failed:
            return "passed: nothing but what the formats lose is lost"
        return f"FAILED: {', '.join(self.failed)}"

    def table(self) -> Table:
        """The findings as a rich table."""
        table = plain_table("checked", "", "found")
        for f in self.findings:
            style = "red" if f.passed is False else ""
            table.add_row(f.name, _WORDS[f.passed], f.text, style=style)
        return table

    def __str__(self) -> str:
        """The table as plain text, and the verdict."""
        return f"{as_text(self.table())}{self.verdict}\n"

    def _repr_html_(self) -> str:
        """For notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(f.name)}</td><td>{_WORDS[f.passed]}</td>"
            f"<td>{html.escape(f.text)}</td></tr>"
            for f in self.findings
        )
        return f"<table>{rows}</table><p><b>{html.escape(self.verdict)}</b></p>"
