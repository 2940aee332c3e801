"""A comparison as a job array: counted once, each cell run by a job of its own, merged by `regrad report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from regrad_runner.comparing.plan import Plan, agreed, open_folder, plan_of
from regrad_runner.comparing.rates import chosen_rates
from regrad_runner.comparing.running import Comparison
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell, in_ranges
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, Trial
from regrad_runner.results.run import run_path
from regrad_runner.results.view import tracking
from regrad_runner.settings.config import CompareConfig
from regrad_runner.settings.continuing import first_difference
from regrad_runner.settings.environment import environment_in_words
from regrad_runner.settings.loading import load_config
from regrad_runner.training.preparation import try_on


def prepare_cells(plan: Plan, *, say: Callable[[str], None]) -> dict[str, str]:
    """Make a comparison's folder without running anything, so that its cells can run in any number of processes.

    Args:
        plan: Checked.
        say: Told what goes wrong with tracking.

    Returns:
        The numbers of its cells by what they are, as a job array takes them: trials of learning rates where there is
        a choice, then the runs, which need all trials of their arm.
    """
    if plan.reports:
        open_folder(plan, job_array=True)
        if is_server(plan.config.tracking_uri):  # its cells find the comparison there
            with _tracked(plan, say):
                pass
    trials = sum(cell.lr is not None for cell in plan.cells)
    numbers = {"trials": range(trials), "runs": range(trials, plan.runs)}
    return {what: in_ranges(cells) for what, cells in numbers.items() if cells}


def show_prepared(path: Path, cells: dict[str, str], *, as_json: bool) -> str:
    """Return what `--cells` prints.

    Args:
        path: The comparison's folder.
        cells: From `prepare_cells`.
        as_json: For programs; else one line for each.
    """
    if as_json:
        return json.dumps({"out": str(path), **cells}, indent=2)
    return "\n".join(f"{what} {numbers}" for what, numbers in (*cells.items(), ("out", path)))


@dataclass(frozen=True)
class CellPlan:
    """A cell that was checked and can run.

    Attributes:
        plan: Of its comparison.
        cell: Itself.
        lr: Its learning rate.
        done: Whether it ended before.
    """

    plan: Plan
    cell: Cell
    lr: float
    done: bool


def make_cell_plan(config: CompareConfig, number: int, path: Path) -> CellPlan:
    """Check that a cell of a prepared comparison can run. Writes nothing.

    Args:
        config: The folder's settings, perhaps with others that change no result.
        number: Of the cell, from 0.
        path: The comparison's folder.

    Raises:
        ValueError: If there is no such cell, settings differ from the folder's, or the trials of its arm are missing.
        RegradError: If its corrections cannot work.
    """
    saved = load_config(CompareConfig, file=path / "config.yaml", flags={})
    plan = plan_of(path, config)
    difference = first_difference(saved, plan.config)
    if difference:
        raise ValueError(
            f"cell must have the settings of '{path}', got {difference}; leave them out"
        )
    if not 0 <= number < plan.runs:
        raise ValueError(f"cell must be from 0 to {plan.runs - 1}, got {number}")
    cell, folder = plan.cells[number], ResultsFolder(path)
    lr = _rate(plan, cell, folder)
    try_on(plan.arm(cell.arm), plan.config, plan.workload, lr=lr)
    done = folder.holds(cell) if cell.lr is not None else folder.is_finished(cell.arm, cell.seed)
    return CellPlan(plan, cell, lr, agreed(done))


def run_cell(cell_plan: CellPlan, display: Display) -> Result | Trial | None:
    """Run a cell in its own folder, and return what came out; None on a process that does not write.

    Args:
        cell_plan: Of a cell that did not end before.
        display: Told how far it is.
    """
    plan, cell = cell_plan.plan, cell_plan.cell
    for line in environment_in_words(plan.config):
        display.say(line)
    with ExitStack() as stack:
        if plan.reports and is_server(plan.config.tracking_uri):
            stack.enter_context(_tracked(plan, display.say, cell))
        Comparison(plan, display).run_cell(cell, lr=cell_plan.lr)
    return ResultsFolder(plan.path).take(cell) if plan.reports else None


def is_server(address: str | None) -> bool:
    """Say whether runs on several nodes can be tracked at an address at once; a file is shared badly.

    Of what is tracked elsewhere nothing is lost: `regrad sync` shows the whole folder.
    """
    return address is not None and not address.startswith("sqlite")


def _rate(plan: Plan, cell: Cell, folder: ResultsFolder) -> float:
    """Return a cell's learning rate; that of a run is known once every trial of its arm has ended."""
    if cell.lr is not None:
        return cell.lr
    numbered = list(enumerate(plan.cells))
    missing = [
        n for n, c in numbered if c.lr is not None and c.arm == cell.arm and not folder.holds(c)
    ]
    if missing:
        raise ValueError(
            f"cell must come after the trials of its arm {cell.arm!r}, got none of the cells {in_ranges(missing)}; "
            "run them first"
        )
    return chosen_rates(plan, folder.trials)[cell.arm]


def _tracked(
    plan: Plan, say: Callable[[str], None], cell: Cell | None = None
) -> AbstractContextManager[None]:
    """Show the comparison, and with it one of its cells, while that runs."""
    only = plan.path
    if cell is not None:
        only = run_path(plan.path, cell.arm, cell.seed, cell.lr)
    config = plan.config
    return tracking(config.tracker, plan.path, config.tracking_uri, say=say, only=only)
