"""Runs in MLflow: a view of what their folders hold, updated until both hold the same.

A projection looks at what is there and sends what is missing. So the fate of the previous one does
not matter: it may have been interrupted, its answer lost, or the server may have said yes and kept
nothing. A run is found by our own id in the tag `regrad.run`.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from regrad_runner.files import read_regular_file
from regrad_runner.tracking.stores import Store

RUN_TAG = "regrad.run"
FILE_TAG = "regrad.file."
CHANGED_TAG = "regrad.changed."
PARENT_TAG = "mlflow.parentRunId"
HOST_TAG = "regrad.host"
ERROR_TAG = "regrad.error"
# Limits of MLflow's API: entries per call, characters per value, characters allowed in a name.
METRICS_PER_CALL = 1000
PARAMETERS_PER_CALL = 100
LONGEST_PARAMETER = 6000
LONGEST_TAG = 5000
LONGEST_NAME = 250
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
LARGEST_FILE = 2**26  # bytes; no file of a run comes near
# MLflow's databases keep these in place of infinity.
LARGEST_NUMBER = 1.7976931348623157e308

ShownStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class MetricPoint(NamedTuple):
    """One number of a curve.

    Attributes:
        name: Of the curve.
        value: The number.
        time: When, in milliseconds since 1970.
        step: Optimizer steps.
    """

    name: str
    value: float
    time: int
    step: int


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as MLflow should show it.

    Attributes:
        id: Ours: 32 hexadecimal digits.
        experiment: Name of the group of runs.
        name: Of the run; need not be unique.
        status: How it ended.
        started: When, in milliseconds since 1970.
        ended: When; None while it runs.
        parent: Our id of the run to show this one under, or nothing.
        parameters: Settings by name. MLflow keeps their first values.
        tags: What may change later.
        points: Its curves.
        folder: Where its files are.
        files: Names of those to show, which need not be there; never read from data.
        earlier: Our ids of attempts that this one replaced: if they look open, they were killed.
    """

    id: str
    experiment: str
    name: str
    status: ShownStatus
    started: int
    ended: int | None = None
    parent: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[MetricPoint] = ()
    folder: Path
    files: Sequence[str] = ()
    earlier: Sequence[str] = ()


@dataclass
class Sent:
    """What a projection sent: nothing where everything was there.

    Attributes:
        points: Numbers of curves.
        files: Files.
        others: Settings, tags, runs that were made, restored or ended.
    """

    points: int = 0
    files: int = 0
    others: int = 0

    def __bool__(self) -> bool:
        return bool(self.points or self.files or self.others)

    def __iadd__(self, other: Sent) -> Sent:
        self.points += other.points
        self.files += other.files
        self.others += other.others
        return self


def project(store: Store, run: TrackedRun) -> Sent:
    """Bring a store up to date with a run, and return what had to be sent.

    Args:
        store: Where to.
        run: What to show.

    Raises:
        Exception: What MLflow or its connection raises; the next projection continues from there.
    """
    return _Projection(store, run).send()


def experiment_of(store: Store, name: str) -> tuple[str, bool]:
    """Find an experiment; one that is missing is made, one that was deleted is restored.

    MLflow itself fails where two processes make the same one at once.

    Args:
        store: Where it is.
        name: Its name.

    Returns:
        Its number, and whether something had to be made or restored.

    Raises:
        Exception: What MLflow or its connection raises.
    """
    client = store.client()
    known = client.get_experiment_by_name(name)
    if known is None:
        with store.alone():
            known = client.get_experiment_by_name(name)
            if known is None:
                return str(client.create_experiment(name, store.artifact_location)), True
    if known.lifecycle_stage == "active":
        return str(known.experiment_id), False
    client.restore_experiment(known.experiment_id)
    return str(known.experiment_id), True


