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

from filelock import FileLock

from regrad_runner.spool import Record, Spool

# Limit of MLflow's API.
METRICS_PER_CALL = 1000
SECONDS_FOR_THE_SCHEMA = 300.0
SECONDS_BETWEEN_CALLS = 5.0
# After a failure the next attempt waits, twice as long each time.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
TAG = "regrad.run"
HOST_TAG = "regrad.host"

# What the server will answer the next time too. Everything else, such as no answer, may pass.
FINAL = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"})

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
    """

    def __init__(self, folder: Path, address: str | None) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow.tracking  # noqa: F401, PLC0415  (seconds, and not while two threads import)

        # A failure reaches the user as one warning of ours; lines of others would tear a live display.
        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.uri = address or f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
        self._artifact_location = None if address else (folder / "artifacts").as_uri()
        self._folder = folder
        self._experiments: dict[str, str] = {}
        self._client: Any = None

    def send(self, spool: Spool) -> int:
        """Deliver all that waits in a spool, and return how many records that were.

        Raises:
            Exception: What MLflow or its connection raises. What was delivered until then is noted.
        """
        before = spool.waiting
        while records := spool.read():
            while records:
                count = _together(records)
                self._send_or_refuse(spool, records[:count])
                del records[:count]
        return before - spool.waiting

    def _send_or_refuse(self, spool: Spool, records: Sequence[tuple[bytes, Record]]) -> None:
        """Deliver records that go together; what is refused for good is put aside, alone."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            self._deliver(spool, [record for _, record in records])
        except (MlflowException, _Refused) as problem:
            if isinstance(problem, MlflowException) and problem.error_code not in FINAL:
                raise
            if len(records) > 1:
                for one in records:
                    self._send_or_refuse(spool, [one])
                return
            spool.refuse(records[0][0], str(problem))
        spool.note_sent([line for line, _ in records])
        if records[0][1]["op"] == "artifact":
            spool.forget_file(spool.file(records[0][1]["path"]))

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
                if not path.is_file():
                    raise _Refused(f"there is no file {str(path)!r} any more")
                client.log_artifact(run, str(path))
            case "text":
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
        parent = self._known_run(spool, experiment, record["parent"])
        if parent:
            tags["mlflow.parentRunId"] = parent
        if not known:
            made = self._client.create_run(experiment, record["time"], tags, record["name"])
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
                self._client = MlflowClient(self.uri)
        return self._client

    def _experiment(self, name: str) -> str:
        """Return the identity of an experiment, made if need be: by one process, where several start at once."""
        if name not in self._experiments:
            with self._lock():
                known = self._client.get_experiment_by_name(name)
                made = (
                    known.experiment_id
                    if known
                    else self._client.create_experiment(name, self._artifact_location)
                )
            self._experiments[name] = str(made)
        return self._experiments[name]

    def _lock(self) -> AbstractContextManager[Any]:
        """Return what keeps other processes from a SQLite file; a server looks after itself."""
        scheme, _, path = self.uri.partition(":///")
        return (
            FileLock(f"{path}.lock", timeout=SECONDS_FOR_THE_SCHEMA)
            if scheme == "sqlite"
            else nullcontext()
        )


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


class _Refused(Exception):  # noqa: N818 - it is said of the record
    """A record that cannot be delivered, whatever the server says."""
