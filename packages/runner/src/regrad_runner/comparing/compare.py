"""The comparison: every arm on every seed, kept run by run."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Protocol

from regrad_runner.addresses import without_secrets
from regrad_runner.comparing.plan import Plan, agreed, make_plan, open_folder
from regrad_runner.diagnostics.effects import FILE as EFFECTS
from regrad_runner.diagnostics.effects import Effect, EffectTrace, keep_effects
from regrad_runner.diagnostics.gradient_quality import FILE, Probe, Quality, keep_qualities
from regrad_runner.errors import DiskError, in_one_line
from regrad_runner.files import append, write_whole
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import draw, merge
from regrad_runner.results.cells import Cell
from regrad_runner.results.folder import (
    Outcome,
    Result,
    ResultsFolder,
    Trial,
    finished_result,
    read_about,
)
from regrad_runner.results.tables import checked
from regrad_runner.settings.arms import Arm
from regrad_runner.signals import tracked
from regrad_runner.tracking.mlflow_ import Run, Tracker, open_tracker
from regrad_runner.training.nonfinite import NonFiniteError, keeping_norms
from regrad_runner.training.run import Point, TrainingRun, name_on_validation
from regrad_runner.workloads import Measure

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
        with comparison.runner() as runner:
            _run_pending(plan, folder, display, runner)
        if plan.reports:
            more = [path for name in (FILE, EFFECTS) if (path := plan.path / name).is_file()]
            for path in [plan.path / "results.csv", *more, *draw(folder, plan.workload.measure)]:
                parent.artifact(path)
        if any(result.status == "failed" for result in folder.results):
            parent.finish("FAILED")
    return folder


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
        display.end(f"{cell.name}: {in_words(outcome, plan.workload.measure)}")


def keep_outcome(folder: ResultsFolder, outcome: Outcome) -> None:
    """Put what came out of a cell into the folder's tables."""
    if outcome.trial is not None:
        folder.add_trial(outcome.trial)
    if outcome.result is not None:
        keep_qualities(folder, [checked(Quality, row) for row in outcome.tables.get(FILE, ())])
        keep_effects(folder, [checked(Effect, row) for row in outcome.tables.get(EFFECTS, ())])
        folder.add(outcome.result, outcome.points)


def in_words(outcome: Outcome, measure: Measure) -> str:
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


def chosen_rates(plan: Plan, trials: Sequence[Trial]) -> dict[str, float]:
    """Return each arm's learning rate: the best mean of its trials, by the validation split at its end."""
    sign = 1 if plan.workload.measure.higher_is_better else -1

    def score(arm: Arm, lr: float) -> float:
        values = [trial.validation for trial in trials if (trial.arm, trial.lr) == (arm.name, lr)]
        return sign * fmean(values) if values and all(map(math.isfinite, values)) else -math.inf

    return {arm.name: max(plan.rates, key=partial(score, arm)) for arm in plan.arms}


