"""Sending records to MLflow: in order, each once, however often sending was broken off in between.

What was sent and not noted is sent again, which changes nothing: a run is looked for by our id before it is made,
and a number with the same name, step, time and value, a setting, a tag, a file and an end are the same twice.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from filelock import FileLock

from regrad_runner.addresses import shown_address, without_secrets
from regrad_runner.tracking.spool import Record, Spool
from regrad_runner.tracking.stores import check_is_file, is_half_made, prepare, put_aside

# Limit of MLflow's API.
METRICS_PER_CALL = 1000
SECONDS_FOR_THE_SCHEMA = 300.0
SECONDS_BETWEEN_CALLS = 5.0
# After a failure the next attempt waits, twice as long each time.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
TAG = "regrad.run"
HOST_TAG = "regrad.host"

# What the server will answer the next time too. Everything else, such as no answer, may pass.
GONE = "RESOURCE_DOES_NOT_EXIST"
FINAL = frozenset({"INVALID_PARAMETER_VALUE", GONE, "INVALID_STATE"})
DATABASE, ARTIFACTS = "mlflow.db", "artifacts"

# Set before MLflow is imported and only where the user has not: no telemetry, no links printed, and one attempt per
# request, given up after seconds. Trying again is ours, because a request that got no answer may have made a run.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Delivery:
    """A way to one MLflow server or database. Making one connects to nothing.

    Args:
        folder: The output folder.
        address: The server's or database's; None for the database in the folder.

    Attributes:
        uri: The address.
        shown: The address as it may be shown.
        notes: What is to be told, such as that a damaged database was put aside.
    """

    def __init__(self, folder: Path, address: str | None) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow.tracking  # noqa: F401, PLC0415  (seconds, and not while two threads import)

        # A failure reaches the user as one warning of ours; lines of others would tear a live display.
        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.uri = address or f"sqlite:///{(folder / DATABASE).as_posix()}"
        self.shown = shown_address(self.uri)
        self.notes: list[str] = []
        self._artifact_location = None if address else (folder / ARTIFACTS).as_uri()
        self._own = address is None
        self._folder = folder
        self._experiments: dict[str, str] = {}
        self._client: Any = None

    def send(self, spool: Spool) -> int:
        """Deliver all that waits in a spool, and return how many records that were.

        Raises:
            Exception: What MLflow or its connection raises. What was delivered until then is noted.
        """
        before = spool.delivered
        again = False
        while records := spool.read():
            try:
                while records:
                    count = _together(records)
                    self._send_or_refuse(spool, records[:count])
                    del records[:count]
            except _MadeAnew:
                if again:
                    raise
                again = True
                spool.send_again()
        return spool.delivered - before

    def _send_or_refuse(self, spool: Spool, records: Sequence[tuple[bytes, Record]]) -> None:
        """Deliver records that go together; what is refused for good is put aside, alone."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            self._deliver(spool, [record for _, record in records])
        except (MlflowException, _Refused) as problem:
            if isinstance(problem, MlflowException):
                if problem.error_code not in FINAL:
                    raise
                self._check_is_there(spool, records[0][1])
            if len(records) > 1:
                for one in records:
                    self._send_or_refuse(spool, [one])
                return
            spool.refuse(records[0][0], without_secrets(str(problem)))
        spool.note_sent([line for line, _ in records])
        if records[0][1]["op"] == "artifact":
            spool.forget_file(records[0][1]["path"])

    def _check_is_there(self, spool: Spool, record: Record) -> None:
        """Raise where nothing is wrong with a record that was refused: it can be delivered later.

        Raises:
            Withdrawn: If the experiment was deleted, from which it can be restored.
            _MadeAnew: If the folder's database was made anew, and does not know the run.
        """
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        if record["op"] == "start":
            self._experiments.pop(record["experiment"], None)
            self._experiment(record["experiment"])
            return
        experiment, run = spool.sent.runs.get(record.get("run", ""), ("", ""))
        if not run:
            return
        try:
            self._client.get_run(run)
            _check_active(self._client.get_experiment(experiment))
        except MlflowException as problem:
            if problem.error_code == GONE and self._own:
                raise _MadeAnew from problem

    def _deliver(self, spool: Spool, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param  # noqa: PLC0415

        client, record = self.connect(), records[0]
        if record["op"] == "start":
            self._start(spool, record)
            return
        experiment, run = spool.sent.runs.get(record.get("run", ""), ("", ""))
        if not run:
            raise _Refused("its run is not known")
        match record["op"]:
            case "metrics":
                metrics = [Metric(*value) for part in records for value in part["values"]]
                client.log_batch(run, metrics=metrics, synchronous=True)
            case "params":
                client.log_batch(
                    run, params=[Param(*value) for value in record["values"]], synchronous=True
                )
            case "artifact":
                path = spool.file(record["path"])
                if path is None:
                    raise _Refused(f"there is no file {record['path']!r} among the copies")
                self._check_place(run, path.name)
                client.log_artifact(run, str(path))
            case "text":
                self._check_place(run, record["name"])
                client.log_text(run, record["text"], record["name"])
            case "finish":
                if "error" in record:
                    client.set_tag(run, "regrad.traceback", record["error"])
                client.set_terminated(run, record["status"], record["time"])
                self._remove_twins(experiment, record["run"], run)

    def _start(self, spool: Spool, record: Record) -> None:
        """Make the run, unless an attempt that was broken off has made it."""
        experiment = self._experiment(record["experiment"])
        known = self._runs(experiment, record["run"])
        tags = {TAG: record["run"], HOST_TAG: record.get("host", "")}
        parent = self._known_run(spool, experiment, record.get("parent", ""))
        if parent:
            tags["mlflow.parentRunId"] = parent
        if not known:
            made = self._client.create_run(experiment, record["time"], tags, record.get("name", ""))
            known = [str(made.info.run_id)]
        spool.sent.runs[record["run"]] = [experiment, known[0]]

    def _known_run(self, spool: Spool, experiment: str, run: str) -> str | None:
        """Return the server's id of a run, which another process may have begun; None where it has none."""
        if run in spool.sent.runs:
            return spool.sent.runs[run][1]
        return next(iter(self._runs(experiment, run)), None) if run else None

    def _runs(self, experiment: str, run: str) -> list[str]:
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run}'")
        return [str(one.info.run_id) for one in found]

    def _remove_twins(self, experiment: str, run: str, ours: str) -> None:
        """Remove what a slow server made of an attempt that was given up, after the run was looked for."""
        for other in self._runs(experiment, run):
            if other != ours:
                self._client.delete_run(other)

    def connect(self) -> Any:
        """Return the client, made with a SQLite file's schema: by one process, while the others wait."""
        if self._client is None:
            from mlflow.tracking import MlflowClient  # noqa: PLC0415

            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if self._file is not None:
                    told = prepare(self._file, own=self._own)
                    self.notes += [told] if told else []
                try:
                    self._client = MlflowClient(self.uri)
                except Exception as problem:
                    if not (self._own and self._file and is_half_made(problem)):
                        raise
                    self._client = self._anew(self._file, problem)
        return self._client

    def _anew(self, file: Path, problem: Exception) -> Any:
        """Put a schema aside whose making was broken off, and return the client of a new one."""
        from mlflow.tracking import MlflowClient  # noqa: PLC0415

        self.notes.append(put_aside(file, str(problem).partition("\n")[0]))
        prepare(file, own=True)
        # Under the same name MLflow would go on with its connection to the old file.
        return MlflowClient(f"sqlite:///{file.parent.as_posix()}/./{file.name}")

    def _check_place(self, run: str, name: str) -> None:
        """Raise `_Refused` where the folder's database would have a file written anywhere but into its artifacts."""
        if not self._own:
            return  # a server keeps its files itself
        place = Path(url2pathname(urlparse(self._client.get_run(run).info.artifact_uri).path))
        own = self._folder / ARTIFACTS
        if place.resolve() != place or own not in place.parents or (place / name).is_symlink():
            raise _Refused(
                f"its run keeps files in '{place}', which is not in '{own}' or is a link"
            )

    def _experiment(self, name: str) -> str:
        """Return the identity of an experiment, made if need be: by one process, where several start at once."""
        if name not in self._experiments:
            with self._lock():
                known = self._client.get_experiment_by_name(name)
                _check_active(known)
                made = (
                    known.experiment_id
                    if known
                    else self._client.create_experiment(name, self._artifact_location)
                )
            self._experiments[name] = str(made)
        return self._experiments[name]

    def _lock(self) -> AbstractContextManager[Any]:
        """Return what keeps other processes from a SQLite file; a server looks after itself."""
        if self._file is None:
            return nullcontext()
        check_is_file(self._file, own=self._own)
        return FileLock(f"{self._file}.lock", timeout=SECONDS_FOR_THE_SCHEMA)

    @property
    def _file(self) -> Path | None:
        """The SQLite file; None for another kind of database or server."""
        scheme, _, path = self.uri.partition(":///")
        return Path(path.partition("?")[0]) if scheme == "sqlite" else None


