"""The folder that a comparison writes: whole after every run, and enough to show or continue it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from regrad_runner.files import make_folder, write_whole
from regrad_runner.results.about import read_about
from regrad_runner.results.cells import Cell, cells_of
from regrad_runner.results.locks import is_lock
from regrad_runner.results.outcomes import CurvePoint, Outcome, Result, Trial, read_outcomes
from regrad_runner.results.points import Point
from regrad_runner.results.tables import checked, read_rows, write_rows
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.checking import validated
from regrad_runner.settings.config import CompareConfig, Config, RunConfig
from regrad_runner.settings.continuing import continued
from regrad_runner.settings.loading import load_config, read_settings, write_config


class OfARun(Protocol):
    """A row that belongs to one run."""

    @property
    def arm(self) -> str:
        """Name of the arm."""

    @property
    def seed(self) -> int:
        """Seed of the run."""


RunPart = TypeVar("RunPart", bound=OfARun)


class ResultsFolder:
    """A comparison's or run's folder: its tables, and what cells left beside them in files of their own.

    Args:
        path: Where it is.

    Attributes:
        results: Runs that ended or failed.
        curves: Evaluations of those that ended.
        trials: Runs of the choice of learning rates.
        tables: What cells left for other tables, as plain values, by the table's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = _cells_in(path)
        outcomes = read_outcomes(path)  # first: what is put into a table meanwhile is then in both
        self.results = read_rows(path / "results.csv", Result)
        self.trials = read_rows(path / "tuning.csv", Trial)
        finished = {
            (result.arm, result.seed) for result in self.results if result.status == "finished"
        }
        curves = read_rows(path / "curves.csv", CurvePoint)
        self.curves = [point for point in curves if (point.arm, point.seed) in finished]
        self.tables: dict[str, list[Mapping[str, Any]]] = {}
        for outcome in outcomes:
            self._take(outcome)

    @property
    def missing(self) -> list[int]:
        """Numbers of the cells that neither ended nor failed."""
        return [number for number, cell in enumerate(self.cells) if not self.holds(cell)]

    def holds(self, cell: Cell) -> bool:
        """Say whether a cell ended or failed before."""
        if cell.lr is None:
            return any(
                (result.arm, result.seed) == (cell.arm, cell.seed) for result in self.results
            )
        return cell in {Cell(trial.arm, trial.seed, trial.lr) for trial in self.trials}

    def is_finished(self, arm: str, seed: int) -> bool:
        """Say whether this run ended or diverged before, and would again."""
        return any(r.arm == arm and r.seed == seed and r.status != "failed" for r in self.results)

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """Return the folder of one run, made if need be."""
        return make_folder(self.path, "runs", f"{arm.folder_name}-seed{seed}")

    def receipt_file(self, arm: str, seed: int) -> Path:
        """Return where the receipt of a run of a comparison is, if it has one."""
        return self.path / "runs" / f"{Arm(arm).folder_name}-seed{seed}" / "receipt.json"

    def add(self, result: Result, points: Sequence[Point] = ()) -> None:
        """Keep a run; one that failed before is replaced. The row comes last: it says that the rest is there."""
        self._put(result, points)
        if points:
            write_rows(self.path / "curves.csv", self.curves, CurvePoint)
        write_rows(self.path / "results.csv", self.results, Result)

    def kept(self, name: str, kind: type[RunPart]) -> list[RunPart]:
        """Return the rows of a CSV file that are of runs that ended, and what cells left for it."""
        rows = [
            row for row in read_rows(self.path / name, kind) if self.is_finished(row.arm, row.seed)
        ]
        return [
            *rows,
            *(
                row
                for row in (checked(kind, left) for left in self.tables.get(name, ()))
                if row not in rows
            ),
        ]

    def keep(self, name: str, rows: Sequence[RunPart], kind: type[RunPart]) -> None:
        """Add the rows of one run to a CSV file; those that the run had before are replaced."""
        if rows:
            others = [
                row
                for row in self.kept(name, kind)
                if (row.arm, row.seed) != (rows[0].arm, rows[0].seed)
            ]
            write_rows(self.path / name, [*others, *rows], kind)

    def name_anew(self, arms: Iterable[Arm]) -> None:
        """Let the runs that are there say what their arms are now: corrections that were added may change it."""
        now = {arm.name: arm for arm in arms}
        renamed = [
            replace(result, must_beat=arm.must_beat, control=arm.control is not None)
            for result in self.results
            if (arm := now.get(result.arm))
        ]
        if renamed != self.results:
            self.results = renamed
            write_rows(self.path / "results.csv", self.results, Result)

    def add_trial(self, trial: Trial) -> None:
        """Keep a run of the choice of a learning rate."""
        self.trials.append(trial)
        self._sort()
        write_rows(self.path / "tuning.csv", self.trials, Trial)

    def write(self) -> None:
        """Write the tables with all that the folder holds."""
        self._sort()
        for name, rows, kind in (
            ("tuning.csv", self.trials, Trial),
            ("curves.csv", self.curves, CurvePoint),
            ("results.csv", self.results, Result),
        ):
            if rows:
                write_rows(self.path / name, rows, kind)

    def _put(self, result: Result, points: Sequence[Point]) -> None:
        self.results = [r for r in self.results if (r.arm, r.seed) != (result.arm, result.seed)] + [
            result
        ]
        if points:
            others = [
                point
                for point in self.curves
                if (point.arm, point.seed) != (result.arm, result.seed)
            ]
            self.curves = others + [
                CurvePoint(arm=result.arm, seed=result.seed, **asdict(p)) for p in points
            ]
        self._sort()

    def _take(self, outcome: Outcome) -> None:
        """Take what a cell left, unless a table has it."""
        result, trial = outcome.result, outcome.trial
        if result is not None and not self.is_finished(result.arm, result.seed):
            self._put(result, outcome.points)
            for name, rows in outcome.tables.items():
                self.tables.setdefault(name, []).extend(rows)
        if trial is not None and not self.holds(Cell(trial.arm, trial.seed, trial.lr)):
            self.trials.append(trial)
            self._sort()

    def _sort(self) -> None:
        """Put the rows into the order of the cells: not that in which several processes came to them."""
        place = {cell: number for number, cell in enumerate(self.cells)}
        last = len(place)
        self.results.sort(key=lambda row: place.get(Cell(row.arm, row.seed), last))
        self.curves.sort(key=lambda row: place.get(Cell(row.arm, row.seed), last))
        self.trials.sort(key=lambda row: place.get(Cell(row.arm, row.seed, row.lr), last))


