"""What runs the cells of a plan: this process, workers, processes of scripts, or jobs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from regrad_runner.comparing.cluster_cells import ClusterCells
from regrad_runner.comparing.plan import Plan, Planned
from regrad_runner.comparing.running import Comparison, Runner
from regrad_runner.comparing.script_cells import ScriptCells
from regrad_runner.comparing.script_plan import ScriptPlan
from regrad_runner.comparing.workers import Workers
from regrad_runner.reporting.progress import Display


def runner_of(
    plan: Planned[Any], display: Display, *, cells: int
) -> AbstractContextManager[Runner]:
    """Return what runs the cells, as many at once as planned.

    Args:
        plan: Of the comparison; its folder is there.
        display: Shows what is under way.
        cells: How many there are to run, as far as is known.
    """
    if plan.cluster is not None:
        return ClusterCells(plan, plan.cluster, display)
    if isinstance(plan, ScriptPlan):
        return ScriptCells(plan, display)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be of a workload or a script, got {type(plan).__name__}")
    if plan.jobs == 1:
        return nullcontext(Comparison(plan, display))
    return Workers(plan, display, cells=cells)
