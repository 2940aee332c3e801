"""One run with checkpoints."""

from __future__ import annotations

import json
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from regrad_runner.arms import BASELINE, Arm, parts_of
from regrad_runner.checkpoint import load_latest, save_checkpoint
from regrad_runner.config import TrainConfig
from regrad_runner.launching import check_task, make_accelerator
from regrad_runner.nonfinite import keeping_norms
from regrad_runner.preparation import default_folder, load_data, try_on
from regrad_runner.progress import Display
from regrad_runner.results import Result, ResultsFolder, check_folder, finished_result, start_folder, write_whole
from regrad_runner.stopping import stop_asked, stop_if_asked, stops_after_steps, tracked
from regrad_runner.tracking import Run, Tracker, open_tracker
from regrad_runner.training import Point, TrainingRun, name_on_validation
from regrad_runner.workloads import Workload


@dataclass(frozen=True)
class Plan:
    """A run that was checked and can start.

    Attributes:
        config: Resolved settings.
        workload: What is trained.
        arm: The corrections.
        path: Folder to write.
        reports: Whether this is the process that writes and prints.
    """

    config: TrainConfig
    workload: Workload
    arm: Arm
    path: Path
    reports: bool


def make_plan(config: TrainConfig, *, out: Path | None = None, resume: bool = False) -> Plan:
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
    path = out or default_folder("train-", config.workload)
    if accelerator.is_main_process:
        check_folder(path, config, resume=resume)
    parts = tuple(part for text in config.corrections for part in parts_of(text))
    arm = Arm("+".join(parts) or BASELINE, corrections=parts)
    try_on(arm, config, workload, lr=config.lr or 0.0)
    return Plan(config, workload, arm, path, accelerator.is_main_process)


def train(plan: Plan, display: Display) -> Result:
    """Run to the end, from the latest checkpoint in the folder if there is one.

    Args:
        plan: From `make_plan`.
        display: Told how far it is.

    Returns:
        What came out; the folder holds it too, with curve, receipt and checkpoints.
    """
    tracker = Tracker()
    if plan.reports:
        about = {"kind": "run", "workload": plan.workload.name, "measure": asdict(plan.workload.measure)}
        start_folder(plan.path, plan.config, about)
        tracker = open_tracker(plan.config.tracker, folder=plan.path, uri=plan.config.tracking_uri)
    config = plan.config
    settings = config.model_dump(mode="json")
    with tracker, tracked(lambda: tracker.start(f"regrad {plan.workload.name}", plan.path.name, settings)) as shown:
        run = TrainingRun(config, plan.workload, plan.arm, seed=config.seed, lr=config.lr or 0.0)
        with closing(run):
            return _follow(run, plan, shown, display)


def _follow(run: TrainingRun, plan: Plan, shown: Run, display: Display) -> Result:
    """Train, keep checkpoints on the way and the result at the end."""
    started = time.perf_counter()
    checkpoints = plan.path / "checkpoints"
    every = plan.config.checkpoint_every or run.steps_per_epoch
    latest, notes = load_latest(run, checkpoints)
    for note in notes:
        display.say(note)
    if latest is not None:
        display.say(f"continuing from step {run.position.step} ({latest})")
    validation = name_on_validation(plan.workload.measure)

    def log(point: Point) -> None:
        shown.log(point.step, point.as_metrics(plan.workload.measure))

    for point in run.position.points:  # the curve up to the checkpoint, which an earlier tracked run has
        log(point)

    def keep_point(point: Point) -> None:
        log(point)
        display.note(f"step {point.step}/{run.total_steps}: loss {point.loss:.4f}, {validation} {point.value:.4f}")

    def keep_step(step: int) -> None:
        display.step(step)
        if step % every == 0 or step == run.total_steps or stop_asked():
            save_checkpoint(run, checkpoints, keep=plan.config.keep_checkpoints)
        stop_if_asked()

    display.begin(plan.arm.name, steps=run.total_steps)
    # Several processes hear a signal at different steps and save together or not at all: there it acts at once.
    stops = stops_after_steps() if run.accelerator.num_processes == 1 else nullcontext()
    with stops, keeping_norms(lambda: plan.path, shown, writes=plan.reports):
        run.train(on_point=keep_point, on_step=keep_step)
    result = finished_result(run, Result(arm=plan.arm.name, seed=plan.config.seed, lr=run.lr), started=started)
    if plan.reports:
        ResultsFolder(plan.path).add(result, run.position.points)
        receipt = plan.path / "receipt.json"
        write_whole(receipt, json.dumps(run.receipt(), indent=2) + "\n")
        shown.artifact(receipt)
        shown.log(result.steps, run.metrics() | {plan.workload.measure.name: result.value})
    return result
