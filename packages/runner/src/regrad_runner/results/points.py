"""Evaluations of a run: how its record keeps them, and when one of them reached the target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from regrad_runner.results.run import Line, RunLog, now
from regrad_runner.statistics.steps import first_reaching
from regrad_runner.workloads.workload import Measure, name_on_validation

# Kinds of lines in `points.jsonl`.
EVALUATION = "evaluation"
METRICS = "metrics"


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        step: Optimizer steps done.
        epoch: Passes over the training samples done; None if unknown, as in a script.
        loss: Mean training loss since the last evaluation; None likewise.
        value: The measure on the validation samples.
        lr: Learning rate of the next step; None likewise.
        seconds: Time spent so far in training steps and in fetching their batches, without
            evaluations and probes; None if it was not kept. Two evaluations are equal whatever
            their times.
    """

    step: int
    epoch: float | None
    loss: float | None
    value: float
    lr: float | None
    seconds: float | None = field(default=None, compare=False)


def keep_point(record: RunLog, point: Point) -> None:
    """Add an evaluation to the points of a run."""
    record.log(EVALUATION, point.step, _numbers_of_point(point))


def lines_of(points: Iterable[Point], times: Mapping[int, int]) -> list[Line]:
    """Return the lines of evaluations that a checkpoint holds.

    Args:
        points: The evaluations.
        times: When they were made, by step, as far as it is known.
    """
    return [
        Line.of(EVALUATION, point.step, _numbers_of_point(point), time=times.get(point.step, now()))
        for point in points
    ]


def _numbers_of_point(point: Point) -> dict[str, float | None]:
    numbers = asdict(point)
    del numbers["step"]
    return numbers


def curves_of(measure: Measure) -> dict[str, str]:
    """Return what the numbers of an evaluation are called where curves are shown."""
    return {"loss": "training loss", "value": name_on_validation(measure), "lr": "lr"}


def steps_to_target(points: Sequence[Point], measure: Measure) -> int | None:
    """Return the step at which the running median of three evaluations reached the target.

    None if it never did, or if the target is not a number.
    """
    target = measure.fixed_target
    if target is None:
        return None
    curve = [(point.step, point.value) for point in points]
    return first_reaching(curve, target, higher_is_better=measure.higher_is_better)
