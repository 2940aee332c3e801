"""Runs of a comparison, one after the other; one that fails does not end the others."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Protocol

from regrad_runner.addresses import without_secrets
from regrad_runner.comparing.plan import Plan
from regrad_runner.diagnostics.effects import EFFECTS_FILE, Effect, EffectTrace
from regrad_runner.diagnostics.gradient_quality import QUALITY_FILE, Probe, Quality
from regrad_runner.errors import DiskError, in_one_line
from regrad_runner.files import append, write_whole
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Outcome, Result, Trial
from regrad_runner.results.points import Point
from regrad_runner.settings.arms import Arm
from regrad_runner.tracking.mlflow_ import Run, Tracker, tracked
from regrad_runner.training.nonfinite import NonFiniteError, keeping_norms
from regrad_runner.training.outcome import finished_result
from regrad_runner.training.run import TrainingRun


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
            QUALITY_FILE: [asdict(row) for row in qualities],
            EFFECTS_FILE: [asdict(row) for row in effects],
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
        with keeping_norms(folder, shown.artifact, writes=self.plan.reports):
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
