"""A comparison as a job array: each cell is a job of its own, and `regrad report` merges them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrad_runner.comparing.plan import Plan, Planned, agreed, open_folder, plan_of
from regrad_runner.comparing.rates import chosen_rates
from regrad_runner.comparing.runners import runner_of
from regrad_runner.comparing.script_plan import script_plan_of
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell, in_ranges
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, Trial
from regrad_runner.results.run import run_path
from regrad_runner.results.view import tracking
from regrad_runner.settings.config import CompareConfig, ComparisonSettings
from regrad_runner.settings.continuing import first_difference
from regrad_runner.settings.environment import environment_in_words
from regrad_runner.settings.loading import load_config
from regrad_runner.settings.script_config import ScriptConfig
from regrad_runner.training.preparation import try_on


def prepare_cells(plan: Planned[Any], *, say: Callable[[str], None]) -> dict[str, str]:
    """Make a comparison's folder, whose cells can then run in any number of processes.

    Args:
        plan: Checked.
        say: Told what goes wrong with tracking.

    Returns:
        The numbers of its cells, as a job array takes them: "trials" of learning rates if there is
        a choice, and "runs", each of which needs all trials of its arm.
    """
    if plan.reports:
        open_folder(plan, job_array=True)
        if is_server(plan.config.tracking_uri):  # its cells find the comparison there
            with _tracked(plan, say):
                pass
    trials = sum(cell.lr is not None for cell in plan.cells)
    numbers = {"trials": range(trials), "runs": range(trials, plan.runs)}
    return {kind: in_ranges(cells) for kind, cells in numbers.items() if cells}


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
        cell: Itself.
        lr: Its learning rate.
        done: Whether it ended before.
    """

    plan: Planned[Any]
    cell: Cell
    lr: float
    done: bool


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
    plan = _plan_of(path, config)
    difference = first_difference(saved, plan.config)
    if difference:
        raise ValueError(
            f"cell must have the settings of '{path}', got {difference}; leave them out"
        )
    if not 0 <= number < plan.runs:
        raise ValueError(f"cell must be from 0 to {plan.runs - 1}, got {number}")
    cell = plan.cells[number]
    folder = ResultsFolder(path)
    lr = _rate(plan, cell, folder)
    if isinstance(plan, Plan):
        try_on(plan.arm(cell.arm), plan.config, plan.workload, lr=lr)
    return CellPlan(plan, cell, lr, agreed(_has_ended(cell, folder)))


def _plan_of(path: Path, config: ComparisonSettings) -> Planned[Any]:
    """Return the plan of a prepared folder, of whatever its cells are."""
    if isinstance(config, ScriptConfig):
        return script_plan_of(path, config)
    if not isinstance(config, CompareConfig):
        raise TypeError(f"config must be of a comparison, got {type(config).__name__}")
    return plan_of(path, config)


def run_cell(cell_plan: CellPlan, display: Display) -> Result | Trial | None:
    """Run a cell in its own folder and return its result; None on a process that does not write.

    Args:
        cell_plan: Of a cell that did not end before.
        display: Told how far it is.
    """
    plan = cell_plan.plan
    cell = cell_plan.cell
    if isinstance(plan, Plan):
        for line in environment_in_words(plan.config):
            display.say(line)
    with ExitStack() as stack:
        if plan.reports and is_server(plan.config.tracking_uri):
            stack.enter_context(_tracked(plan, display.say, cell))
        cells = stack.enter_context(runner_of(plan, display))
        for _ in cells.run_cells([(cell, cell_plan.lr)]):
            pass
    return ResultsFolder(plan.path).take(cell) if plan.reports else None


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


def _rate(plan: Planned[Any], cell: Cell, folder: ResultsFolder) -> float:
    """Return a cell's learning rate; that of a run is known once all trials of its arm ended."""
    if cell.lr is not None:
        return cell.lr
    missing = []
    for number, other in enumerate(plan.cells):
        is_trial_of_arm = other.lr is not None and other.arm == cell.arm
        if is_trial_of_arm and not folder.holds(other):
            missing.append(number)
    if missing:
        raise ValueError(
            f"cell must come after the trials of its arm {cell.arm!r}, got none of the cells "
            f"{in_ranges(missing)}; run them first"
        )
    return chosen_rates(plan, folder.trials)[cell.arm]


def _tracked(
    plan: Planned[Any], say: Callable[[str], None], cell: Cell | None = None
) -> AbstractContextManager[None]:
    """Show the comparison, and with it one of its cells, while that runs."""
    only = plan.path
    if cell is not None:
        only = run_path(plan.path, cell.arm, cell.seed, cell.lr)
    config = plan.config
    return tracking(config.tracker, plan.path, config.tracking_uri, say=say, only=only)
