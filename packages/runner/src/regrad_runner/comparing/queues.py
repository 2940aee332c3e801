"""Queues that run jobs, through submitit: processes on this machine, or SLURM."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
from regrad.errors import RegradError

from regrad_runner.comparing.workers import ignoring_interrupts
from regrad_runner.files import read_regular_file
from regrad_runner.settings.cluster import SLURM, TIME_LIMIT, Cluster

EXTRA = "pip install regrad-runner[slurm]"
# What is called by name; submitit calls srun in the job and looks for it here.
PROGRAMS = ("sbatch", "srun", "squeue", "scancel")
LONGEST_ARRAY = 1000  # SLURM's own default for MaxArraySize is 1001
LONGEST_LOG = 2**26
LONGEST_SAID = 300  # characters of what a program said
MINUTES_PER_LOCAL_JOB = 60 * 24 * 365  # submitit's own is two minutes
SECONDS_FOR_A_PROGRAM = 60.0
SECONDS_TO_END_JOBS = 15.0
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_BETWEEN_LOOKS_HERE = 0.2
SECONDS_BETWEEN_QUEUES = 30.0
# A shared file system shows what another node wrote only after some time.
SECONDS_FOR_FILES = 60.0
TIMEOUTS_OF_A_JOB = 20  # after which submitit gives up; each goes on from a checkpoint
NOT_KNOWN = "Invalid job id"

Work = Callable[[Any], None]


class JobQueue(Protocol):
    """What takes jobs and knows which of them are over.

    Attributes:
        name: As printed.
        at_once: How many jobs it is given at most; None for all, in arrays of a limited length.
        seconds: To wait between two looks at it.
        patience: Seconds after the end of a job within which its files may still be missing.
    """

    name: str
    at_once: int | None
    seconds: float
    patience: float

    def still_there(self, numbers: Iterable[str]) -> set[str]:
        """Return those of some jobs, by number, that an earlier command left in the queue."""

    def submit(self, work: Work, tasks: Sequence[Any]) -> list[Any]:
        """Submit a job for each task, and return them."""

    def over(self, jobs: Sequence[Any]) -> list[Any]:
        """Return those of the jobs that are not in the queue any more."""

    def ending(self, job: Any) -> str:
        """Return how a job ended that left nothing behind, in a word; nothing if it is unknown."""

    def cancel(self, jobs: Sequence[Any]) -> None:
        """Take jobs off the queue, or end them."""


def check_queue(cluster: Cluster) -> None:
    """Raise a `ValueError` unless jobs can be submitted from here."""
    if importlib.util.find_spec("submitit") is None:
        raise ValueError(f"--on {cluster.place} must find submitit, got none; {EXTRA}")
    if not hasattr(signal, "SIGUSR2"):
        raise ValueError(
            f"--on {cluster.place} must run where there is the signal SIGUSR2, got "
            f"{sys.platform}; leave it out, or use Linux or macOS"
        )
    if cluster.place != SLURM:
        return
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"--on slurm must find {', '.join(PROGRAMS)}, got no {missing[0]!r} in the PATH; "
            "run this where jobs are submitted, or use --on local"
        )


def queue_of(cluster: Cluster, folder: Path, *, jobs: int, repeats_timeouts: bool) -> JobQueue:
    """Return the queue that a cluster means.

    Args:
        cluster: Checked by `check_queue`.
        folder: For scripts, pickles and logs of the jobs; there.
        jobs: How many processes there may be on this machine at once.
        repeats_timeouts: Whether a job that SLURM ends for its time limit goes on in another.
    """
    if cluster.place == SLURM:
        return SlurmJobs(cluster, folder, repeats_timeouts=repeats_timeouts)
    return LocalJobs(folder, at_once=jobs)


class LocalJobs:
    """Jobs as processes on this machine, by submitit's local executor.

    Args:
        folder: As for `queue_of`.
        at_once: How many there may be.
    """

    name = "local jobs"
    seconds = SECONDS_BETWEEN_LOOKS_HERE
    patience = 0.0

    def __init__(self, folder: Path, *, at_once: int) -> None:
        import submitit  # noqa: PLC0415 - an extra

        self.at_once: int | None = at_once
        self._executor = submitit.LocalExecutor(folder)
        self._executor.update_parameters(timeout_min=MINUTES_PER_LOCAL_JOB)

    def still_there(self, numbers: Iterable[str]) -> set[str]:
        """Return nothing: a run that a process still writes is found by its lock."""
        del numbers
        return set()

    def submit(self, work: Work, tasks: Sequence[Any]) -> list[Any]:
        """Start a process for each task; see `JobQueue`."""
        with ignoring_interrupts():  # what watches a job would answer Ctrl-C with a traceback
            return list(self._executor.map_array(work, tasks))

    def over(self, jobs: Sequence[Any]) -> list[Any]:
        """Return the jobs whose process has ended."""
        return [job for job in jobs if job.done()]

    def ending(self, job: Any) -> str:
        """Return nothing: the process that watched the job ended well."""
        del job
        return ""

    def cancel(self, jobs: Sequence[Any]) -> None:
        """End the processes; what watches each of them then ends too."""
        working: list[psutil.Process] = []
        for job in jobs:
            with suppress(psutil.Error):
                working += psutil.Process(int(job.job_id)).children()
        for process in working:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(working, timeout=SECONDS_TO_END_JOBS)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()


class SlurmJobs:
    """Jobs of SLURM, many in one array.

    Whether a job is over is asked of squeue, which every cluster has: sacct needs a database.

    Args:
        cluster: What to ask SLURM for.
        folder: As for `queue_of`.
        repeats_timeouts: As for `queue_of`.
    """

    name = "jobs of SLURM"
    at_once: int | None = None
    seconds = SECONDS_BETWEEN_LOOKS
    patience = SECONDS_FOR_FILES

    def __init__(self, cluster: Cluster, folder: Path, *, repeats_timeouts: bool) -> None:
        import submitit  # noqa: PLC0415 - an extra

        # It warns on the terminal, at every look, where sacct has no database.
        logging.getLogger("submitit").setLevel(logging.CRITICAL)
        timeouts = TIMEOUTS_OF_A_JOB if repeats_timeouts else 0
        self._executor = submitit.SlurmExecutor(folder, max_num_timeout=timeouts)
        self._executor.update_parameters(**slurm_parameters(cluster))
        self._folder = folder
        self._looked_at_queue = float("-inf")
        self._gone: set[str] = set()

    def still_there(self, numbers: Iterable[str]) -> set[str]:
        """Return the jobs that squeue lists."""
        return still_in_queue(numbers)

    def submit(self, work: Work, tasks: Sequence[Any]) -> list[Any]:
        """Submit the tasks as a job array; see `JobQueue`.

        Raises:
            RegradError: If sbatch refuses; says what it said.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError  # noqa: PLC0415

        said = io.StringIO()
        try:
            with redirect_stderr(said):  # where submitit prints it as well
                return list(self._executor.map_array(work, tasks))
        except (FailedJobError, FailedSubmissionError, OSError) as problem:
            reason = " ".join(str(problem).split()) or type(problem).__name__
            raise RegradError(
                f"sbatch must take the jobs, got {reason[:LONGEST_SAID]!r}; "
                "correct --slurm, and continue with --resume"
            ) from problem

    def over(self, jobs: Sequence[Any]) -> list[Any]:
        """Return the jobs that left a result, and those that squeue does not list any more."""
        names = self._names()
        ended = [job for job in jobs if job.paths.result_pickle.name in names]
        left = [job for job in jobs if job.paths.result_pickle.name not in names]
        now = time.monotonic()
        if left and now - self._looked_at_queue >= SECONDS_BETWEEN_QUEUES:
            self._looked_at_queue = now
            self._gone |= not_in_queue(job.job_id for job in left)
        return [*ended, *(job for job in left if job.job_id in self._gone)]

    def _names(self) -> set[str]:
        """Return what is in the folder: one look for all jobs, which may fail on a network."""
        try:
            return set(os.listdir(self._folder))  # noqa: PTH208 - names alone
        except OSError:
            return set()

    def ending(self, job: Any) -> str:
        """Return the state in which SLURM's records hold a job, such as NODE_FAIL."""
        try:
            state = str(job.get_info(mode="force").get("State", ""))
        except Exception:  # noqa: BLE001 - submitit promises nothing, and this is only a word
            return ""
        return state.partition(" ")[0]

    def cancel(self, jobs: Sequence[Any]) -> None:
        """Have SLURM end the jobs."""
        numbers = [str(job.job_id) for job in jobs]
        if numbers:
            _said_by(["scancel", *numbers])


