"""A comparison as a job array: each cell is run by its own job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from regrad_runner.comparing.compare import TRACKED
from regrad_runner.comparing.plan import Plan, agreed, open_folder, plan_of
from regrad_runner.comparing.rates import chosen_rates
from regrad_runner.comparing.running import Comparison
from regrad_runner.reporting.progress import Display
from regrad_runner.results.about import read_about
from regrad_runner.results.cells import Cell, in_ranges
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Outcome, write_outcome
from regrad_runner.settings.config import CompareConfig
from regrad_runner.settings.continuing import first_difference
from regrad_runner.settings.environment import environment_in_words
from regrad_runner.settings.loading import load_config
from regrad_runner.tracking.mlflow_ import Run, Tracker, open_tracker
from regrad_runner.training.preparation import try_on


def prepare_cells(plan: Plan) -> dict[str, str]:
    """Make a comparison's folder without running anything, so that its cells can run in any number of processes.

    Args:
        plan: Checked.

    Returns:
        The numbers of its cells by what they are, as a job array takes them: trials of learning rates where there is
        a choice, then the runs, which need all trials of their arm.
    """
    if plan.reports:
        known = read_about(plan.path).get(TRACKED)
        open_folder(plan, **{TRACKED: known or _tracked(plan)})
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


def run_cell(cell_plan: CellPlan, display: Display) -> Outcome:
    """Run a cell and leave what came out in a file of its own.

    Args:
        cell_plan: Of a cell that did not end before.
        display: Told how far it is.
    """
    plan, cell = cell_plan.plan, cell_plan.cell
    for line in environment_in_words(plan.config):
        display.say(line)
    tracker, parent = Tracker(), read_about(plan.path).get(TRACKED, "")
    if plan.reports:
        # Nodes share a database's file badly: what is for it waits in the folder, and regrad sync delivers it.
        sends = (plan.config.tracking_uri or "sqlite").partition(":")[0] != "sqlite"
        tracker = open_tracker(
            plan.config.tracker, folder=plan.path, uri=plan.config.tracking_uri, sends=sends
        )
    with tracker:
        comparison = Comparison(
            plan, ResultsFolder(plan.path), tracker, Run(tracker, parent), display
        )
        outcome = comparison.outcome(cell, lr=cell_plan.lr)
        if plan.reports:
            write_outcome(plan.path, cell, outcome)
    return outcome


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


def _tracked(plan: Plan) -> str:
    """Begin and end the tracked run under which those of the cells are shown, and return our id of it."""
    with open_tracker(
        plan.config.tracker, folder=plan.path, uri=plan.config.tracking_uri
    ) as tracker:
        run = tracker.start(plan.experiment, plan.path.name, plan.config.model_dump(mode="json"))
        run.finish()
    return run.id