class Sender:
    """A thread that delivers a spool while it grows, and tries again while nobody answers.

    Args:
        delivery: The way; nobody else may use it.
        spool: What to deliver.
        abandoned: Gives other spools, to deliver first.

    Attributes:
        outage: Why the last attempt failed; None if it did not.
    """

    def __init__(
        self, delivery: Delivery, spool: Spool, *, abandoned: Callable[[], Iterable[Spool]]
    ) -> None:
        self.outage: Exception | None = None
        self._delivery, self._spool, self._abandoned = delivery, spool, abandoned
        self._wake, self._closing = threading.Event(), threading.Event()
        self._give_up = 0.0
        self._round = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="regrad-tracking", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Send now what waits, not some seconds later."""
        self._wake.set()

    def flush(self, seconds: float) -> bool:
        """Wait until all is delivered or an attempt failed, and say whether it is delivered."""
        self.outage = None
        self.hurry()
        with self._round:
            self._round.wait_for(
                lambda: self.outage is not None or not self._spool.waiting, seconds
            )
        return not self._spool.waiting

    def close(self, seconds: float, *, in_vain: float) -> bool:
        """Deliver the rest and end the thread, and say whether it ended.

        Args:
            seconds: To wait in all.
            in_vain: Of these, before an attempt that fails is the last.
        """
        self._give_up = time.monotonic() + in_vain
        self._closing.set()
        self.hurry()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while True:
            last = self._closing.is_set()
            with self._watch():
                self._send_all()
            failed = self.outage is not None
            with self._round:
                self._round.notify_all()
            if last and not (failed and time.monotonic() < self._give_up):
                return
            self._rest(pause if failed else 0.0)
            pause = min(2 * pause, LONGEST_PAUSE) if failed else FIRST_PAUSE

    def _rest(self, pause: float) -> None:
        """Wait for more to send; after a failure as long as given, or until the end."""
        if not pause:
            self._wake.wait(SECONDS_BETWEEN_CALLS)
        elif self._closing.is_set():
            time.sleep(FIRST_PAUSE)
        else:
            self._closing.wait(pause)
        self._wake.clear()

    def _send_all(self) -> None:
        self._delivery.connect()  # also before there is something to send: a fresh schema takes seconds
        for spool in self._abandoned():
            try:
                self._delivery.send(spool)
            finally:
                spool.leave()
        self._delivery.send(self._spool)
        self.outage = None

    def _watch(self) -> ExitStack:
        """Turn any error of the block into an outage: SQL, HTTP and cloud clients each raise their own kinds."""
        stack = ExitStack()
        stack.push(self._note_outage)
        return stack

    def _note_outage(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, Exception):
            self.outage = error
        return isinstance(error, Exception)


def _together(records: Sequence[tuple[bytes, Record]]) -> int:
    """Return how many of the first records one call takes: numbers of one run, as many as the limit allows."""
    first, count, values = records[0][1], 0, 0
    for _, record in records:
        values += len(record.get("values", ()))
        if count and (
            record["op"] != "metrics" or record["run"] != first["run"] or values > METRICS_PER_CALL
        ):
            break
        count += 1
        if record["op"] != "metrics":
            break
    return count


def _check_active(experiment: Any) -> None:
    """Raise `Withdrawn` for an experiment that was deleted, which MLflow keeps and can restore."""
    if experiment is not None and experiment.lifecycle_stage != "active":
        number = experiment.experiment_id
        raise Withdrawn(
            f"experiment {experiment.name!r} was deleted; restore it, such as by 'mlflow experiments restore "
            f"--experiment-id {number}', or delete it for good by 'mlflow gc'"
        )


class Withdrawn(Exception):  # noqa: N818 - it is said of the experiment
    """The experiment was deleted: records wait until it is restored."""


class _MadeAnew(Exception):  # noqa: N818 - it is said of the database
    """The folder's database does not know a run that was delivered to it."""


class _Refused(Exception):  # noqa: N818 - it is said of the record
    """A record that cannot be delivered, whatever the server says."""
