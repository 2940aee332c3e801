"""An output folder: its settings, what it says about itself, and the runs in it."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from regrad_runner.files import (
    check_own_folder,
    is_left_over,
    make_folder,
    remove_left_over,
    write_whole,
)
from regrad_runner.results.about import LAYOUT, read_about
from regrad_runner.results.cells import Cell, Extension, cells_of
from regrad_runner.results.locks import RUNS, is_lock
from regrad_runner.results.outcomes import CurvePoint, Result, Trial
from regrad_runner.results.points import EVALUATION
from regrad_runner.results.rates import (
    RateChoice,
    RateSearch,
    choices_of,
    missing_cells,
    run_of,
    search_of,
)
from regrad_runner.results.run import (
    RECEIPT,
    Line,
    RunRecord,
    read_points,
    read_record,
    run_path,
    run_paths,
)
from regrad_runner.results.tables import checked
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.checking import validated
from regrad_runner.settings.config import ComparisonSettings, Config, Settings
from regrad_runner.settings.continuing import continued
from regrad_runner.settings.loading import load_config, read_settings, write_config
from regrad_runner.settings.script_config import comparison_settings_of

SETTINGS_FILE = "config.yaml"


class OfARun(Protocol):
    """A row that belongs to one run."""

    @property
    def arm(self) -> str:
        """Name of the arm."""

    @property
    def seed(self) -> int:
        """Seed of the run."""


RunPart = TypeVar("RunPart", bound=OfARun)


@dataclass(frozen=True)
class EndedRun:
    """A run that ended.

    Attributes:
        record: What it says of itself.
        lines: Its points; none if it failed or diverged.
        outcome: What came out.
    """

    record: RunRecord
    lines: Sequence[Line]
    outcome: Result | Trial
    _rows: dict[type[Any], list[Any]] = field(default_factory=dict, init=False, compare=False)

    def rows(self, line_kind: str, kind: type[RunPart]) -> list[RunPart]:
        """Return rows for its lines of one kind; see `ResultsFolder.kept`.

        They are made once: a comparison rewrites its tables after every run.
        """
        if kind not in self._rows:
            lines = [line for line in self.lines if line.kind == line_kind]
            self._rows[kind] = [_row(kind, self.record, line) for line in lines]
        return self._rows[kind]


class ResultsFolder:
    """The runs of a comparison, or the one run, as their folders hold them.

    Args:
        path: The output folder.

    Attributes:
        cells: Of the comparison; none if the folder does not say what they are.
        search: How its arms choose their learning rates.

    Raises:
        ValueError: If something in it is damaged, or an earlier version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        about = read_about(path)
        self._roles = about.get("roles", {})
        self.cells, self.search = cells_in(path, about.get("arms", {}), about.get("measure"))
        self._runs: dict[Path, EndedRun] = {}
        check_own_folder(path / RUNS)
        for run in run_paths(path):
            self._read(run)

    @property
    def results(self) -> list[Result]:
        """Runs that ended or failed, in the order of the cells."""
        return [run.outcome for run in self._in_order() if isinstance(run.outcome, Result)]

    @property
    def trials(self) -> list[Trial]:
        """Runs of the choice of learning rates."""
        return [run.outcome for run in self._in_order() if isinstance(run.outcome, Trial)]

    @property
    def curves(self) -> list[CurvePoint]:
        """Evaluations of the runs that ended."""
        return self.kept(EVALUATION, CurvePoint)

    @property
    def missing(self) -> list[int]:
        """Numbers of the cells that neither ended nor failed.

        A rate that an arm may still ask for counts; one that it chose without does not.
        """
        return missing_cells(self.cells, self.choices, self.holds)

    @property
    def choices(self) -> dict[str, RateChoice]:
        """What the trials say of every arm's learning rate, even if there is no choice."""
        return choices_of(self.cells, self.search, self._trials())

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the arms that have chosen, or had no choice."""
        choices = self.choices.items()
        return {arm: choice.best for arm, choice in choices if choice.best is not None}

    @property
    def next_trials(self) -> list[Cell]:
        """Trials that the choice of learning rates waits for; what they say may ask for more."""
        trials = [cell for cell in self._known_cells() if cell.lr is not None]
        return [trial for trial in trials if not self.holds(trial)]

    def kept(self, line_kind: str, kind: type[RunPart]) -> list[RunPart]:
        """Return rows for the lines of one kind in the runs that ended.

        Args:
            line_kind: Of the lines in `points.jsonl`.
            kind: Of the rows, with fields named as the lines' numbers and labels.
        """
        rows: list[RunPart] = []
        for run in self._in_order():
            rows += run.rows(line_kind, kind)
        return rows

    def holds(self, cell: Cell) -> bool:
        """Say whether a cell ended or failed before."""
        return run_path(self.path, cell.arm, cell.seed, cell.lr) in self._runs

    def is_finished(self, arm: str, seed: int) -> bool:
        """Say whether this run ended or diverged before, and would again."""
        run = self._runs.get(run_path(self.path, arm, seed))
        return run is not None and run.record.status != "failed"

    def take(self, cell: Cell) -> Result | Trial:
        """Read a run that has ended meanwhile, and return what came out.

        Raises:
            ValueError: If it has not ended, or is damaged.
        """
        path = run_path(self.path, cell.arm, cell.seed, cell.lr)
        self._read(path)
        if path not in self._runs:
            raise ValueError(f"'{path}' must hold a run that ended, got one that has not")
        return self._runs[path].outcome

    def receipt_file(self, arm: str, seed: int) -> Path:
        """Return where the receipt of a run is, if it has one."""
        return run_path(self.path, arm, seed) / RECEIPT

    def _read(self, path: Path) -> None:
        """Read a run's folder; a run that has not ended counts as none."""
        record = read_record(path)
        self._runs.pop(path, None)
        if record.status in ("running", "killed"):
            return
        lines = read_points(path, record)
        if record.trial or record.status != "finished":
            lines = []
        self._runs[path] = EndedRun(record, lines, self._outcome(path, record))

    def _outcome(self, path: Path, record: RunRecord) -> Result | Trial:
        try:
            if record.trial:
                return trial_in(record)
            values = {"must_beat": None, "control": None, **(record.result or {})}
            role = self._roles.get(record.arm, {})
            values |= {name: role[name] for name in ("must_beat", "control") if name in role}
            values |= {"arm": record.arm, "seed": record.seed, "lr": record.lr}
            return checked(Result, {**values, "status": record.status})
        except (TypeError, ValueError) as problem:
            raise ValueError(
                f"'{path}' must hold the result of a run, got another: {problem}; "
                "take it from a copy of the folder, or remove it and run it again"
            ) from None

    def _trials(self) -> list[Trial]:
        """Return the trials that ended, in any order."""
        return [run.outcome for run in self._runs.values() if isinstance(run.outcome, Trial)]

    def _known_cells(self) -> list[Cell]:
        """Return the cells whose run is known: all but rates that no arm has requested so far."""
        choices = self.choices
        runs = [run_of(cell, choices[cell.arm]) for cell in self.cells]
        return [run for run in runs if run is not None]

    def _in_order(self) -> list[EndedRun]:
        """Return the runs in the order of the cells, in whatever order processes ran them."""
        place = {cell: number for number, cell in enumerate(self._known_cells())}

        def key(run: EndedRun) -> tuple[int, int]:
            record = run.record
            cell = Cell(record.arm, record.seed, record.lr if record.trial else None)
            return place.get(cell, len(place)), record.started

        return sorted(self._runs.values(), key=key)


