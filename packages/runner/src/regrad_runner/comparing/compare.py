"""The comparison: every arm on every seed, kept run by run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from regrad_runner.comparing.plan import Plan, agreed, make_plan, open_folder
from regrad_runner.comparing.rates import chosen_rates
from regrad_runner.comparing.running import Comparison, Runner
from regrad_runner.comparing.workers import Workers
from regrad_runner.diagnostics.effects import EFFECTS_FILE, Effect, keep_effects
from regrad_runner.diagnostics.gradient_quality import QUALITY_FILE, Quality, keep_qualities
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import draw, merge
from regrad_runner.results.about import read_about
from regrad_runner.results.cells import Cell
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Outcome
from regrad_runner.results.tables import checked
from regrad_runner.tracking.mlflow_ import Tracker, open_tracker, tracked
from regrad_runner.workloads.workload import Measure, name_on_validation

__all__ = ["Comparison", "Plan", "Runner", "compare", "make_plan"]
TRACKED = "tracked"  # the run, by our id, under which job arrays show theirs


def compare(plan: Plan, display: Display) -> ResultsFolder:
    """Run what is not finished yet; after every run the folder holds it.

    A run that fails is kept as failed and the others go on. On several processes each run is data-parallel, the
    first process writes, and a failure ends them all.

    Args:
        plan: From `make_plan`.
        display: Told what is under way.

    Returns:
        The folder with every run.
    """
    tracker, folder = Tracker(), ResultsFolder(plan.path)
    if plan.reports:
        known = read_about(plan.path)
        folder = merge(open_folder(plan, **{key: known[key] for key in (TRACKED,) if key in known}))
        tracker = open_tracker(plan.config.tracker, folder=plan.path, uri=plan.config.tracking_uri)
    settings = plan.config.model_dump(mode="json")
    with (
        tracker,
        tracked(lambda: tracker.start(plan.experiment, plan.path.name, settings)) as parent,
    ):
        comparison = Comparison(plan, folder, tracker, parent, display)
        display.skip(
            len(folder.trials) + sum(result.status != "failed" for result in folder.results)
        )
        with _runner(comparison) as runner:
            _run_pending(plan, folder, display, runner)
        if plan.reports:
            more = [
                path
                for name in (QUALITY_FILE, EFFECTS_FILE)
                if (path := plan.path / name).is_file()
            ]
            for path in [plan.path / "results.csv", *more, *draw(folder, plan.workload.measure)]:
                parent.artifact(path)
        if any(result.status == "failed" for result in folder.results):
            parent.finish("FAILED")
    return folder


def _runner(comparison: Comparison) -> AbstractContextManager[Runner]:
    """Return what runs the cells, as many at once as planned."""
    if comparison.plan.jobs == 1:
        return nullcontext(comparison)
    # the workers find the database made and the comparison's run in it
    comparison.tracker.flush()
    return Workers(comparison.plan, comparison.parent.id, comparison.display)


def _run_pending(plan: Plan, folder: ResultsFolder, display: Display, runner: Runner) -> None:
    """Run what the folder does not have: the trials of learning rates, and then the runs with the chosen ones."""
    trials = [
        (cell, cell.lr) for cell in plan.cells if cell.lr is not None and not folder.holds(cell)
    ]
    _keep_all(plan, folder, display, runner.outcomes(agreed(trials)))
    rates = agreed(chosen_rates(plan, folder.trials))
    runs = [
        (c, rates[c.arm])
        for c in plan.cells
        if c.lr is None and not folder.is_finished(c.arm, c.seed)
    ]
    _keep_all(plan, folder, display, runner.outcomes(agreed(runs)))


def _keep_all(
    plan: Plan, folder: ResultsFolder, display: Display, outcomes: Iterable[tuple[Cell, Outcome]]
) -> None:
    for cell, outcome in outcomes:
        if plan.reports:
            keep_outcome(folder, outcome)
        display.end(f"{cell.name}: {outcome_in_words(outcome, plan.workload.measure)}")


def keep_outcome(folder: ResultsFolder, outcome: Outcome) -> None:
    """Put what came out of a cell into the folder's tables."""
    if outcome.trial is not None:
        folder.add_trial(outcome.trial)
    if outcome.result is not None:
        keep_qualities(
            folder, [checked(Quality, row) for row in outcome.tables.get(QUALITY_FILE, ())]
        )
        keep_effects(folder, [checked(Effect, row) for row in outcome.tables.get(EFFECTS_FILE, ())])
        folder.add(outcome.result, outcome.points)


def outcome_in_words(outcome: Outcome, measure: Measure) -> str:
    """Say what came out of a cell."""
    result, trial = outcome.result, outcome.trial
    if trial is not None:
        return f"{name_on_validation(measure)} {measure.written(trial.validation)}"
    if result is None or result.value is None:
        return "failed" if result is None else result.status
    words = [f"{measure.name} {measure.written(result.value)}"]
    if measure.target is not None:
        reached = (
            "missed" if result.steps_to_target is None else f"after {result.steps_to_target} steps"
        )
        words.append(f"{measure.target:g} {reached}")
    return ", ".join([*words, f"{result.seconds:.1f} s"])