def slurm_parameters(cluster: Cluster) -> dict[str, Any]:
    """Return what submitit's executor for SLURM is asked for.

    Example:
        >>> from regrad_runner.settings.cluster import cluster_of
        >>> asked = slurm_parameters(cluster_of("slurm", "time=90,mem=16G,array_parallelism=8"))
        >>> asked["time"], asked["array_parallelism"], asked["additional_parameters"]["mem"]
        (90, 8, '16G')
    """
    requests = dict(cluster.requests)
    requests.pop(TIME_LIMIT, None)
    requests.pop("array_parallelism", None)
    parameters: dict[str, Any] = {"job_name": "regrad", "time": cluster.minutes}
    if cluster.array_parallelism is not None:
        parameters["array_parallelism"] = cluster.array_parallelism
    if "signal_delay_s" in requests:
        parameters["signal_delay_s"] = int(requests.pop("signal_delay_s"))
    if "cpus_per_task" in requests:
        # Since SLURM 22.05 srun does not take it over from the job.
        parameters["srun_args"] = [f"--cpus-per-task={requests['cpus_per_task']}"]
    # As they stand: submitit takes only some, and some of them as other types.
    parameters["additional_parameters"] = {**requests, "ntasks": 1, "requeue": True}
    return parameters


def not_in_queue(numbers: Iterable[str]) -> set[str]:
    """Return those of some jobs that SLURM does not hold any more; none if it does not say.

    Args:
        numbers: Of jobs, such as "12" or "12_3" in an array.
    """
    asked = set(numbers)
    listed = _in_queue(asked)
    return set() if listed is None else asked - listed