def _row(kind: type[RunPart], record: RunRecord, line: Line) -> RunPart:
    """Return the row that a line stands for."""
    values = {**line.labels, **line.numbers(), "step": line.step}
    return checked(kind, {**values, "arm": record.arm, "seed": record.seed})


def trial_in(record: RunRecord) -> Trial:
    """Return the trial of a learning rate that a record tells of.

    Raises:
        TypeError: If what came out is not a number.
        ValueError: If what came out is not a number.
    """
    numbers = record.result or {}
    return Trial(
        arm=record.arm,
        lr=record.lr,
        seed=record.seed,
        validation=float(numbers.get("validation", math.nan)),
    )


def cells_in(
    path: Path, arms: Iterable[str], measure: object
) -> tuple[list[Cell | Extension], RateSearch]:
    """Return the cells of a comparison's folder, and how its arms choose their learning rates.

    Args:
        path: The folder.
        arms: Names of the arms.
        measure: What the folder says of its measure.

    Returns:
        No cells and no rates where the folder does not say what its cells are.

    Raises:
        ValueError: If its settings cannot be read.
    """
    arms = list(arms)
    file = path / SETTINGS_FILE
    if not arms or not os.path.lexists(file):
        return [], RateSearch(())
    settings = read_settings(file)
    if "seeds" not in settings:
        raise ValueError(
            f"config must be the settings of a comparison, got none of its seeds in '{file}'"
        )
    try:
        config = validated(comparison_settings_of(settings), settings)
    except ValueError:  # of another version: what ran can still be shown
        return [], RateSearch(())
    lower_is_better = isinstance(measure, dict) and measure.get("higher_is_better") is False
    return cells_of(arms, config), search_of(config, higher_is_better=not lower_is_better)


