"""What came out of a run: a result, a trial of a learning rate, their rows in tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from regrad_runner.results.points import Point
from regrad_runner.statistics.rows import RunRow


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of a comparison, as `results.csv` shows it.

    Attributes:
        arm: Name of the arm.
        seed: Its seed.
        status: "finished"; "diverged" if its numbers were not finite, which is an outcome too; or
            "failed" for any other reason.
        value: The primary measure on the test split; None if it did not end.
        validation: The measure on the validation split at the end.
        steps: Optimizer steps.
        steps_to_target: Those after which the target was reached; None if it never was, or if the
            target is not a number but the baseline's, which only all runs together say.
        step_seconds: Median time of a training step.
        seconds: Time of the whole run, evaluations included.
        touched: Whether a correction changed any tensor.
        lr: Learning rate.
        must_beat: Name of the control arm; None if there is none.
        control: Whether the arm is a control and no correction of its own; None in folders that do
            not say.
    """

    arm: str
    seed: int
    status: Literal["finished", "diverged", "failed"] = "finished"
    value: float | None = None
    validation: float | None = None
    steps: int = 0
    steps_to_target: int | None = None
    step_seconds: float = 0.0
    seconds: float = 0.0
    touched: bool = False
    lr: float = 0.0
    must_beat: str | None = None
    control: bool | None = None

    def as_run_row(self) -> RunRow:
        """Return what the statistics need."""
        return RunRow(
            arm=self.arm,
            seed=self.seed,
            value=float("nan") if self.value is None else self.value,
            steps_to_target=self.steps_to_target,
            steps=self.steps,
            step_seconds=self.step_seconds,
            touched=self.touched,
            status=self.status,
        )


@dataclass(frozen=True, kw_only=True)
class CurvePoint(Point):
    """One evaluation of one run, as `curves.csv` shows it."""

    arm: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the choice of a learning rate, as `tuning.csv` shows it.

    Attributes:
        arm: Name of the arm.
        lr: Learning rate tried.
        seed: A seed that is not compared on.
        validation: The measure on the validation split at the end; not a number where the run
            failed.
    """

    arm: str
    lr: float
    seed: int
    validation: float


def numbers_of(result: Result) -> dict[str, Any]:
    """Return what a run's record keeps of its result: what the record does not say elsewhere."""
    elsewhere = ("arm", "seed", "lr", "status")
    return {name: value for name, value in asdict(result).items() if name not in elsewhere}
