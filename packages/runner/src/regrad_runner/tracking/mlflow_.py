"""Tracking that never stops a training: MLflow runs, kept on the disk first and sent by a thread.

A run is a context manager and always ends with a true status::

    with open_tracker("mlflow", folder=Path("out")) as tracker, tracker.start("digits", "comparison") as parent:
        with tracker.start("digits", "xgrad 0", parent=parent) as run:
            run.log(100, {"validation accuracy": 0.93})

MLflow's client is used and never its global "active run", always with an explicit
absolute address, so neither the environment nor an `mlruns` folder in the working
directory decides where numbers go. A run has an id of ours, kept in the tag
`regrad.run`: MLflow gives its own when it is there to do so. `regrad_runner.tracking.spool`
keeps what is not delivered, `regrad_runner.tracking.delivery` sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from regrad_runner.signals import LeftAtOnce

if TYPE_CHECKING:
    pass
import atexit
import platform
import posixpath
import re
import time
import traceback
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from regrad.errors import RegradError, RegradWarning

from regrad_runner.addresses import check_address, without_secrets
from regrad_runner.signals import signals_wait
from regrad_runner.tracking.delivery import METRICS_PER_CALL, Delivery, Sender
from regrad_runner.tracking.spool import Record, Spool, new_spool, spools, take_spool

Status = Literal["FINISHED", "FAILED", "KILLED"]
# Limits of MLflow's API: settings per call, characters per value, characters allowed in a name.
PARAMS_PER_CALL = 100
PARAM_LENGTH, TAG_LENGTH, NAME_LENGTH = 6000, 5000, 250
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
# How long the end of a process waits for MLflow, and how long if MLflow fails to answer.
SECONDS_AT_THE_END, SECONDS_IN_VAIN = 60.0, 10.0
UNSENT = "unsent"


class Run:
    """One tracked run, made by `Tracker.start`.

    As a context manager it ends FINISHED, FAILED on an error (with the traceback as the
    file `traceback.txt` and, its end, in the tag `regrad.traceback`), KILLED on
    `KeyboardInterrupt` and `SystemExit`.

    Attributes:
        id: Ours, which MLflow has in the tag `regrad.run`.
    """

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self.id = run_id
        self._tracker = tracker
        self._finished = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers of one step: on the disk when this returns, sent some seconds later.

        Args:
            step: Optimizer steps so far, the x axis of the curve.
            metrics: Values by name: numbers, NumPy scalars or tensors of one element
                (which are read at once, so a device is waited for).

        Raises:
            RegradError: If the run is finished.
        """
        self._check_open()
        now = time.time_ns() // 1_000_000
        numbers = [
            (_name(name), _number(name, value), now, int(step)) for name, value in metrics.items()
        ]
        for part in _parts(
            [number for number in numbers if number[1] is not None], METRICS_PER_CALL
        ):
            self._tracker.send({"op": "metrics", "run": self.id, "time": now, "values": part})

    def artifact(self, path: Path) -> None:
        """Attach a file to the run; once this returns, the file may change or go.

        Args:
            path: The file. Where there is none, or a link: a warning, and nothing is attached.

        Raises:
            RegradError: If the run is finished.
        """
        self._check_open()
        if path.is_file() and not path.is_symlink():
            self._tracker.send({"op": "artifact", "run": self.id, "path": str(path)})
        else:
            warnings.warn(
                f"artifact must be a file, got {str(path)!r}; left out", RegradWarning, stacklevel=2
            )

    def finish(self, status: Status = "FINISHED", *, error: str = "") -> None:
        """End the run; only the first call counts.

        Args:
            status: How it ended.
            error: Traceback of what ended it.
        """
        if self._finished:
            return
        self._finished = True
        if error and status == "FAILED":
            self._tracker.send(
                {"op": "text", "run": self.id, "name": "traceback.txt", "text": error}
            )
        record = {
            "op": "finish",
            "run": self.id,
            "status": status,
            "time": time.time_ns() // 1_000_000,
        }
        self._tracker.send(record | ({"error": error[-TAG_LENGTH:]} if error else {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            status: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
            told = "".join(traceback.format_exception(error))
            self.finish(status, error=without_secrets(told))

    def _check_open(self) -> None:
        if self._finished:
            raise RegradError(f"run {self.id!r} is finished; start another one before logging")


class Tracker:
    """Start runs that are kept nowhere; `open_tracker` gives the one that keeps them.

    Attributes:
        uri: Where the runs can be seen, or None.
    """

    uri: str | None = None

    def start(
        self,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        parent: Run | None = None,
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

    def flush(self, seconds: float = SECONDS_AT_THE_END) -> bool:
        """Wait until everything is delivered or an attempt failed, and say whether it is delivered."""
        del seconds
        return True

    def close(self, seconds: float = SECONDS_AT_THE_END) -> None:
        """Deliver the last records, for so long at most; the process may end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(0.0 if isinstance(error, LeftAtOnce) else SECONDS_AT_THE_END)


class SpoolTracker(Tracker):
    """Keep records in `unsent` of the folder, from where `regrad sync` delivers them: nothing is sent from here."""

    def __init__(self, *, folder: Path, uri: str | None = None) -> None:
        self._folder, self._address = folder.resolve(), uri
        self._spool = new_spool(self._folder / UNSENT)
        self._warned: set[str] = set()
        self._closed = False

    def start(
        self,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        parent: Run | None = None,
    ) -> Run:
        """Begin a run; see `Tracker.start`."""
        run = super().start(experiment, run_name)
        about = {
            "experiment": experiment,
            "name": _printable(run_name),
            "parent": parent.id if parent else "",
        }
        place = {"address": self._address, "host": platform.node()}
        self.send(
            {"op": "start", "run": run.id, "time": time.time_ns() // 1_000_000, **about, **place}
        )
        values = [
            (_name(name), _printable(str(value))[:PARAM_LENGTH])
            for name, value in (params or {}).items()
        ]
        for part in _parts(values, PARAMS_PER_CALL):
            self.send({"op": "params", "run": run.id, "values": part})
        return run

    def send(self, record: Record) -> None:
        """Put one record on the disk."""
        if record["op"] == "artifact":
            record = record | {"path": self._spool.keep_file(Path(record["path"]))}
        self._spool.append(record)
        self._warn()

    def close(self, seconds: float = SECONDS_AT_THE_END) -> None:
        """Leave the records to others; only the first call counts."""
        del seconds
        if not self._closed:
            self._closed = True
            self._spool.leave()
            self._warn_of_losses()

    def _warn(self) -> None:
        """Warn once of each trouble, in the caller's thread, where a warning can be seen and filtered."""
        problem = self._spool.problem
        if problem is not None and "problem" not in self._warned:
            self._warned.add("problem")
            what = f"tracking cannot write to {self._spool.path}: {problem}; training goes on, what is not delivered"
            warnings.warn(f"{what} waits in memory", RegradWarning, stacklevel=4)

    def _warn_of_losses(self) -> bool:
        left, problem = self._spool.waiting, self._spool.problem
        if not left or problem is None:
            return False
        what = f"{left} tracking records could neither be sent nor written to {self._spool.path}"
        warnings.warn(
            f"{what}, those that are not there are lost: {problem}", RegradWarning, stacklevel=3
        )
        return True


class MlflowTracker(SpoolTracker):
    """Keep records in `unsent` of the folder, from where a thread of their own delivers them to MLflow.

    No call waits for MLflow, except the end, and that not for long. What an earlier process left in the folder for
    the same address is delivered too, and its open runs end as killed.
    """

    def __init__(self, *, folder: Path, uri: str | None = None) -> None:
        delivery = Delivery(folder.resolve(), uri)
        super().__init__(folder=folder, uri=uri)
        self.uri = delivery.shown
        self._delivery = delivery
        self._sender = Sender(delivery, self._spool, abandoned=self._abandoned)
        atexit.register(self.close)

    def start(
        self,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        parent: Run | None = None,
    ) -> Run:
        """Begin a run; see `Tracker.start`."""
        run = super().start(experiment, run_name, params, parent)
        self._sender.hurry()
        return run

    def send(self, record: Record) -> None:
        """Put one record on the disk, from where it is sent."""
        super().send(record)
        if record["op"] == "finish" or self._spool.waiting > METRICS_PER_CALL:
            self._sender.hurry()

    def flush(self, seconds: float = SECONDS_AT_THE_END) -> bool:
        """Wait until everything is delivered or an attempt failed, and say whether it is delivered."""
        return self._sender.flush(seconds)

    def close(self, seconds: float = SECONDS_AT_THE_END) -> None:
        """Deliver the rest, and say where it waits if that cannot be done in time; only the first call counts."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._sender.close(seconds, in_vain=SECONDS_IN_VAIN):
            self._spool.leave()
        self._warn_of_notes()
        left = self._spool.waiting
        if not self._warn_of_losses() and left:
            what = f"{left} tracking records wait in {self._folder / UNSENT}"
            warnings.warn(
                f"{what}; regrad sync {self._folder} delivers them", RegradWarning, stacklevel=2
            )

    def _abandoned(self) -> Iterator[Spool]:
        """Yield what processes left that are gone, for the same address."""
        for path in spools(self._folder / UNSENT):
            spool = None if path == self._spool.path else take_spool(path)
            if spool is None:
                continue
            if spool.address() == self._address:
                spool.take_up()
                yield spool
            else:
                spool.release()

    def _warn(self) -> None:
        outage = self._sender.outage
        if outage is not None and "outage" not in self._warned:
            self._warned.add("outage")
            first = str(outage).partition("\n")[0] or type(outage).__name__
            reason = without_secrets(first)
            what = f"tracking at {self.uri} failed: {reason}; training goes on, what is not delivered is kept in"
            warnings.warn(
                f"{what} {self._folder / UNSENT} and sent again", RegradWarning, stacklevel=5
            )
        self._warn_of_notes()
        super()._warn()

    def _warn_of_notes(self) -> None:
        while self._delivery.notes:
            warnings.warn(self._delivery.notes.pop(0), RegradWarning, stacklevel=6)


def open_tracker(
    kind: str = "mlflow", *, folder: Path, uri: str | None = None, sends: bool = True
) -> Tracker:
    """Return a tracker; call it in the main process only.

    Args:
        kind: "mlflow", or "none" for a tracker that does nothing and imports nothing.
        folder: Where `mlflow.db`, `artifacts/` and, while something waits, `unsent/` are; made if it does not exist.
        uri: Address of an MLflow server or database to use instead of the folder.
        sends: Whether records are sent from this process; otherwise `regrad sync` does that later.

    Raises:
        ValueError: If `kind` is unknown, or `uri` is not absolute or holds a password.
        DiskError: If `unsent` in the folder is a link or a file.
    """
    if kind == "none":
        return Tracker()
    if kind != "mlflow":
        raise ValueError(f"tracker must be 'mlflow' or 'none', got {kind!r}")
    if uri is not None:
        check_address(uri, "tracking uri")
    return MlflowTracker(folder=folder, uri=uri) if sends else SpoolTracker(folder=folder, uri=uri)


def _number(name: str, value: Any) -> float | None:
    """Return a metric as a float, or None with a warning: one odd metric must not end a training."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        warnings.warn(
            f"metric {name!r} must be one number, got {value!r}; left out",
            RegradWarning,
            stacklevel=3,
        )
        return None


def _name(name: str) -> str:
    """Return a name that MLflow takes: read as a path it is itself, and does not lead out of its folder."""
    kept = NOT_IN_NAMES.sub("_", name)[:NAME_LENGTH]
    stays = posixpath.normpath(kept) == kept and not kept.startswith(("/", "..")) and kept != "."
    return kept if stays else re.sub(r"[./]", "_", kept) or "_"


def _printable(text: str) -> str:
    """Return a text that a database takes: the name of a folder need not be one."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def _parts(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Cut a sequence into lists of at most `size`."""
    return (list(values[start : start + size]) for start in range(0, len(values), size))


@contextmanager
def tracked(start: Callable[[], Run]) -> Iterator[Run]:
    """Begin a run and end it with the block: finished, failed or killed, also where a signal comes in between.

    Args:
        start: Begins the run. A signal waits until it is known, and again while it is finished.
    """
    with ExitStack() as stack:
        with signals_wait():
            run = stack.enter_context(start())
        yield run
        with signals_wait():
            run.finish()
