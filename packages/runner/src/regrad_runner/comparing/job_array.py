"""A comparison as a job array: each cell is a job of its own, and `regrad report` merges them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrad_runner.comparing.plan import Plan, Planned, agreed, open_folder
from regrad_runner.comparing.prepared import prepared_plan
from regrad_runner.comparing.runners import runner_of
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.verdict_numbers import verdict_numbers
from regrad_runner.results.cells import Cell, Extension, in_ranges, is_compared
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, Trial
from regrad_runner.results.rates import missing_cells, run_of
from regrad_runner.results.run import run_path
from regrad_runner.results.view import tracking
from regrad_runner.settings.config import ComparisonSettings
from regrad_runner.settings.continuing import first_difference
from regrad_runner.settings.environment import environment_in_words
from regrad_runner.settings.loading import load_config
from regrad_runner.tracking.choosing import MLFLOW
from regrad_runner.training.preparation import try_on


def prepare_cells(plan: Planned[Any], *, say: Callable[[str], None]) -> dict[str, str]:
    """Make a comparison's folder, whose cells can then run in any number of processes.

    Args:
        plan: Checked.
        say: Told what goes wrong with tracking.

    Returns:
        The numbers of its cells that have not ended, as a job array takes them, in the order in
        which they must run: "trials" of learning rates if there is a choice, "extensions-1" and so
        on for the rates that arms may add, and "runs". Each needs what is before it of its arm.
    """
    if plan.reports:
        open_folder(plan, job_array=True)
        if _cells_track(plan):  # they find the comparison there
            with _tracked(plan, say):
                pass
    kinds: dict[str, list[int]] = {}
    for number in agreed(_cells_left(plan)):
        kinds.setdefault(_kind_of(plan.cells[number]), []).append(number)
    return {kind: in_ranges(numbers) for kind, numbers in kinds.items()}


def _cells_left(plan: Planned[Any]) -> list[int]:
    """Return the numbers of the cells to run: those that have not ended, and runs that failed."""
    if not plan.reports:
        return []
    folder = ResultsFolder(plan.path)
    return missing_cells(plan.cells, folder.choices, lambda cell: _has_ended(cell, folder))


def _kind_of(cell: Cell | Extension) -> str:
    """Return the name of the cells that can run at the same time as this one."""
    if isinstance(cell, Extension):
        return f"extensions-{cell.round}"
    return "runs" if is_compared(cell) else "trials"


def show_prepared(path: Path, cells: dict[str, str], *, as_json: bool) -> str:
    """Return what `--cells` prints.

    Args:
        path: The comparison's folder.
        cells: From `prepare_cells`.
        as_json: For programs; else one line for each.
    """
    if as_json:
        return json.dumps({"out": str(path), **cells}, indent=2)
    lines = [f"{kind} {numbers}" for kind, numbers in cells.items()]
    return "\n".join([*lines, f"out {path}"])


@dataclass(frozen=True)
class CellPlan:
    """A cell that was checked and can run.

    Attributes:
        plan: Of its comparison.
        name: As printed.
        cell: The run; None if its arm chose a rate without it.
        lr: Its learning rate.
        done: Why there is nothing to run; empty if there is.
    """

    plan: Planned[Any]
    name: str
    cell: Cell | None
    lr: float
    done: str = ""


def make_cell_plan(config: ComparisonSettings, number: int, path: Path) -> CellPlan:
    """Check that a cell of a prepared comparison can run. Writes nothing.

    Args:
        config: The folder's settings, perhaps with others that change no result.
        number: Of the cell, from 0.
        path: The comparison's folder.

    Raises:
        ValueError: If there is no such cell, settings differ from the folder's, or the trials of
            its arm are missing.
        RegradError: If its corrections cannot work.
    """
    saved = load_config(type(config), file=path / "config.yaml", flags={})
    plan = prepared_plan(path, config)
    difference = first_difference(saved, plan.config)
    if difference:
        raise ValueError(
            f"cell must have the settings of '{path}', got {difference}; leave them out"
        )
    cells = plan.cells
    if not 0 <= number < len(cells):
        raise ValueError(f"cell must be from 0 to {len(cells) - 1}, got {number}")
    cell = cells[number]
    folder = ResultsFolder(path)
    choice = agreed(folder.choices[cell.arm])
    run = run_of(cell, choice)
    if run is None or run.lr is None:
        _check_what_comes_before(cells, cell, agreed(folder.missing))
    if run is None:
        return CellPlan(plan, cell.name, None, 0.0, "its arm chose a learning rate without it")
    lr = run.lr
    if lr is None:
        lr = agreed(folder.rates)[run.arm]
    if isinstance(plan, Plan):
        try_on(plan.arm(run.arm), plan.config, plan.workload, lr=lr)
    done = "it has already ended" if agreed(_has_ended(run, folder)) else ""
    return CellPlan(plan, run.name, run, lr, done)


def run_cell(cell_plan: CellPlan, display: Display) -> Result | Trial | None:
    """Run a cell in its own folder and return its result; None on a process that does not write.

    Args:
        cell_plan: Of a cell that is to run.
        display: Told how far it is.
    """
    plan = cell_plan.plan
    cell = cell_plan.cell
    if cell is None:
        raise ValueError(f"cell must be one that still has to run, got {cell_plan.name!r}")
    if isinstance(plan, Plan):
        for line in environment_in_words(plan.config):
            display.say(line)
    with ExitStack() as stack:
        if plan.reports and _cells_track(plan):
            stack.enter_context(_tracked(plan, display.say, cell))
        cells = stack.enter_context(runner_of(plan, display, cells=1))
        for _ in cells.run_cells([(cell, cell_plan.lr)]):
            pass
    return ResultsFolder(plan.path).take(cell) if plan.reports else None


def _cells_track(plan: Planned[Any]) -> bool:
    """Say whether each cell shows its run itself; `regrad sync` shows all of them anyway."""
    config = plan.config
    return config.tracker == MLFLOW and is_server(config.tracking_uri)


def is_server(address: str | None) -> bool:
    """Say whether runs on several nodes can be tracked at an address at once, unlike in a file.

    Nothing is lost where they are not: `regrad sync` shows the whole folder later.
    """
    return address is not None and not address.startswith("sqlite")


def _has_ended(cell: Cell, folder: ResultsFolder) -> bool:
    """Say whether a cell need not run again: a trial counts even if it failed."""
    if cell.lr is not None:
        return folder.holds(cell)
    return folder.is_finished(cell.arm, cell.seed)


def _check_what_comes_before(
    cells: Sequence[Cell | Extension], cell: Cell | Extension, missing: Sequence[int]
) -> None:
    """Raise a `ValueError` unless the trials have ended that decide about a cell.

    Args:
        cells: Of the comparison.
        cell: A run, or a trial of a rate that its arm may ask for.
        missing: Numbers of the cells that have not ended.
    """
    before = [
        number
        for number in missing
        if cells[number].arm == cell.arm and _decides(cells[number], cell)
    ]
    if before:
        raise ValueError(
            f"cell must come after the trials of its arm {cell.arm!r}, got none of the cells "
            f"{in_ranges(before)}; run them first"
        )


def _decides(trial: Cell | Extension, cell: Cell | Extension) -> bool:
    """Say whether a cell of the same arm is a trial that decides about another one."""
    if isinstance(trial, Cell):
        return trial.lr is not None
    return not isinstance(cell, Extension) or trial.round < cell.round


def _tracked(
    plan: Planned[Any], say: Callable[[str], None], cell: Cell | None = None
) -> AbstractContextManager[None]:
    """Show the comparison, and with it one of its cells, while that runs."""
    only = plan.path
    if cell is not None:
        only = run_path(plan.path, cell.arm, cell.seed, cell.lr)
    config = plan.config
    return tracking(
        config.tracker,
        plan.path,
        config.tracking_uri,
        say=say,
        only=only,
        verdicts=verdict_numbers,
    )