def check_folder(path: Path, config: Config, *, resume: bool) -> Config:
    """Return the settings with which the folder may be written.

    Args:
        path: May be missing.
        config: Resolved settings.
        resume: Whether to continue what is there, with more corrections or seeds if the settings
            say so; otherwise nothing may be there.

    Returns:
        The settings; corrections that were there before keep their order.

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
            f"out must be a folder that can be used, got '{path}': {problem.strerror}; "
            "choose another folder"
        ) from problem


def _checked_folder(path: Path, config: Config, *, resume: bool) -> Config:
    """Return the settings with which the folder may be written; see `check_folder`."""
    _check_place(path)
    if not resume:
        _check_empty(path)
        return config
    saved = path / SETTINGS_FILE
    if not saved.is_file():
        raise ValueError(
            f"out must be the folder of an earlier run to resume it, got '{path}' "
            "without config.yaml"
        )
    _check_kind(path, config)
    return continued(load_config(type(config), file=saved, flags={}), config)


def _check_kind(path: Path, config: Settings) -> None:
    """Raise a `ValueError` if a folder holds a run and not a comparison, or the other way round."""
    names = {"run": "a run", "comparison": "a comparison"}
    wanted = "comparison" if isinstance(config, ComparisonSettings) else "run"
    found = read_about(path).get("kind", wanted)
    if found in names and found != wanted:
        raise ValueError(
            f"out must be the folder of {names[wanted]} to continue it, got that of "
            f"{names[found]} in '{path}'; choose another folder"
        )


def _check_place(path: Path) -> None:
    """Raise a `ValueError` unless a path is a folder, or can become one, that can be written."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"out must be a folder, got '{path}', a broken link")
    if path.exists() and not path.is_dir():
        raise ValueError(f"out must be a folder, got the file '{path}'")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"out must be in a folder that can be written, got '{path}'")


def _check_empty(path: Path) -> None:
    """Raise a `ValueError` if a command wrote a folder, or somebody else; it may be missing.

    A lock does not count, and neither do settings whose writing a kill broke off: nothing else was
    written then.
    """
    if not path.is_dir():
        return
    found = sorted(
        found.name
        for found in path.iterdir()
        if not is_lock(found) and not is_left_over(found, SETTINGS_FILE)
    )
    if (path / SETTINGS_FILE).is_file():
        raise ValueError(f"out must be a new or empty folder, got '{path}'; --resume continues it")
    if found:
        raise ValueError(
            f"out must be a new or empty folder, got '{path}', which holds {found[0]!r}; "
            "choose another folder"
        )


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
                f"out must hold the same arms, got another {arm.name!r} in '{path}'; "
                "choose another folder"
            )


def start_folder(path: Path, config: Settings, about: Mapping[str, Any]) -> None:
    """Make the folder, with the settings and what else a report needs; its id stays the same.

    Args:
        path: The output folder.
        config: Resolved settings.
        about: What it says about itself.
    """
    make_folder(path)
    remove_left_over(path, SETTINGS_FILE)
    earlier = read_about(path)
    known = {
        "layout": LAYOUT,
        "id": earlier.get("id") or uuid.uuid4().hex,
        "started": earlier.get("started") or time.time_ns() // 1_000_000,
    }
    write_whole(path / SETTINGS_FILE, write_config(config))
    write_whole(path / "about.json", json.dumps(known | dict(about), indent=2) + "\n")