def _cells_in(path: Path) -> list[Cell]:
    """Return the cells of a comparison's folder; nothing where it does not say what they are."""
    arms, file = read_about(path).get("arms", {}), path / "config.yaml"
    if not arms or not os.path.lexists(file):
        return []
    settings = read_settings(file)
    if "seeds" not in settings:
        raise ValueError(
            f"config must be the settings of a comparison, got none of its seeds in '{file}'"
        )
    try:
        return cells_of(arms, validated(CompareConfig, settings))
    except ValueError:  # of another version: what ran can be shown all the same
        return []


def check_folder(path: Path, config: Config, *, resume: bool) -> Config:
    """Return the settings with which the folder may be written.

    Args:
        path: May be missing.
        config: Resolved settings.
        resume: Whether to continue what is there, with more corrections or seeds if they say so; otherwise nothing
            may be there.

    Returns:
        The settings, what was there before in the order in which it was there.

    Raises:
        ValueError: If these settings may not write to the folder.
    """
    with _unfit_as_error(path):
        return _checked_folder(path, config, resume=resume)


@contextmanager
def _unfit_as_error(path: Path) -> Iterator[None]:
    """Turn an `OSError` about a folder, such as one of its name's length, into a `ValueError`."""
    try:
        yield
    except OSError as problem:
        raise ValueError(
            f"out must be a folder that can be used, got '{path}': {problem.strerror}; choose another folder"
        ) from problem


def _checked_folder(path: Path, config: Config, *, resume: bool) -> Config:
    saved = path / "config.yaml"
    if path.is_symlink() and not path.exists():
        raise ValueError(f"out must be a folder, got '{path}', a link that leads nowhere")
    if path.exists() and not path.is_dir():
        raise ValueError(f"out must be a folder, got the file '{path}'")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"out must be in a folder that can be written, got '{path}'")
    if not resume:
        found = (
            sorted(found.name for found in path.iterdir() if not is_lock(found))
            if path.is_dir()
            else []
        )
        if saved.is_file():
            raise ValueError(
                f"out must be a new or empty folder, got '{path}'; --resume continues it"
            )
        if found:
            raise ValueError(
                f"out must be a new or empty folder, got '{path}', which holds {found[0]!r}; choose another folder"
            )
        return config
    if not saved.is_file():
        raise ValueError(
            f"out must be the folder of an earlier run to resume it, got '{path}' without config.yaml"
        )
    return continued(load_config(type(config), file=saved, flags={}), config)


def check_unchanged(path: Path, config: Config, *, resume: bool) -> None:
    """Raise a `ValueError` if a folder is no longer as it was when `check_folder` looked at it.

    Args:
        path: The folder, which nobody else writes now.
        config: What `check_folder` returned.
        resume: As there.
    """
    if check_folder(path, config, resume=resume) != config:
        raise ValueError(
            f"out must stay as it is, got '{path}', which another command changed; start again"
        )


def check_arms(path: Path, arms: Iterable[Arm]) -> None:
    """Raise a `ValueError` if an arm of the folder would mean something else by its name."""
    arms_then = read_about(path).get("arms")
    known = arms_then if isinstance(arms_then, dict) else {}
    for arm in arms:
        if known.get(arm.name, arm.recipe) != json.loads(json.dumps(arm.recipe)):
            raise ValueError(
                f"out must hold the same arms, got another {arm.name!r} in '{path}'; choose another folder"
            )


def start_folder(path: Path, config: RunConfig, about: Mapping[str, Any]) -> ResultsFolder:
    """Make the folder, with the settings and what else a report needs, and return what it holds."""
    make_folder(path)
    write_whole(path / "config.yaml", write_config(config))
    write_whole(path / "about.json", json.dumps(about, indent=2) + "\n")
    return ResultsFolder(path)