def still_in_queue(numbers: Iterable[str]) -> set[str]:
    """Return those of some jobs that SLURM is known to hold; see `not_in_queue`."""
    asked = set(numbers)
    return asked & (_in_queue(asked) or set())


def _in_queue(numbers: Iterable[str]) -> set[str] | None:
    """Return what squeue lists of these jobs and of their arrays; None if it does not say."""
    listed: set[str] = set()
    for array in sorted({number.partition("_")[0] for number in numbers}):
        done = _said_by(["squeue", "--noheader", "--array", "--format=%i", f"--jobs={array}"])
        if done is None:
            return None
        if done.returncode != 0 and NOT_KNOWN not in done.stderr:
            return None
        listed |= set(done.stdout.split())
    return listed


def last_line_of(log: Path) -> str:
    """Return the last line of a job's log that says something; nothing if there is none."""
    try:
        text = read_regular_file(log, largest=LONGEST_LOG).decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:LONGEST_SAID] if lines else ""


def _said_by(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """Return what a program of SLURM's said; None if it cannot be asked."""
    try:
        return subprocess.run(  # noqa: S603 - a program of SLURM's, with numbers of ours
            [*command],
            capture_output=True,
            text=True,
            timeout=SECONDS_FOR_A_PROGRAM,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
