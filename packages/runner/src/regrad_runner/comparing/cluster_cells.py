"""Runs of a comparison as jobs of a queue: submitted, waited for, repeated when they were lost."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from regrad.errors import RegradError

from regrad_runner.comparing.cluster_job import VISIBLE_DEVICES, CellJob, CellTask
from regrad_runner.comparing.plan import Plan, Planned
from regrad_runner.comparing.queues import (
    LONGEST_ARRAY,
    JobQueue,
    last_line_of,
    queue_of,
)
from regrad_runner.comparing.running import values_of
from regrad_runner.comparing.script_cells import script_values
from regrad_runner.comparing.script_plan import ScriptPlan
from regrad_runner.files import append, make_folder, read_regular_file
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell
from regrad_runner.results.run import ENDED, RECORD, end_abandoned, read_record
from regrad_runner.settings.cluster import LOCAL, SLURM, Cluster

JOBS_FOLDER = "jobs"
CELLS_OF_JOBS = "cells.tsv"
LARGEST_LIST = 2**26
JOB_NUMBER = re.compile(r"\d+(_\d+)?")
MOST_ATTEMPTS = 3
SECONDS_BETWEEN_CHECKPOINTS = 300.0
# Why a lost job is not submitted again: it would be lost again, or somebody ended it.
NOT_REPEATED = {
    "CANCELLED": "its job was cancelled",
    "OUT_OF_MEMORY": "its job ran out of memory; ask for more, such as --slurm mem=32G",
}


def on_cluster(plan: Planned[Any], cluster: Cluster | None) -> Planned[Any]:
    """Return a plan whose runs are jobs of a queue.

    Args:
        plan: Checked.
        cluster: The queue; None leaves the plan as it is.

    Raises:
        ValueError: If its runs cannot be jobs there.
    """
    if cluster is None:
        return plan
    if plan.processes > 1:
        raise ValueError(
            f"--on {cluster.place} must be started by one process, got {plan.processes}; "
            "leave out torchrun or accelerate launch"
        )
    if isinstance(plan, ScriptPlan):
        is_file = plan.config.tracking_uri is None or plan.config.tracking_uri.startswith("sqlite")
        if cluster.place == SLURM and plan.config.source.kind == "mlflow" and is_file:
            raise ValueError(
                "measure must not come from a database file that several nodes write, got "
                f"{plan.config.measure!r}; name an MLflow server with --tracking-uri"
            )
        return replace(plan, cluster=cluster)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be of a workload or a script, got {type(plan).__name__}")
    return replace(plan, cluster=cluster)


@dataclass
class Submitted:
    """A cell whose job is in the queue.

    Attributes:
        task: What it runs.
        job: Of submitit.
        earlier: Id of the attempt that the run's folder held before; nothing if it held none.
        attempt: How often it was submitted.
        over_since: When the job was seen to be over whose run has not ended; None before that.
    """

    task: CellTask
    job: Any
    earlier: str
    attempt: int
    over_since: float | None = None


class ClusterCells:
    """Runs cells as jobs, as a context manager: after an error it cancels them.

    The jobs write their runs' folders and nothing else; this process reads how they ended.

    Args:
        plan: Of the comparison; its folder is there.
        cluster: Where the jobs go.
        display: Shows what is under way.
    """

    def __init__(self, plan: Planned[Any], cluster: Cluster, display: Display) -> None:
        self._plan = plan
        self._display = display
        self._folder = make_folder(plan.path.absolute(), JOBS_FOLDER)
        self._queue: JobQueue = queue_of(
            cluster, self._folder, jobs=plan.jobs, repeats_timeouts=isinstance(plan, Plan)
        )
        self._place = cluster.place
        self._check_earlier_jobs()
        self._work = CellJob(
            folder=plan.path.absolute(),
            checkpoint_seconds=SECONDS_BETWEEN_CHECKPOINTS,
            visible_devices=os.environ.get(VISIBLE_DEVICES),
            shares_devices=cluster.place == LOCAL,
        )
        self._under_way: list[Submitted] = []
        self._numbers = count()

    def run_cells(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[Cell]:
        """Run cells at the same time; see `running.Runner`."""
        waiting = deque((cell, lr, 1) for cell, lr in todo)
        while waiting or self._under_way:
            self._submit(waiting)
            ended = self._ended_jobs()
            if not ended:
                time.sleep(self._queue.seconds)
            for submitted in ended:
                self._under_way.remove(submitted)
                cell = submitted.task.cell
                why = self._why_lost(submitted)
                if why is None:
                    yield cell
                elif self._is_repeated(submitted, why):
                    waiting.append((cell, submitted.task.lr, submitted.attempt + 1))
                else:
                    self._bury(submitted, why)
                    yield cell

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._under_way:
            self._queue.cancel([submitted.job for submitted in self._under_way])

    def _check_earlier_jobs(self) -> None:
        """Raise a `RegradError` if jobs of an earlier command are in the queue: they would run too.

        It was killed, or could not cancel them.
        """
        there = self._queue.still_there(_jobs_in(self._folder / CELLS_OF_JOBS, self._place))
        if there:
            arrays = sorted({number.partition("_")[0] for number in there})
            raise RegradError(
                f"jobs of an earlier command must have ended, got {len(there)} in the queue, such "
                f"as {min(there)}; wait for them, or end them: scancel {' '.join(arrays)}"
            )

    def _submit(self, waiting: deque[tuple[Cell, float, int]]) -> None:
        """Submit as many cells as the queue takes now."""
        room = self._room()
        if not waiting or room == 0:
            return
        taken = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        tasks = [CellTask(cell, lr, next(self._numbers)) for cell, lr, _ in taken]
        earlier = [_attempt_in(self._run_folder(cell)) for cell, _, _ in taken]
        jobs = self._queue.submit(self._work, tasks)
        lines = []
        for task, job, before, (_, _, attempt) in zip(tasks, jobs, earlier, taken, strict=True):
            self._under_way.append(Submitted(task, job, before, attempt))
            words = (self._place, str(job.job_id), task.cell.name, job.paths.stderr.name)
            lines.append("\t".join(words) + "\n")
        append(self._folder / CELLS_OF_JOBS, "".join(lines))
        self._show()

    def _room(self) -> int:
        """Return how many jobs may be submitted now.

        SLURM limits the jobs of one array alone, so there is one array at a time.
        """
        if self._queue.at_once is not None:
            return self._queue.at_once - len(self._under_way)
        return 0 if self._under_way else LONGEST_ARRAY

    def _ended_jobs(self) -> list[Submitted]:
        """Return the cells that ended, and those whose job is over and left no result."""
        over = {id(job) for job in self._queue.over([one.job for one in self._under_way])}
        ended = []
        for submitted in self._under_way:
            if id(submitted.job) not in over:
                continue
            if submitted.over_since is None:
                submitted.over_since = time.monotonic()
            waited = time.monotonic() - submitted.over_since
            if self._has_ended(submitted) or waited >= self._queue.patience:
                ended.append(submitted)
        if ended:
            self._show()
        return ended

    def _has_ended(self, submitted: Submitted) -> bool:
        """Say whether the run in a cell's folder ended, and is of this job."""
        folder = self._run_folder(submitted.task.cell)
        if not os.path.lexists(folder / RECORD):
            return False
        record = read_record(folder)
        if record.status == "killed" or record.status not in ENDED:
            return False
        return record.status != "failed" or record.id != submitted.earlier

    def _why_lost(self, submitted: Submitted) -> str | None:
        """Return why a job left no result; None if the run ended."""
        if self._has_ended(submitted):
            return None
        state = self._queue.ending(submitted.job)
        if state in NOT_REPEATED:
            return NOT_REPEATED[state]
        number = submitted.job.job_id
        if submitted.job.paths.result_pickle.is_file():
            said = last_line_of(submitted.job.paths.stderr)
            return f"job {number} failed: {said or 'it said nothing'}"
        return f"job {number} was lost ({state})" if state else f"job {number} was lost"

    def _is_repeated(self, submitted: Submitted, why: str) -> bool:
        """Say whether a lost job is submitted again, and tell the user."""
        failed_by_itself = submitted.job.paths.result_pickle.is_file()
        if failed_by_itself or why in NOT_REPEATED.values():
            return False
        if submitted.attempt == MOST_ATTEMPTS:
            return False
        self._display.say(f"{submitted.task.cell.name}: {why}; submitted again")
        return True

    def _bury(self, submitted: Submitted, why: str) -> None:
        """Record that a cell failed whose job left no result."""
        cell = submitted.task.cell
        log = submitted.job.paths.stderr
        self._display.say(f"{cell.name} failed: {why}; its log is {log}")
        values = _record_values(self._plan, cell, submitted.task.lr)
        end_abandoned(self._plan.path, values, status="failed", error=why)

    def _run_folder(self, cell: Cell) -> Path:
        return self._plan.path.joinpath(*cell.folder_names)

    def _show(self) -> None:
        self._display.begin(f"{len(self._under_way)} {self._queue.name}", steps=None)


def _jobs_in(file: Path, place: str) -> list[str]:
    """Return the numbers of the jobs that were submitted for a folder, if they are known."""
    try:
        text = read_regular_file(file, largest=LARGEST_LIST).decode(errors="replace")
    except OSError:
        return []
    numbers = []
    for line in text.splitlines():
        words = line.split("\t")
        if len(words) > 1 and words[0] == place and JOB_NUMBER.fullmatch(words[1]):
            numbers.append(words[1])
    return numbers


def _attempt_in(run_folder: Path) -> str:
    """Return the id of the attempt in a run's folder; nothing if there is none."""
    if not os.path.lexists(run_folder / RECORD):
        return ""
    return read_record(run_folder).id


def _record_values(plan: Planned[Any], cell: Cell, lr: float) -> dict[str, Any]:
    """Return what the record of a cell's run says before it begins."""
    if isinstance(plan, Plan):
        return values_of(plan, cell, lr=lr)
    if isinstance(plan, ScriptPlan):
        return script_values(plan, cell, lr=lr)
    raise TypeError(f"plan must be of a workload or a script, got {type(plan).__name__}")
