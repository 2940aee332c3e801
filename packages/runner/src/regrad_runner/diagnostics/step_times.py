"""The time of a training step with each arm, measured in turns with the baseline's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter
from regrad.correction import Correction
from regrad.meter import Meter

from regrad_runner.files import read_bytes, write_whole
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import RunConfig
from regrad_runner.statistics.intervals import median_interval
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.workload import Workload

STEP_TIMES_FILE = "step_times.json"
TIMED_PAIRS = 30
UNTIMED_PAIRS = 3  # before these: the first steps are slower
FEWEST_PAIRS = 6  # even if steps are slow; fewer have no interval
LONGEST_SECONDS = 3.0  # of an arm, once there are so many
SEED_OF_TIMING = 0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of an arm's step against the baseline's.

    Attributes:
        ratio: Median over pairs of steps, one of each, that followed each other.
        interval: Interval that covers the median with at least 95 %.
        pairs: How many there were.
        seconds: Median time of the arm's steps, fetching their batches included.
        baseline_seconds: Median time of the baseline's.
    """

    ratio: float
    interval: tuple[float, float] | None
    pairs: int
    seconds: float
    baseline_seconds: float


def measure_step_times(
    config: RunConfig,
    workload: Workload,
    baseline: tuple[Arm, float],
    arm: tuple[Arm, float],
) -> StepTime:
    """Train with an arm and with the baseline in turns, and compare the times of their steps.

    Steps are those of runs, without the effect meter, which looks at few. Every second pair begins
    with the baseline. There are 30 pairs, or fewer where they take longer than 3 seconds.

    Args:
        config: Resolved settings.
        workload: What is trained.
        baseline: The arm without corrections, and its learning rate.
        arm: The other arm, and its learning rate.

    Raises:
        ValueError: If a run cannot be made.
        RuntimeError: If it cannot be trained, for example when memory runs out.
    """
    longer = _with_enough_steps(config, workload)
    with (
        closing(_quiet_run(longer, workload, *baseline)) as plain,
        closing(_quiet_run(longer, workload, *arm)) as corrected,
    ):
        times = _times_in_turns(corrected, plain)
    ratios = [one / other for one, other in times]
    return StepTime(
        ratio=median(ratios),
        interval=median_interval(ratios),
        pairs=len(times),
        seconds=median(one for one, _ in times),
        baseline_seconds=median(other for _, other in times),
    )


def keep_step_times(path: Path, times: Mapping[str, StepTime]) -> None:
    """Write what was measured into a comparison's folder.

    Args:
        path: The folder.
        times: By arm.

    Raises:
        DiskError: If it cannot be written to disk.
    """
    content = {arm: asdict(found) for arm, found in times.items()}
    write_whole(path / STEP_TIMES_FILE, json.dumps(content, indent=2) + "\n")


def kept_step_times(path: Path) -> dict[str, StepTime]:
    """Return what was measured, by arm; nothing if nothing was.

    Raises:
        ValueError: If the file is damaged.
    """
    file = path / STEP_TIMES_FILE
    if not os.path.lexists(file):
        return {}
    try:
        return TypeAdapter(dict[str, StepTime]).validate_json(read_bytes(file), strict=True)
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(
            f"'{file}' must hold times per step as compare wrote them, got something else: "
            f"{type(problem).__name__}; remove it: compare --resume measures again"
        ) from None


def why_not_measured(about: Mapping[str, Any]) -> str:
    """Say why a comparison's folder holds no times per step.

    Args:
        about: What the folder says about itself.
    """
    if about.get("samples") == "":  # only a script does not say what its samples are
        return "the runs were those of a script, whose steps cannot be interleaved"
    if about.get("job_array"):
        return "the runs were jobs of an array, and nothing else was run"
    if about.get("processes", 1) != 1:
        return "the runs were on several processes"
    return "they were not measured"


def silence_meter(run: TrainingRun) -> None:
    """Take the effect meter off a run: measuring is not part of a correction's cost."""
    engine = run.attachment.engine
    engine.registry.unregister(engine.meter)
    engine.meter = _Silent()


def clock_of(run: TrainingRun) -> Callable[[], float]:
    """Return the clock that suits a run.

    On a device it waits until all is computed. On one thread of a CPU it is the time of this
    thread, from which nothing else takes anything: other processes, or one that reports meanwhile.
    """
    if run.accelerator.device.type != "cpu":
        return _device_time
    if torch.get_num_threads() == 1 and run.config.workers == 0:
        return time.thread_time
    return time.perf_counter


class _Silent(Meter):
    """A meter that never looks."""

    def due(self, correction: Correction, index: int) -> bool:
        """Return False."""
        return False

    def warn_if_idle(self, correction: Correction, index: int) -> None:
        """Say nothing."""


def _with_enough_steps(config: RunConfig, workload: Workload) -> RunConfig:
    """Return settings with as many epochs as the measurement needs, or as there are."""
    steps_per_epoch = len(workload.train) // int(config.batch_size or 1)
    needed = -(-(UNTIMED_PAIRS + TIMED_PAIRS) // max(1, steps_per_epoch))
    return config.model_copy(update={"epochs": max(needed, int(config.epochs or 1))})


def _quiet_run(config: RunConfig, workload: Workload, arm: Arm, lr: float) -> TrainingRun:
    run = TrainingRun(config, workload, arm, seed=SEED_OF_TIMING, lr=lr)
    silence_meter(run)
    return run


def _times_in_turns(run: TrainingRun, other: TrainingRun) -> list[tuple[float, float]]:
    """Return the seconds of the steps of two runs, in pairs."""
    steps = run.steps()
    other_steps = other.steps()
    clock = clock_of(run)
    for _ in range(UNTIMED_PAIRS):
        next(steps)
        next(other_steps)
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < TIMED_PAIRS and not _is_long_enough(times, began):
        if len(times) % 2 == 0:
            seconds = _time_of_step(steps, clock)
            other_seconds = _time_of_step(other_steps, clock)
        else:
            other_seconds = _time_of_step(other_steps, clock)
            seconds = _time_of_step(steps, clock)
        times.append((seconds, other_seconds))
    return times


def _is_long_enough(times: list[tuple[float, float]], began: float) -> bool:
    return len(times) >= FEWEST_PAIRS and time.perf_counter() - began > LONGEST_SECONDS


def _time_of_step(steps: Iterator[int], clock: Callable[[], float]) -> float:
    began = clock()
    next(steps)
    return clock() - began


def _device_time() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()
