"""The result of a run."""

from __future__ import annotations

import time
from dataclasses import replace

from regrad_runner.results.outcomes import Result
from regrad_runner.results.points import steps_to_target
from regrad_runner.training.run import TrainingRun


def finished_result(run: TrainingRun, result: Result, *, started: float) -> Result:
    """Return the result of a run at its end. Reads the test samples, which nothing else does.

    Args:
        run: At its end.
        result: Of a run that has not ended: arm, seed, learning rate.
        started: When it began, by `time.perf_counter`.
    """
    measure = run.workload.measure
    return replace(
        result,
        status="finished",
        value=run.value_on(run.workload.test),
        validation=run.position.points[-1].value,
        steps=run.position.step,
        steps_to_target=steps_to_target(run.position.points, measure),
        step_seconds=run.timer.step_seconds(),
        seconds=time.perf_counter() - started,
        touched=run.touched(),
    )
