"""Tracking that never stops a training: MLflow runs, sent by a thread, kept on disk while nobody takes them.

A run is a context manager and always ends with a true status::

    tracker = open_tracker("mlflow", folder=Path("out"))
    with tracker.start("digits", "comparison") as parent, tracker.start("digits", "xgrad 0", parent=parent) as run:
        run.log(100, {"validation accuracy": 0.93})

MLflow's client is used and never its global "active run", always with an explicit
absolute address, so neither the environment nor an `mlruns` folder in the working
directory decides where numbers go. What could not be delivered is appended to
`unsent/records.jsonl` in the folder: one JSON object per line, in order, complete
enough to be delivered later.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from filelock import FileLock
from regrad.errors import RegradError, RegradWarning

Status = Literal["FINISHED", "FAILED", "KILLED"]
Record = dict[str, Any]

# Limits of MLflow's API: entities per call, characters per value, characters allowed in a name.
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
PARAM_LENGTH, TAG_LENGTH, NAME_LENGTH = 6000, 5000, 250
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
SECONDS_BETWEEN_CALLS = 5.0
SECONDS_FOR_THE_SCHEMA = 300.0

# Set before MLflow is imported and only where the user has not: no telemetry, no links
# printed, and an unreachable server is given up after seconds instead of minutes.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM); raise it in the signal handler and open runs become KILLED."""

    def __init__(self, code: int = 143) -> None:
        super().__init__(code)


