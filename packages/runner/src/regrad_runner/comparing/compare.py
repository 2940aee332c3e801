"""The comparison: every arm on every seed, kept run by run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from regrad_runner.comparing.plan import Plan, agreed, make_plan, open_folder
from regrad_runner.comparing.rates import chosen_rates
from regrad_runner.comparing.running import Comparison, Runner
from regrad_runner.comparing.timing import time_steps
from regrad_runner.comparing.workers import Workers
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import draw, export_tables
from regrad_runner.results.cells import Cell
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, Trial
from regrad_runner.results.view import tracking
from regrad_runner.workloads.workload import Measure, name_on_validation

__all__ = ["Comparison", "Plan", "Runner", "compare", "make_plan"]


def compare(plan: Plan, display: Display) -> ResultsFolder:
    """Run what is not finished yet; after every run the folder holds it.

    A run that fails is kept as failed and the others go on. On several processes each run is
    data-parallel, the first process writes, and a failure ends them all.

    Args:
        plan: From `make_plan`.
        display: Told what is under way.

    Returns:
        The folder with every run.
    """
    if not plan.reports:
        folder = ResultsFolder(plan.path)
        _run_pending(plan, folder, display)
        return folder
    folder = open_folder(plan)
    export_tables(folder)
    config = plan.config
    with tracking(config.tracker, plan.path, config.tracking_uri, say=display.say):
        display.skip(
            len(folder.trials) + sum(result.status != "failed" for result in folder.results)
        )
        _run_pending(plan, folder, display)
        time_steps(plan, folder, display)
        draw(folder, plan.workload.measure)
    return folder


def _runner(plan: Plan, display: Display) -> AbstractContextManager[Runner]:
    """Return what runs the cells, as many at once as planned."""
    if plan.jobs == 1:
        return nullcontext(Comparison(plan, display))
    return Workers(plan, display)


def _run_pending(plan: Plan, folder: ResultsFolder, display: Display) -> None:
    """Run what the folder lacks: trials of learning rates, then runs with the chosen rates."""
    with _runner(plan, display) as runner:
        trials = [
            (cell, cell.lr) for cell in plan.cells if cell.lr is not None and not folder.holds(cell)
        ]
        _follow(plan, folder, display, runner.run_cells(agreed(trials)))
        rates = agreed(chosen_rates(plan, folder.trials))
        runs = [
            (cell, rates[cell.arm])
            for cell in plan.cells
            if cell.lr is None and not folder.is_finished(cell.arm, cell.seed)
        ]
        _follow(plan, folder, display, runner.run_cells(agreed(runs)))


def _follow(plan: Plan, folder: ResultsFolder, display: Display, ended: Iterable[Cell]) -> None:
    """Read each cell as it ends, and write the tables anew."""
    for cell in ended:
        if plan.reports:
            outcome = folder.take(cell)
            export_tables(folder)
            display.end(f"{cell.name}: {outcome_in_words(outcome, plan.workload.measure)}")


def outcome_in_words(outcome: Result | Trial, measure: Measure) -> str:
    """Say what came out of a cell."""
    if isinstance(outcome, Trial):
        return f"{name_on_validation(measure)} {measure.written(outcome.validation)}"
    if outcome.value is None:
        return outcome.status
    words = [f"{measure.name} {measure.written(outcome.value)}"]
    if measure.fixed_target is not None:
        reached = "missed"
        if outcome.steps_to_target is not None:
            reached = f"after {outcome.steps_to_target} steps"
        words.append(f"{measure.fixed_target:g} {reached}")
    return ", ".join([*words, f"{outcome.seconds:.1f} s"])
