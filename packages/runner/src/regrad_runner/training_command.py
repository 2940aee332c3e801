"""One run with checkpoints."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from regrad_runner.checkpoints.checkpoint import load_latest, save_checkpoint
from regrad_runner.checkpoints.engine import check_engine_path
from regrad_runner.diagnostics.exits import exit_measures, exit_outcomes, keep_exits
from regrad_runner.errors import checking_input
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import export_tables
from regrad_runner.results.folder import ResultsFolder, check_folder, start_folder
from regrad_runner.results.outcomes import Result, numbers_of
from regrad_runner.results.points import (
    EVALUATION,
    METRICS,
    Point,
    curves_of,
    keep_point,
    lines_of,
)
from regrad_runner.results.run import (
    RECEIPT,
    RunLog,
    as_json_text,
    begin_run,
    read_points,
    run_path,
    run_values,
)
from regrad_runner.results.view import tracking
from regrad_runner.settings.arms import BASELINE, Arm, parts_of
from regrad_runner.settings.config import TrainConfig
from regrad_runner.settings.environment import environment_in_words
from regrad_runner.signals import asked_to_stop, begun, signals_wait, stop, stops_after_steps
from regrad_runner.training.nonfinite import keeping_norms
from regrad_runner.training.outcome import finished_result
from regrad_runner.training.preparation import default_folder, load_data, try_on
from regrad_runner.training.processes import check_task, make_accelerator, on_first_process
from regrad_runner.training.run import TrainingRun
from regrad_runner.training.stepping import is_engine
from regrad_runner.workloads.workload import Workload, name_on_validation


@dataclass(frozen=True)
class TrainingPlan:
    """A run that was checked and can start.

    Attributes:
        config: Resolved settings.
        workload: What is trained.
        arm: The corrections.
        path: Folder to write.
        reports: Whether this is the process that writes and prints.
        is_finished: Whether the folder holds this run with its result.
    """

    config: TrainConfig
    workload: Workload
    arm: Arm
    path: Path
    reports: bool
    is_finished: bool = False


def make_training_plan(
    config: TrainConfig, *, out: Path | None = None, resume: bool = False
) -> TrainingPlan:
    """Check everything that can be checked before the first step. Writes nothing.

    Args:
        config: Settings; what is None is filled in from the workload.
        out: Folder to write; None for a new one in the current folder.
        resume: Whether to continue the run that is in `out`.

    Raises:
        ValueError: If anything is unknown, missing or does not fit.
        RegradError: If the corrections cannot work together, or not on this model and optimizer.
    """
    workload, config = load_data(config)
    check_task()
    accelerator = make_accelerator(config)
    path = out or default_folder("train-", workload.name)
    if is_engine(accelerator):
        check_engine_path(path)

    def look_into_folder() -> bool:
        check_folder(path, config, resume=resume)
        return resume and _holds_result(path)

    is_finished = on_first_process(accelerator, look_into_folder)
    parts = tuple(chain.from_iterable(parts_of(text) for text in config.corrections))
    arm = Arm("+".join(parts) or BASELINE, corrections=parts)
    try_on(arm, config, workload, lr=config.lr or 0.0)
    return TrainingPlan(config, workload, arm, path, accelerator.is_main_process, is_finished)


def _holds_result(path: Path) -> bool:
    """Say whether the run in a folder finished."""
    return any(result.status == "finished" for result in ResultsFolder(path).results)


def train(plan: TrainingPlan, display: Display) -> Result:
    """Run to the end, from the latest checkpoint in the folder if there is one.

    Args:
        plan: From `make_training_plan`.
        display: Told how far it is.

    Returns:
        What came out; the folder holds it too, with curve, receipt and checkpoints.

    Raises:
        BadInput: If there are checkpoints and none can be continued from; nothing is written.
    """
    config = plan.config
    for line in environment_in_words(config):
        display.say(line)
    run = TrainingRun(config, plan.workload, plan.arm, seed=config.seed, lr=config.lr or 0.0)
    with ExitStack() as stack:
        stack.enter_context(closing(run))
        with checking_input():  # a refused checkpoint leaves the folder unchanged
            latest, notes = load_latest(run, plan.path / "checkpoints")
        for note in notes:
            display.say(note)
        if latest is not None:
            display.say(f"continuing from step {run.position.step} ({latest})")
        if plan.reports:
            _start_folder(plan)
            stack.enter_context(
                tracking(config.tracker, plan.path, config.tracking_uri, say=display.say)
            )
        record = stack.enter_context(begun(lambda: _begin(run, plan)))
        return _follow(run, plan, record, display)


def _start_folder(plan: TrainingPlan) -> None:
    about = {
        "kind": "run",
        "workload": plan.workload.name,
        "measure": asdict(plan.workload.measure),
    }
    start_folder(plan.path, plan.config, about)


def _begin(run: TrainingRun, plan: TrainingPlan) -> RunLog:
    """Begin the record of the run, with the curve up to its checkpoint; the rest follows again."""
    if not plan.reports:
        return RunLog()
    times: dict[int, int] = {}
    with suppress(ValueError):  # the checkpoint has the curve itself
        earlier = read_points(run_path(plan.path, plan.arm.name, run.seed))
        times = {line.step: line.time for line in earlier if line.kind == EVALUATION}
    values = run_values(
        plan.config,
        plan.arm,
        name=plan.path.resolve().name,
        seed=run.seed,
        lr=run.lr,
        curves={EVALUATION: curves_of(plan.workload.measure)},
    )
    return begin_run(plan.path, values, lines=lines_of(run.position.points, times))


def _follow(run: TrainingRun, plan: TrainingPlan, record: RunLog, display: Display) -> Result:
    """Train, keep checkpoints on the way and the result at the end."""
    started = time.perf_counter()
    checkpoints = plan.path / "checkpoints"
    every = plan.config.checkpoint_every or run.steps_per_epoch
    measure = plan.workload.measure
    validation = name_on_validation(measure)

    def keep(point: Point) -> None:
        keep_point(record, point)
        display.note(
            f"step {point.step}/{run.total_steps}: loss {point.loss:.4f}, "
            f"{validation} {measure.written(point.value)}"
        )

    def keep_step(step: int) -> None:
        display.step(step)
        signal = asked_to_stop()
        if step % every == 0 or step == run.total_steps or signal:
            save_checkpoint(run, checkpoints, keep=plan.config.keep_checkpoints)
        stop(signal)

    display.begin(plan.arm.name, steps=run.total_steps)
    with stops_after_steps(run.largest), keeping_norms(record):
        run.train(on_point=keep, on_step=keep_step)
    result = finished_result(
        run, Result(arm=plan.arm.name, seed=plan.config.seed, lr=run.lr), started=started
    )
    record.keep(RECEIPT, as_json_text(run.receipt()))
    exits = exit_outcomes(run)
    keep_exits(record, exits)
    numbers = {**run.metrics(), **exit_measures(exits), measure.name: result.value}
    record.log(METRICS, result.steps, numbers)
    with signals_wait():
        record.end("finished", result=numbers_of(result))
    if plan.reports:
        export_tables(ResultsFolder(plan.path))
    return result
