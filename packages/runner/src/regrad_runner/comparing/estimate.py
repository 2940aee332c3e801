"""How long a comparison will take, from a few steps of each arm before it starts."""

from __future__ import annotations

import time
from contextlib import closing
from itertools import islice
from statistics import median

from regrad_runner.comparing.plan import Plan
from regrad_runner.diagnostics.step_times import (
    SEED_OF_TIMING,
    TIMED_PAIRS,
    UNTIMED_PAIRS,
    clock_of,
    silence_meter,
)
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.arms import Arm
from regrad_runner.training.run import TrainingRun

STEPS_TRIED = 12
STEPS_NOT_COUNTED = 3  # the first are slower
LONGEST_TRIAL_SECONDS = 3.0
# Of what training on a sample takes: its forward pass, in larger batches.
SHARE_OF_EVALUATION = 0.25
SECONDS_PER_MINUTE = 60
MINUTES_PER_HOUR = 60


def estimate_in_words(plan: Plan, folder: ResultsFolder) -> str | None:
    """Return how long the remaining runs will take, or None if it cannot be measured.

    Args:
        plan: Of the comparison.
        folder: Its runs; those that ended are not run again.
    """
    ended = len(folder.trials) + sum(result.status != "failed" for result in folder.results)
    left = plan.runs - ended
    if left <= 0 or plan.processes > 1:
        return None
    try:
        seconds = _seconds_per_run(plan)
    except Exception:  # noqa: BLE001 - a plugin's own; the runs raise and tell it too
        return None
    at_once = min(plan.jobs, left)
    return (
        f"this will take about {duration_in_words(left * seconds / at_once)}, estimated from a few "
        "steps"
    )


def _seconds_per_run(plan: Plan) -> float:
    """Return what a run takes, in the mean over the arms, with its part of the time per step."""
    config = plan.config
    batch_size = int(config.batch_size or 1)
    epochs = int(config.epochs or 1)
    steps = epochs * (len(plan.workload.train) // batch_size)
    evaluated = epochs * int(config.evaluations_per_epoch or 1) * len(plan.workload.validation)
    evaluated += len(plan.workload.test)
    timed = 2 * (TIMED_PAIRS + UNTIMED_PAIRS) * (len(plan.arms) - 1)
    all_steps = steps + SHARE_OF_EVALUATION * evaluated / batch_size + timed / plan.runs
    return all_steps * _seconds_per_step(plan)


def _seconds_per_step(plan: Plan) -> float:
    """Return the mean over the arms; if steps are slow, over the first of them."""
    rate = plan.config.rates[0] if plan.config.rates else 0.0
    began = time.perf_counter()
    times: list[float] = []
    for arm in plan.arms:
        times.append(_seconds_of_arm(plan, arm, rate))
        if time.perf_counter() - began > LONGEST_TRIAL_SECONDS:
            break
    return sum(times) / len(times)


def _seconds_of_arm(plan: Plan, arm: Arm, rate: float) -> float:
    """Return the median time of a few steps of an arm, their batches included."""
    times: list[float] = []
    with closing(TrainingRun(plan.config, plan.workload, arm, seed=SEED_OF_TIMING, lr=rate)) as run:
        silence_meter(run)  # it looks at the first steps, and later at few
        clock = clock_of(run)
        before = clock()
        for _ in islice(run.steps(), STEPS_TRIED):
            now = clock()
            times.append(now - before)
            before = now
            if sum(times) > LONGEST_TRIAL_SECONDS:
                break
    return median(times[STEPS_NOT_COUNTED:] or times[-1:])


def duration_in_words(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> duration_in_words(42), duration_in_words(140), duration_in_words(9000)
        ('42 seconds', '2.3 minutes', '2.5 hours')
    """
    minutes = seconds / SECONDS_PER_MINUTE
    if minutes < 1:
        return f"{max(1, round(seconds))} seconds"
    if minutes < MINUTES_PER_HOUR:
        return f"{minutes:.1f} minutes"
    return f"{minutes / MINUTES_PER_HOUR:.1f} hours"
