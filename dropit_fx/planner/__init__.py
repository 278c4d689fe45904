"""How a step is brought under a peak: bytes in, a config out that keeps its word.

``timeline`` tells the memory of a step without running it, ``workspaces`` measures what ops take
for themselves; ``moves`` says what may become of each saved tensor, ``sensitivity`` what that puts
into the gradient, ``costs`` how many seconds it takes at which ``speeds``; ``goal`` is which of
these is to be least, ``choice`` solves the knapsack, and ``search`` tells the peak again of the
graph that it makes; ``fits`` says which batch a device has memory for, ``waiting`` what is on the
host meanwhile. May be imported from here: ``plan``, ``plan_step``, ``Step``, ``GraphStep``,
``PlanError``, ``PlannedConfig``, ``forecast`` and ``Forecast``, ``timeline`` (``Timeline``, and its
own ``forecast``), ``asked`` for whole frontiers, ``cards``, ``speeds`` and ``size`` for devices,
seconds and bytes as people read them.
"""

from dropit_fx.planner.asked import plan, plan_step
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.fits import Forecast, forecast
from dropit_fx.planner.planned import PlannedConfig
from dropit_fx.planner.step import GraphStep, Step

__all__ = [
    "Forecast",
    "GraphStep",
    "PlanError",
    "PlannedConfig",
    "Step",
    "forecast",
    "plan",
    "plan_step",
]
