"""What came out of one cell of a comparison: a result, a trial, their points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from regrad_runner.files import check_own_folder, make_folder, read_bytes, write_whole
from regrad_runner.results.cells import Cell
from regrad_runner.results.locks import CELLS
from regrad_runner.results.points import Point
from regrad_runner.results.tables import checked
from regrad_runner.statistics.rows import RunRow


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of a comparison, as `results.csv` keeps it.

    Attributes:
        arm: Name of the arm.
        seed: Its seed.
        status: Whether it ended, or diverged: its numbers were not finite, which is an outcome; or failed otherwise.
        value: The primary measure on the test split; None where it did not end.
        validation: The measure on the validation split at the end.
        steps: Optimizer steps.
        steps_to_target: Those after which the target was reached; None if it never was.
        step_seconds: Median time of a training step.
        seconds: Time of the whole run, evaluations included.
        touched: Whether a correction changed any tensor.
        lr: Learning rate.
        must_beat: Name of the control arm; None where there is none.
        control: Whether the arm is a control and no correction of its own; None in folders that do not say.
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
            step_seconds=self.step_seconds,
            touched=self.touched,
            status=self.status,
        )


@dataclass(frozen=True, kw_only=True)
class CurvePoint(Point):
    """One evaluation of one run, as `curves.csv` keeps it."""

    arm: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the choice of a learning rate, as `tuning.csv` keeps it.

    Attributes:
        arm: Name of the arm.
        lr: Learning rate tried.
        seed: A seed that is not compared on.
        validation: The measure on the validation split at the end.
    """

    arm: str
    lr: float
    seed: int
    validation: float


@dataclass(frozen=True)
class Outcome:
    """What came out of one cell.

    Attributes:
        result: Of a run.
        trial: Of a run of the choice of a learning rate.
        points: Evaluations of a run that ended.
        tables: Its rows in other tables, as plain values, by the table's file.
    """

    result: Result | None = None
    trial: Trial | None = None
    points: Sequence[Point] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tables:
    """Rows of a cell by the file of their table, as they are read back."""

    rows: dict[str, list[dict[str, Any]]]


def cell_file(folder: Path, cell: Cell) -> Path:
    """Return where a cell's process leaves what came out of it."""
    return folder / CELLS / cell.file_name


def write_outcome(folder: Path, cell: Cell, outcome: Outcome) -> None:
    """Leave what came out of a cell in a file of its own: processes that run others at the same time do not meet."""
    make_folder(folder, CELLS)
    write_whole(cell_file(folder, cell), json.dumps(asdict(outcome)))


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read what cells left.

    Raises:
        ValueError: If a file holds something else.
    """
    check_own_folder(folder / CELLS)
    return [read_outcome(path) for path in sorted((folder / CELLS).glob("*.json"))]


def read_outcome(path: Path) -> Outcome:
    """Read what a cell left.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        kept = json.loads(read_bytes(path))
        return Outcome(
            result=checked(Result, kept["result"]) if kept["result"] else None,
            trial=checked(Trial, kept["trial"]) if kept["trial"] else None,
            points=[checked(Point, point) for point in kept["points"]],
            tables=checked(Tables, {"rows": kept["tables"]}).rows,
        )
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as problem:
        raise ValueError(
            f"'{path}' must hold what came out of a cell: {problem}; remove it and run that cell again"
        ) from problem
