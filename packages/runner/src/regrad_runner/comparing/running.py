"""Runs of a comparison, one after the other, each in a folder of its own.

A run that fails does not end the others.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

from regrad.errors import RegradError

from regrad_runner.addresses import without_secrets
from regrad_runner.comparing.cell_checkpoints import CellCheckpoints, NoCheckpoints
from regrad_runner.comparing.plan import Plan, Planned
from regrad_runner.diagnostics.effects import EffectTrace, keep_effects
from regrad_runner.diagnostics.exits import exit_measures, exit_outcomes, keep_exits
from regrad_runner.diagnostics.gradient_quality import PROBE_CURVES, PROBE_LINE, Probe, keep_quality
from regrad_runner.errors import DiskError, in_one_line
from regrad_runner.files import append
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell
from regrad_runner.results.outcomes import Result, numbers_of
from regrad_runner.results.points import EVALUATION, METRICS, Point, curves_of, keep_point
from regrad_runner.results.run import (
    RECEIPT,
    Line,
    RunLog,
    RunWriter,
    as_json_text,
    begin_run,
    run_path,
    run_values,
)
from regrad_runner.settings.arms import Arm
from regrad_runner.signals import begun, signals_wait
from regrad_runner.training.nonfinite import NonFiniteError, keeping_norms
from regrad_runner.training.outcome import finished_result
from regrad_runner.training.run import TrainingRun


class Runner(Protocol):
    """What runs cells: this process one after the other, or several at once."""

    def run_cells(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[Cell]:
        """Run cells, each with its learning rate, and yield them as they end.

        Their folders say what came out.
        """


class Comparison:
    """A comparison under way.

    Args:
        plan: What to do.
        display: Shows what is under way.
        checkpoint_seconds: Least time between the checkpoints of a run, which goes on from those
            that it finds; None for runs that keep none and start again.
    """

    def __init__(
        self, plan: Plan, display: Display, *, checkpoint_seconds: float | None = None
    ) -> None:
        self.plan = plan
        self.display = display
        self._checkpoint_seconds = checkpoint_seconds

    def run_cells(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[Cell]:
        """Run cells one after the other; see `Runner`."""
        for cell, lr in todo:
            self.run_cell(cell, lr=lr)
            yield cell

    def run_cell(self, cell: Cell, *, lr: float) -> None:
        """Run a cell in its own folder; a failure is an outcome too.

        Args:
            cell: To run.
            lr: Its learning rate.
        """
        arm = self.plan.arm(cell.arm)
        values = values_of(self.plan, cell, lr=lr)
        started = time.perf_counter()
        checkpoints = self._checkpoints_of(cell)
        with (
            self._alone(cell.name),
            begun(lambda: self._begin(values, checkpoints.lines)) as record,
            checkpoints.removed_at_the_end(),
            closing(self._ready_run(arm, cell, lr, checkpoints)) as run,
        ):
            self.display.begin(cell.name, steps=run.total_steps)
            if checkpoints.lines and isinstance(record, RunWriter):
                record.start(checkpoints.lines_until(run.position.step))
            with keeping_norms(record):
                self._train(run, record, checkpoints, with_diagnostics=cell.lr is None)
            if cell.lr is None:
                self._end_run(run, record, started)
            else:
                with signals_wait():
                    validation = run.position.points[-1].value
                    record.end("finished", result={"validation": validation})

    def _checkpoints_of(self, cell: Cell) -> CellCheckpoints | NoCheckpoints:
        if self._checkpoint_seconds is None:
            return NoCheckpoints()
        run_folder = run_path(self.plan.path, cell.arm, cell.seed, cell.lr)
        return CellCheckpoints(run_folder, seconds=self._checkpoint_seconds)

    def _begin(self, values: dict[str, Any], lines: Sequence[Line]) -> RunLog:
        if not self.plan.reports:
            return RunLog()
        return begin_run(self.plan.path, values, lines=lines)

    def _ready_run(
        self, arm: Arm, cell: Cell, lr: float, checkpoints: CellCheckpoints | NoCheckpoints
    ) -> TrainingRun:
        """Return a run at its start, or where an earlier attempt left a checkpoint."""

        def fresh() -> TrainingRun:
            return TrainingRun(self.plan.config, self.plan.workload, arm, seed=cell.seed, lr=lr)

        run = fresh()
        try:
            notes = checkpoints.load_into(run)
        except RegradError as problem:
            self.display.say(f"{cell.name} starts again: {in_one_line(problem)}")
            run.close()
            checkpoints.remove()
            return fresh()
        for note in notes:
            self.display.say(f"{cell.name}: {note}")
        return run

    def _train(
        self,
        run: TrainingRun,
        record: RunLog,
        checkpoints: CellCheckpoints | NoCheckpoints,
        *,
        with_diagnostics: bool,
    ) -> None:
        """Train to the end; keep evaluations, and of a run that is compared effects and probes."""
        config = self.plan.config
        trace = EffectTrace(run)
        trace.look()  # what an earlier attempt saw was kept by it
        probe: Probe | None = None
        if with_diagnostics and config.probe_every is not None:
            probe = Probe(run, every=config.probe_every, size=config.probe_size)

        def keep(point: Point) -> None:
            keep_point(record, point)
            if with_diagnostics:
                keep_effects(record, trace.look())

        def end_step(step: int) -> None:
            self.display.step(step)
            quality = probe.finish_step() if probe is not None else None
            if quality is not None:
                keep_quality(record, quality)
            checkpoints.keep(run)

        run.train(on_point=keep, on_step=end_step)

    def _end_run(self, run: TrainingRun, record: RunLog, started: float) -> None:
        """Look at the test samples, and keep the result and the receipt."""
        result = finished_result(
            run, Result(arm=run.arm.name, seed=run.seed, lr=run.lr), started=started
        )
        measure = self.plan.measure
        record.keep(RECEIPT, as_json_text(run.receipt()))
        exits = exit_outcomes(run)
        keep_exits(record, exits)
        numbers = {**run.metrics(), **exit_measures(exits), measure.name: result.value}
        record.log(METRICS, result.steps, numbers)
        with signals_wait():
            record.end("finished", result=numbers_of(result))

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Note a failure, so that the next run can start.

        On several processes a failure ends them all, but for a run that diverged.
        """
        try:
            yield
        except DiskError:  # not the run's own failure, and those that follow would meet it too
            raise
        except Exception as problem:
            all_met_it = isinstance(problem, NonFiniteError)  # at the same step: all continue alike
            if self.plan.processes > 1 and not all_met_it:
                raise
            reason = in_one_line(problem)
            self.display.say(without_secrets(f"{name} failed: {type(problem).__name__}: {reason}"))
            told = without_secrets(f"{name}\n{traceback.format_exc()}\n")
            append(self.plan.path / "failures.txt", told)


def values_of(plan: Plan, cell: Cell, *, lr: float) -> dict[str, Any]:
    """Return what the record of a run on a workload says before it begins; see `record_values`."""
    curves = {
        EVALUATION: curves_of(plan.measure),
        PROBE_LINE: PROBE_CURVES,
    }
    return record_values(plan, cell, lr=lr, curves=curves)


def record_values(
    plan: Planned[Any], cell: Cell, *, lr: float, curves: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Return what the record of a cell's run says before it begins.

    Args:
        plan: Of the comparison.
        cell: To run.
        lr: Its learning rate.
        curves: What its numbers are called where curves are shown: see `RunRecord`.
    """
    return run_values(
        plan.config,
        plan.arm(cell.arm),
        name=cell.name,
        seed=cell.seed,
        lr=lr,
        trial=cell.lr is not None,
        curves=curves,
    )
