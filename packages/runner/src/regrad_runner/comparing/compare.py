"""The comparison: every arm on every seed, kept run by run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from regrad_runner.comparing.estimate import estimate_in_words
from regrad_runner.comparing.plan import Plan, Planned, agreed, make_plan, open_folder
from regrad_runner.comparing.runners import runner_of
from regrad_runner.comparing.running import Comparison, Runner
from regrad_runner.comparing.timing import time_steps
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import draw, export_tables
from regrad_runner.reporting.verdict_numbers import verdict_numbers
from regrad_runner.results.cells import Cell, is_compared
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, Trial
from regrad_runner.results.view import tracking
from regrad_runner.settings.cluster import SLURM
from regrad_runner.workloads.workload import Measure, name_on_validation

__all__ = ["Comparison", "Plan", "Runner", "compare", "make_plan"]


def compare(plan: Planned[Any], display: Display) -> ResultsFolder:
    """Run what is not finished yet; every run is in the folder as soon as it ends.

    A run that fails is kept as failed and the others go on. On several processes each run is
    data-parallel, the first process writes, and a failure ends them all, unless the run diverged.

    Args:
        plan: From `make_plan`.
        display: Shows what is under way.

    Returns:
        The folder with every run.
    """
    if not plan.reports:
        folder = ResultsFolder(plan.path)
        with runner_of(plan, display, cells=plan.runs) as runner:
            _run_pending(plan, folder, display, runner)
        return folder
    folder = open_folder(plan)
    export_tables(folder)
    failed = sum(result.status == "failed" for result in folder.results)
    ended = len(folder.trials) + len(folder.results) - failed
    display.skip(ended)
    if not folder.missing and not failed:
        display.say("every run has ended; nothing is left to run")
    with (
        runner_of(plan, display, cells=plan.runs - ended) as runner,
        tracking(
            plan.config.tracker,
            plan.path,
            plan.config.tracking_uri,
            say=display.say,
            verdicts=verdict_numbers,
        ),
    ):
        if isinstance(plan, Plan) and plan.cluster is None:
            _say_estimate(plan, folder, display)
        _run_pending(plan, folder, display, runner)
        if isinstance(plan, Plan) and _runs_here(plan):
            time_steps(plan, folder, display)
        draw(folder, plan.measure)
    return folder


def _runs_here(plan: Plan) -> bool:
    """Say whether the runs take place on this machine, so that times measured here are theirs."""
    return plan.cluster is None or plan.cluster.place != SLURM


def _say_estimate(plan: Plan, folder: ResultsFolder, display: Display) -> None:
    """Say how long it will take, if that can be measured."""
    estimate = estimate_in_words(plan, folder)
    if estimate is not None:
        display.say(estimate)


def _run_pending(
    plan: Planned[Any], folder: ResultsFolder, display: Display, runner: Runner
) -> None:
    """Run what the folder lacks: trials of learning rates, then runs with the chosen rates."""
    trials = agreed(_next_trials(plan, folder, display))
    while trials:
        _follow(plan, folder, display, runner.run_cells(trials))
        trials = agreed(_next_trials(plan, folder, display))
    rates = agreed(folder.rates)
    runs = [
        (cell, rates[cell.arm])
        for cell in plan.cells
        if is_compared(cell) and not folder.is_finished(cell.arm, cell.seed)
    ]
    _follow(plan, folder, display, runner.run_cells(agreed(runs)))


def _next_trials(
    plan: Planned[Any], folder: ResultsFolder, display: Display
) -> list[tuple[Cell, float]]:
    """Return the trials to run now; what comes of them may ask for more."""
    added = sum(len(choice.added) for choice in folder.choices.values())
    display.expect(plan.runs + added * plan.config.tuning_seeds)
    return [(cell, cell.lr) for cell in folder.next_trials if cell.lr is not None]


def _follow(
    plan: Planned[Any], folder: ResultsFolder, display: Display, ended: Iterable[Cell]
) -> None:
    """Read each cell as it ends, and rewrite the tables."""
    for cell in ended:
        if plan.reports:
            outcome = folder.take(cell)
            export_tables(folder)
            display.end(f"{cell.name}: {outcome_in_words(outcome, plan.measure)}")


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