class Run:
    """One tracked run, made by `Tracker.start`.

    As a context manager it ends FINISHED, FAILED on an error (with the traceback in
    the tag `regrad.traceback`), KILLED on `KeyboardInterrupt` and `SystemExit`.
    """

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self.id = run_id
        self._tracker = tracker
        self._values: list[tuple[str, float, int, int]] = []
        self._sent = time.monotonic()
        self._finished = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers of one step; they are sent in the background, at most some seconds later.

        Args:
            step: Optimizer steps so far, the x axis of the curve.
            metrics: Values by name: numbers, NumPy scalars or tensors of one element
                (which are read at once, so a device is waited for).

        Raises:
            RegradError: If the run is finished.
        """
        self._check_open()
        now = time.time_ns() // 1_000_000
        for name, value in metrics.items():
            number = _number(name, value)
            if number is not None:
                self._values.append((_name(name), number, now, int(step)))
        if len(self._values) >= METRICS_PER_CALL or time.monotonic() - self._sent > SECONDS_BETWEEN_CALLS:
            self._send_values()

    def artifact(self, path: Path) -> None:
        """Attach a file to the run; once this returns, the file may change or go.

        Args:
            path: The file. Where there is none: a warning, and nothing is attached.

        Raises:
            RegradError: If the run is finished.
        """
        self._check_open()
        if path.is_file():
            self._tracker.send({"op": "artifact", "run": self.id, "path": str(path.resolve())})
            self._tracker.flush()
        else:
            warnings.warn(f"artifact must be a file, got {str(path)!r}; left out", RegradWarning, stacklevel=2)

    def finish(self, status: Status = "FINISHED", *, error: str = "") -> None:
        """Send what is left and end the run; only the first call counts.

        Args:
            status: How it ended.
            error: Traceback of what ended it, for the tag `regrad.traceback`.
        """
        if self._finished:
            return
        self._send_values()
        self._finished = True
        record = {"op": "finish", "run": self.id, "status": status, "time": time.time_ns() // 1_000_000}
        self._tracker.send(record | ({"error": error[-TAG_LENGTH:]} if error else {}))
        self._tracker.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            status: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
            self.finish(status, error="".join(traceback.format_exception(error)))

    def _check_open(self) -> None:
        if self._finished:
            raise RegradError(f"run {self.id!r} is finished; start another one before logging")

    def _send_values(self) -> None:
        values, self._values, self._sent = self._values, [], time.monotonic()
        for part in _parts(values, METRICS_PER_CALL):
            self._tracker.send({"op": "metrics", "run": self.id, "values": part})


class Tracker:
    """Start runs that are kept nowhere; `open_tracker` gives the one that keeps them.

    Attributes:
        uri: Where the runs can be seen, or None.
    """

    uri: str | None = None

    def start(
        self, experiment: str, run_name: str, params: Mapping[str, Any] | None = None, parent: Run | None = None
    ) -> Run:
        """Begin a run.

        Args:
            experiment: Name of the group of runs; made if it does not exist.
            run_name: Name of the run; need not be unique.
            params: Settings by name, kept as text.
            parent: The run to show this one under.
        """
        del experiment, run_name, params, parent
        return Run(self, uuid.uuid4().hex)

    def send(self, record: Record) -> None:
        """Take one record of a run."""

    def flush(self) -> None:
        """Return once everything taken so far is delivered or kept."""


class MlflowTracker(Tracker):
    """Deliver runs to MLflow from one background thread, or keep them in `unsent` of the folder.

    After the first failure nothing more is tried in this process: one warning, and
    everything after it is kept too, so a dead server costs its time-out once.
    """

    def __init__(self, *, folder: Path, uri: str | None = None) -> None:
        folder = folder.resolve()
        self.uri = uri or f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
        self._artifact_location = None if uri else (folder / "artifacts").as_uri()
        self._folder = folder
        self._unsent = folder / "unsent"
        self._experiments: dict[str, str] = {}
        self._outage: Exception | None = None
        self._warned = False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="regrad-tracking")
        self._last: Future[None] = self._worker.submit(self._connect)
        self.flush()

    def start(
        self, experiment: str, run_name: str, params: Mapping[str, Any] | None = None, parent: Run | None = None
    ) -> Run:
        """Begin a run; see `Tracker.start`. Waits for MLflow, some milliseconds with SQLite."""
        tags = {"mlflow.parentRunId": parent.id} if parent else {}
        now = time.time_ns() // 1_000_000
        record = {"op": "start", "experiment": experiment, "name": run_name, "tags": tags, "time": now}
        run = Run(self, self._worker.submit(self._begin, record).result())
        values = [(_name(name), str(value)[:PARAM_LENGTH]) for name, value in (params or {}).items()]
        for part in _parts(values, PARAMS_PER_CALL):
            self.send({"op": "params", "run": run.id, "values": part})
        return run

    def send(self, record: Record) -> None:
        """Queue one record."""
        self._last = self._worker.submit(self._deliver_or_keep, record)
        self._warn_once()

    def flush(self) -> None:
        """Return once everything queued so far is delivered or kept."""
        wait([self._last])
        self._warn_once()

    def _connect(self) -> None:
        """Open the client, and with it a SQLite file's schema: by one process, while the others wait."""
        with self._watch():
            from mlflow.tracking import MlflowClient  # noqa: PLC0415  (seconds; only where runs are tracked)

            # A failure reaches the user as one warning of ours; lines of others would tear a live display.
            for name in ("mlflow", "alembic", "urllib3"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._client = MlflowClient(self.uri)

    def _begin(self, record: Record) -> str:
        """Create the run and return its identity: MLflow's, or one of our own where MLflow cannot be had."""
        if self._outage is None:
            with self._watch():
                experiment = self._experiment(record["experiment"])
                info = self._client.create_run(experiment, record["time"], record["tags"], record["name"]).info
                return str(info.run_id)
        record["run"] = uuid.uuid4().hex
        self._keep(record)
        return str(record["run"])

    def _experiment(self, name: str) -> str:
        """Return the identity of an experiment, made if need be: by one process, where several start at once."""
        if name not in self._experiments:
            with self._lock():
                known = self._client.get_experiment_by_name(name)
                made = known.experiment_id if known else self._client.create_experiment(name, self._artifact_location)
            self._experiments[name] = str(made)
        return self._experiments[name]

    def _lock(self) -> AbstractContextManager[Any]:
        """Return what keeps other processes from a SQLite file; a server looks after itself."""
        scheme, _, path = str(self.uri).partition(":///")
        return FileLock(f"{path}.lock", timeout=SECONDS_FOR_THE_SCHEMA) if scheme == "sqlite" else nullcontext()

    def _deliver_or_keep(self, record: Record) -> None:
        if self._outage is None:
            with self._watch():
                self._deliver(record)
                return
        self._keep(record)

    def _deliver(self, record: Record) -> None:
        from mlflow.entities import Metric, Param  # noqa: PLC0415

        run = record["run"]
        match record["op"]:
            case "metrics":
                self._client.log_batch(run, metrics=[Metric(*value) for value in record["values"]])
            case "params":
                self._client.log_batch(run, params=[Param(*value) for value in record["values"]])
            case "artifact":
                self._client.log_artifact(run, record["path"])
            case "finish":
                if "error" in record:
                    self._client.set_tag(run, "regrad.traceback", record["error"])
                self._client.set_terminated(run, record["status"], record["time"])

    def _keep(self, record: Record) -> None:
        """Append a record to the folder, with a copy of its file if it has one."""
        with self._watch():
            self._unsent.mkdir(parents=True, exist_ok=True)
            if record["op"] == "artifact":
                copy = self._unsent / record["run"] / Path(record["path"]).name
                copy.parent.mkdir(exist_ok=True)
                shutil.copy2(record["path"], copy)
                record = record | {"path": copy.relative_to(self._unsent).as_posix()}
            with (self._unsent / "records.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _watch(self) -> ExitStack:
        """Turn any error of the block into an outage: SQL, HTTP and cloud clients each raise their own kinds."""
        stack = ExitStack()
        stack.push(self._note_outage)
        return stack

    def _note_outage(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self._outage = error
        return isinstance(error, Exception)

    def _warn_once(self) -> None:
        """Warn in the caller's thread, where a warning can be seen and filtered."""
        if self._outage is not None and not self._warned:
            self._warned = True
            reason = str(self._outage).partition("\n")[0] or type(self._outage).__name__
            what = f"tracking at {self.uri} failed: {reason}"
            warnings.warn(f"{what}; training goes on, the rest is kept in {self._unsent}", RegradWarning, stacklevel=4)


def open_tracker(kind: str = "mlflow", *, folder: Path, uri: str | None = None) -> Tracker:
    """Return a tracker; call it in the main process only.

    Args:
        kind: "mlflow", or "none" for a tracker that does nothing and imports nothing.
        folder: Where `mlflow.db`, `artifacts/` and, after a failure, `unsent/` are; made if it does not exist.
        uri: Address of an MLflow server or database to use instead of the folder.

    Raises:
        ValueError: If `kind` is unknown or `uri` is not absolute.
    """
    if kind == "none":
        return Tracker()
    if kind != "mlflow":
        raise ValueError(f"tracker must be 'mlflow' or 'none', got {kind!r}")
    relative_file = uri is not None and uri.startswith("sqlite:") and not uri.startswith("sqlite:////")
    if uri is not None and (relative_file or not re.match(r"(?!file)[a-z][\w+.-]*://", uri)):
        raise ValueError(
            f"tracking uri must be an absolute address, got {uri!r}; give http(s)://host:port or sqlite:////folder/file.db"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return MlflowTracker(folder=folder, uri=uri)


def _number(name: str, value: Any) -> float | None:
    """Return a metric as a float, or None with a warning: one odd metric must not end a training."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        warnings.warn(f"metric {name!r} must be one number, got {value!r}; left out", RegradWarning, stacklevel=3)
        return None


def _name(name: str) -> str:
    """Return a name that MLflow takes."""
    return NOT_IN_NAMES.sub("_", name)[:NAME_LENGTH]


def _parts(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Cut a sequence into lists of at most `size`."""
    return (list(values[start : start + size]) for start in range(0, len(values), size))
