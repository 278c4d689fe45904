"""What the plug-in has compiled in this process: a record of each graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from dropit_fx.compile.saved import Partition
from dropit_fx.planner import PlannedConfig
from dropit_fx.report.rows import Report


@dataclass
class CompiledGraph:
    """One graph that the plug-in compiled.

    Attributes:
        report: What the passes decided, with bytes as eager mode saves them.
        partitions: What the compiled forward really saves, one for each time that it was
            partitioned; empty where a compile cache had the result already.
        planned: What was planned for the peak that was asked for, if one was.
    """

    report: Report
    partitions: list[Partition] = field(default_factory=list)
    planned: PlannedConfig | None = None

    @property
    def saved_bytes(self) -> int:
        """What it saves: as it was partitioned, where it was, else as eager mode saves it."""
        return self.partitions[-1].saved_bytes if self.partitions else self.report.kept_bytes


_compiled: list[CompiledGraph] = []


def compiled_graphs() -> tuple[CompiledGraph, ...]:
    """Every graph that the plug-in has rewritten in this process, in order."""
    return tuple(_compiled)


def remember(graph: CompiledGraph) -> int:
    """Adds one more to :func:`compiled_graphs`; returns how many there are now."""
    _compiled.append(graph)
    return len(_compiled)


def forget_compiled_graphs(since: int) -> None:
    """Leaves only the first ``since`` of :func:`compiled_graphs`."""
    del _compiled[since:]
