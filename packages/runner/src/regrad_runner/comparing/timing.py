"""The measurement of time per step at the end of a comparison."""

from __future__ import annotations

from regrad_runner.addresses import without_secrets
from regrad_runner.comparing.plan import Plan
from regrad_runner.diagnostics.step_times import (
    StepTime,
    keep_step_times,
    kept_step_times,
    measure_step_times,
)
from regrad_runner.errors import in_one_line
from regrad_runner.reporting.progress import Display
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.arms import BASELINE, Arm


def time_steps(plan: Plan, folder: ResultsFolder, display: Display) -> None:
    """Measure the time per step of every arm that ran and has none yet, and keep it.

    Call it when no run is under way: nothing else should take the machine. On several processes
    nothing is measured.

    Args:
        plan: Of the comparison.
        folder: Its runs.
        display: Told which arm is measured, and what goes wrong; nothing that does ends the
            comparison.
    """
    if plan.processes > 1:
        return
    rates = {result.arm: result.lr for result in folder.results if result.status == "finished"}
    times = kept_step_times(folder.path)
    arms = [arm for arm in plan.arms if arm.name in rates.keys() - times.keys() - {BASELINE}]
    if BASELINE not in rates:
        return
    if arms:
        display.say("measuring each arm's time per step, alternating with the baseline")
    for arm in arms:
        display.begin(f"time per step, {arm.name}", steps=None)
        found = _measured(plan, arm, rates, display)
        if found is not None:
            times[arm.name] = found
            keep_step_times(folder.path, times)


def _measured(plan: Plan, arm: Arm, rates: dict[str, float], display: Display) -> StepTime | None:
    """Return the time per step of an arm; None if it cannot be measured, which is said."""
    try:
        return measure_step_times(
            plan.config,
            plan.workload,
            (plan.arm(BASELINE), rates[BASELINE]),
            (arm, rates[arm.name]),
        )
    except (RuntimeError, ValueError) as problem:
        reason = without_secrets(in_one_line(problem))
        display.say(f"time per step of {arm.name} is unknown: {reason}")
        return None