class Runner(Protocol):
    """What runs cells: this process one after the other, or several at once."""

    def outcomes(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[tuple[Cell, Outcome]]:
        """Run cells, each with its learning rate, and yield what came out, as they end."""


class Comparison:
    """A comparison under way.

    Args:
        plan: What to do.
        folder: What was done.
        tracker: Where runs are shown.
        parent: The tracked run that stands for the comparison.
        display: Told what is under way.
    """

    def __init__(
        self, plan: Plan, folder: ResultsFolder, tracker: Tracker, parent: Run, display: Display
    ) -> None:
        self.plan, self.folder, self.tracker, self.parent, self.display = (
            plan,
            folder,
            tracker,
            parent,
            display,
        )

    def runner(self) -> AbstractContextManager[Runner]:
        """Return what runs the cells, as many at once as planned."""
        if self.plan.jobs == 1:
            return nullcontext(self)
        from regrad_runner.comparing.workers import Workers  # noqa: PLC0415 - it runs comparisons

        self.tracker.flush()  # the workers find the database made and the comparison's run in it
        return Workers(self.plan, self.parent.id, self.display)

    def outcomes(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[tuple[Cell, Outcome]]:
        """Run cells one after the other; see `Runner`."""
        for cell, lr in todo:
            yield cell, self.outcome(cell, lr=lr)

    def outcome(self, cell: Cell, *, lr: float) -> Outcome:
        """Run a cell and return what came out; a failure is an outcome too."""
        arm = self.plan.arm(cell.arm)
        return self._run(arm, cell, lr=lr) if cell.lr is None else self._try_rate(arm, cell, lr=lr)

    def _run(self, arm: Arm, cell: Cell, *, lr: float) -> Outcome:
        points, qualities, effects = list[Point](), list[Quality](), list[Effect]()
        result = failed_result(arm, cell, lr=lr)
        with (
            self._alone(cell.name) as problems,
            self._tracked(cell.name, arm, seed=cell.seed, lr=lr) as shown,
        ):
            started = time.perf_counter()
            with closing(
                TrainingRun(self.plan.config, self.plan.workload, arm, seed=cell.seed, lr=lr)
            ) as run:
                self._train(run, cell.name, shown, qualities, effects)
                result = finished_result(run, result, started=started)
                self._keep_receipt(run, result, shown)
                points = run.position.points
        if any(isinstance(problem, NonFiniteError) for problem in problems):
            result = replace(result, status="diverged")
        tables = {
            FILE: [asdict(row) for row in qualities],
            EFFECTS: [asdict(row) for row in effects],
        }
        return Outcome(result=result, points=points, tables=tables if points else {})

    def _try_rate(self, arm: Arm, cell: Cell, *, lr: float) -> Outcome:
        """Run a trial; one that fails says that this learning rate is not the one to choose."""
        validation = math.nan
        with (
            self._alone(cell.name),
            self._tracked(cell.name, arm, seed=cell.seed, lr=lr, trial=True) as shown,
            closing(
                TrainingRun(self.plan.config, self.plan.workload, arm, seed=cell.seed, lr=lr)
            ) as run,
        ):
            self._train(run, cell.name, shown)
            validation = run.position.points[-1].value
        return Outcome(trial=Trial(arm=arm.name, lr=lr, seed=cell.seed, validation=validation))

    def _train(
        self,
        run: TrainingRun,
        name: str,
        shown: Run,
        qualities: list[Quality] | None = None,
        effects: list[Effect] | None = None,
    ) -> None:
        """Train to the end; where there are lists, keep effects and, if that was asked for, gradient quality."""
        config, probe, trace = self.plan.config, None, EffectTrace(run)
        if qualities is not None and config.probe_every is not None:
            probe = Probe(run, every=config.probe_every, size=config.probe_size)

        def keep(point: Point) -> None:
            shown.log(point.step, point.as_metrics(self.plan.workload.measure))
            if effects is not None:
                effects.extend(trace.look())

        def end_step(step: int) -> None:
            self.display.step(step)
            quality = probe.finish_step() if probe is not None else None
            if quality is not None and qualities is not None:
                qualities.append(quality)
                shown.log(step, quality.as_metrics())

        self.display.begin(name, steps=run.total_steps)
        folder = partial(self.folder.run_folder, run.arm, run.seed)
        with keeping_norms(folder, shown, writes=self.plan.reports):
            run.train(on_point=keep, on_step=end_step)

    def _tracked(
        self, name: str, arm: Arm, *, trial: bool = False, **params: float
    ) -> AbstractContextManager[Run]:
        change = {"control": arm.control} if arm.control else {}
        about = {
            "arm": arm.name,
            "corrections": " ".join(arm.corrections),
            "trial": trial,
            **params,
            **change,
        }
        return tracked(
            lambda: self.tracker.start(self.plan.experiment, name, about, parent=self.parent)
        )

    def _keep_receipt(self, run: TrainingRun, result: Result, shown: Run) -> None:
        if not self.plan.reports:
            return
        path = self.folder.run_folder(run.arm, result.seed) / "receipt.json"
        write_whole(path, json.dumps(run.receipt(), indent=2) + "\n")
        shown.artifact(path)
        shown.log(result.steps, run.metrics() | {self.plan.workload.measure.name: result.value})

    @contextmanager
    def _alone(self, name: str) -> Iterator[list[Exception]]:
        """Keep a failure inside its run: noted and put into what is yielded, and the next run starts.

        On several processes it ends them all.
        """
        problems: list[Exception] = []
        try:
            yield problems
        except DiskError:  # not the run's own failure, and those that follow would meet it too
            raise
        except Exception as problem:
            if self.plan.processes > 1:
                raise
            problems.append(problem)
            reason = in_one_line(problem)
            self.display.say(without_secrets(f"{name} failed: {type(problem).__name__}: {reason}"))
            told = without_secrets(f"{name}\n{traceback.format_exc()}\n")
            append(self.plan.path / "failures.txt", told)


def failed_result(arm: Arm, cell: Cell, *, lr: float) -> Result:
    """Return the row of a run that did not end."""
    result = Result(arm=arm.name, seed=cell.seed, status="failed", lr=lr, must_beat=arm.must_beat)
    return replace(result, control=arm.control is not None)
