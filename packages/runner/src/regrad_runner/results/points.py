"""Evaluations of a run, and when one of them reached the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from regrad_runner.workloads.workload import Measure, name_on_validation


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        step: Optimizer steps done.
        epoch: Passes over the training samples done.
        loss: Mean training loss since the last evaluation.
        value: The measure on the validation samples.
        lr: Learning rate of the coming step.
        seconds: Time spent in training steps so far, fetching their batches included, evaluations and probes not;
            None where it was not kept. Two evaluations are equal whatever their times.
    """

    step: int
    epoch: float
    loss: float
    value: float
    lr: float
    seconds: float | None = field(default=None, compare=False)

    def as_metrics(self, measure: Measure) -> dict[str, float]:
        """Return the numbers by the names of curves."""
        return {"training loss": self.loss, name_on_validation(measure): self.value, "lr": self.lr}


def steps_to_target(points: Sequence[Point], measure: Measure) -> int | None:
    """Return the step at which the running median of three evaluations reached the target; None if it never did."""
    if measure.target is None:
        return None
    sign = 1 if measure.higher_is_better else -1
    for three in zip(points, points[1:], points[2:], strict=False):
        if sign * (median(point.value for point in three) - measure.target) >= 0:
            return three[-1].step
    return None