class _Projection:
    """One projection under way."""

    def __init__(self, store: Store, run: TrackedRun) -> None:
        self._store = store
        self._run = run
        self._client = store.client()
        self._sent = Sent()

    def send(self) -> Sent:
        experiment = self._experiment()
        there = self._find_or_make(experiment)
        number = str(there.info.run_id)
        self._send_settings(number, there)
        self._send_tags(number, there, experiment)
        self._send_points(number, there)
        self._send_files(number, there)
        self._send_end(number, there)
        self._end_earlier(experiment)
        return self._sent

    def _experiment(self) -> str:
        """Return the number of the experiment, which is made or restored if need be."""
        number, is_changed = experiment_of(self._store, self._run.experiment)
        self._sent.others += is_changed
        return number

    def _find_or_make(self, experiment: str) -> Any:
        """Return the run in the store: found, restored or made; what is there twice is removed."""
        found = _runs_of(self._client, experiment, self._run.id)
        active = [one for one in found if one.info.lifecycle_stage == "active"]
        # A slow server may have created it twice, after an attempt that timed out.
        for twin in active[1:]:
            self._client.delete_run(twin.info.run_id)
            self._sent.others += 1
        if active:
            return active[0]
        self._sent.others += 1
        if found:
            self._client.restore_run(found[0].info.run_id)
            return self._client.get_run(found[0].info.run_id)
        tags = {RUN_TAG: self._run.id}
        name = _printable(self._run.name)
        return self._client.create_run(experiment, self._run.started, tags, name)

    def _send_settings(self, number: str, there: Any) -> None:
        from mlflow.entities import Param  # noqa: PLC0415 - it takes seconds

        known = there.data.params
        missing = [
            Param(name, value) for name, value in self._parameters().items() if name not in known
        ]
        for part in _parts(missing, PARAMETERS_PER_CALL):
            self._client.log_batch(number, params=part, synchronous=True)
        self._sent.others += len(missing)

    def _parameters(self) -> dict[str, str]:
        return {
            _name(name): _printable(str(value))[:LONGEST_PARAMETER]
            for name, value in self._run.parameters.items()
        }

    def _send_tags(self, number: str, there: Any, experiment: str) -> None:
        wanted = {name: _printable(value) for name, value in self._run.tags.items()}
        for name, value in self._parameters().items():
            # MLflow refuses a parameter that changed.
            if there.data.params.get(name, value) != value:
                wanted[CHANGED_TAG + name] = value
        if self._run.parent:
            parents = _runs_of(self._client, experiment, self._run.parent)
            if parents:
                wanted[PARENT_TAG] = str(parents[0].info.run_id)
        for name, value in wanted.items():
            short = value[-LONGEST_TAG:]
            if there.data.tags.get(name) != short:
                self._client.set_tag(number, name, short)
                self._sent.others += 1

    def _send_points(self, number: str, there: Any) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415 - as above

        points = [point._replace(name=_name(point.name)) for point in self._run.points]
        names = {point.name for point in points} & there.data.metrics.keys()
        known = set()
        for name in names:
            for metric in self._client.get_metric_history(number, name):
                known.add((name, _key(metric.value, metric.timestamp, metric.step)))
        missing = {}
        for point in points:
            key = (point.name, _key(point.value, point.time, point.step))
            if key not in known:
                missing[key] = Metric(*point)
        for part in _parts(list(missing.values()), METRICS_PER_CALL):
            self._client.log_batch(number, metrics=part, synchronous=True)
        self._sent.points += len(missing)

    def _send_files(self, number: str, there: Any) -> None:
        """Send the files that are there and differ from what was sent; links are left out."""
        found = {name: self._content(name) for name in self._run.files}
        contents = {Path(name).name: text for name, text in found.items() if text is not None}
        if not contents:
            return
        known = {one.path for one in self._client.list_artifacts(number)}
        for name, content in contents.items():
            digest = hashlib.sha256(content).hexdigest()
            tag = FILE_TAG + name
            if name in known and there.data.tags.get(tag) == digest:
                continue
            if not self._is_in_place(there, name):
                continue
            with tempfile.TemporaryDirectory(prefix="regrad-") as folder:
                copy = Path(folder) / name
                copy.write_bytes(content)
                self._client.log_artifact(number, str(copy))
            self._client.set_tag(number, tag, digest)
            self._sent.files += 1

    def _content(self, name: str) -> bytes | None:
        """Return what a file of the run holds; None if it is missing, a link or too large."""
        path = self._run.folder
        for part in Path(name).parts:
            if path.is_symlink():
                return None
            path = path / part
        try:
            return read_regular_file(path, largest=LARGEST_FILE)
        except OSError:
            return None

    def _is_in_place(self, there: Any, name: str) -> bool:
        """Say whether a file would end up among the artifacts of the folder's own database.

        The database itself says where its artifacts are, and may say anything.
        """
        own = self._store.artifacts
        if own is None:
            return True  # a server keeps its files itself
        place = Path(url2pathname(urlparse(there.info.artifact_uri).path))
        if place.resolve() == place and own in place.parents and not (place / name).is_symlink():
            return True
        self._store.note(
            f"files of runs must be kept in '{own}', but '{self._store.shown}' says '{place}', "
            "which is not in it or is a link; they are left out: move the database away"
        )
        return False

    def _send_end(self, number: str, there: Any) -> None:
        run = self._run
        info = there.info
        if run.status == "RUNNING":
            if info.status != "RUNNING":
                self._client.update_run(number, status="RUNNING")
                self._sent.others += 1
            return
        if (info.status, info.end_time) != (run.status, run.ended):
            self._client.set_terminated(number, run.status, run.ended)
            self._sent.others += 1

    def _end_earlier(self, experiment: str) -> None:
        for earlier in self._run.earlier:
            for one in _runs_of(self._client, experiment, earlier):
                if one.info.status == "RUNNING" and one.info.lifecycle_stage == "active":
                    self._client.set_terminated(one.info.run_id, "KILLED", self._run.started)
                    self._sent.others += 1


def _runs_of(client: Any, experiment: str, own_id: str) -> list[Any]:
    """Return the runs with an id of ours, those that were deleted too, the oldest first."""
    from mlflow.entities import ViewType  # noqa: PLC0415 - as above

    if not re.fullmatch("[0-9a-f]{32}", own_id):
        raise ValueError(f"id of a run must be 32 hexadecimal digits, got {own_id!r}")
    found = client.search_runs(
        [experiment],
        f"tags.`{RUN_TAG}` = '{own_id}'",
        run_view_type=ViewType.ALL,
        order_by=["attributes.start_time ASC"],
    )
    return list(found)


def _key(value: float, time: int, step: int) -> tuple[str, int, int]:
    """Return what identifies a point of a curve: value, time and step, as a database keeps them."""
    if value == float("inf"):
        value = LARGEST_NUMBER
    elif value == float("-inf"):
        value = -LARGEST_NUMBER
    return f"{value:.12g}", time, step


def _name(name: str) -> str:
    """Return a name that MLflow takes: a normal path that does not lead out of its folder."""
    kept = NOT_IN_NAMES.sub("_", name)[:LONGEST_NAME]
    is_normal = posixpath.normpath(kept) == kept and kept != "."
    if is_normal and not kept.startswith(("/", "..")):
        return kept
    return re.sub(r"[./]", "_", kept) or "_"


def _printable(text: str) -> str:
    """Return a text that a database takes: the name of a folder need not be one."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def _parts(values: Sequence[Any], size: int) -> Iterator[Iterable[Any]]:
    """Cut a sequence into lists of at most `size`."""
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
