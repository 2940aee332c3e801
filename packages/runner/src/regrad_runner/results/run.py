"""One run's record: a folder of its own, which is the truth about the run.

Whatever started the run, one command or one of many, it writes into its folder and nowhere else::

    runs/<arm>/<seed>/run.json        settings, versions, machine, how it ended and what came out
    runs/<arm>/<seed>/points.jsonl    one line per evaluation, probe, effect or other number
    runs/<arm>/<seed>/receipt.json    what the corrections did
    runs/<arm>/<seed>/traceback.txt   of a run that failed
    runs/<arm>/<seed>/nonfinite.csv   the last steps of a run that diverged
    runs/<arm>/<seed>/output.txt      what a script of the user's own printed
    runs/<arm>/<seed>/out/            what that script wrote there, where it takes {out}

A trial of a learning rate lies in `runs/<arm>/lr<rate>-seed<seed>`. Tables, figures and MLflow are
views of these folders and can be made again at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import time
import traceback
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from regrad.errors import RegradError, RegradWarning

from regrad_runner.addresses import without_secrets
from regrad_runner.errors import DiskError
from regrad_runner.files import append, make_folder, read_regular_file, write_whole
from regrad_runner.results.locks import RUNS, SECONDS_FOR_ORPHANS, is_held, writing_run
from regrad_runner.results.machine import machine
from regrad_runner.settings.arms import Arm, control_as_values
from regrad_runner.settings.config import Settings

RECORD = "run.json"
POINTS = "points.jsonl"
RECEIPT = "receipt.json"
TRACEBACK = "traceback.txt"
NOT_FINITE = "nonfinite.csv"
OUTPUT = "output.txt"
# Every file that a run may keep beside its record and points: no file's name is read from data.
KEPT_FILES = (RECEIPT, TRACEBACK, NOT_FINITE, OUTPUT)
# In bytes; no file of a run comes near.
LARGEST_RECORD = 2**24
LARGEST_POINTS = 2**29
LONGEST_FOLDER_NAME = 100
PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._=+-]*(?<![.])")
LIKE_A_NAME_WITH_DIGITS = re.compile(r".*-[0-9a-f]{8}")
DEVICES_OF_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")

Status = Literal["running", "finished", "diverged", "failed", "killed"]
ENDED = ("finished", "diverged", "failed", "killed")
NOT_A_NUMBER = Literal["nan", "inf", "-inf"]


class Line(BaseModel):
    """A line of `points.jsonl`.

    Attributes:
        kind: What was measured, such as "evaluation".
        step: Optimizer steps done.
        time: When, in milliseconds since 1970.
        values: Numbers by name; None if there is none.
        labels: What else tells lines of one step apart, such as the name of a correction.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    kind: str
    step: int
    time: int
    values: dict[str, float | NOT_A_NUMBER | None]
    labels: dict[str, str] = {}

    @classmethod
    def of(
        cls,
        kind: str,
        step: int,
        values: Mapping[str, float | None],
        *,
        time: int,
        labels: Mapping[str, str] | None = None,
    ) -> Self:
        """Return a line of numbers, of which some may not be finite."""
        as_json = {name: _as_json(value) for name, value in values.items()}
        return cls(kind=kind, step=step, time=time, values=as_json, labels=dict(labels or {}))

    def numbers(self) -> dict[str, float | None]:
        """Return the values, with those that are not finite as floats again."""
        return {
            name: float(value) if isinstance(value, str) else value
            for name, value in self.values.items()
        }


class WrittenPoints(BaseModel):
    """What `points.jsonl` of a run that ended must hold.

    Attributes:
        lines: How many lines.
        sha256: Of its bytes.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    lines: int
    sha256: str


class RunRecord(BaseModel):
    """What `run.json` says.

    Attributes:
        id: Of this attempt at the run; MLflow has it in the tag `regrad.run`.
        earlier: Ids of the attempts that this one replaced.
        name: As shown.
        arm: Name of the arm.
        seed: Its seed.
        lr: Learning rate.
        trial: Whether it is a run of the choice of a learning rate.
        corrections: Strings for `regrad.create`, in order.
        control: The trivial change that was made, for a control arm.
        settings: Resolved settings of the command.
        curves: What the numbers of each kind of line are called where curves are shown, by kind
            and name.
        machine: Where it ran, with the versions of the libraries.
        host: Name of that machine.
        started: When, in milliseconds since 1970.
        ended: When; None while it runs.
        status: How it ended. A run that was killed is left "running": see `status_of`.
        result: What came out.
        error: What ended it, in one line.
        points: What `points.jsonl` must hold; None while the run goes on.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", ser_json_inf_nan="constants")

    id: str = Field(pattern="^[0-9a-f]{32}$")
    earlier: list[str] = []
    name: str
    arm: str
    seed: int
    lr: float
    trial: bool = False
    corrections: list[str] = []
    control: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    curves: dict[str, dict[str, str]] = {}
    machine: dict[str, Any] = {}
    host: str = ""
    started: int
    ended: int | None = None
    status: Status = "running"
    result: dict[str, Any] | None = None
    error: str = ""
    points: WrittenPoints | None = None


def folder_name(name: str) -> str:
    """Return the folder's name for a name: the same if it is plain, else its letters and a hash.

    No two names give the same folder, even where a file system ignores case. `run.json` has the
    name itself.

    Example:
        >>> folder_name("xgrad+agc"), folder_name("..")
        ('xgrad+agc', '_-5ec1f7e7')
    """
    is_plain = PLAIN_NAME.fullmatch(name) and not DEVICES_OF_WINDOWS.fullmatch(name)
    if is_plain and len(name) <= LONGEST_FOLDER_NAME and not LIKE_A_NAME_WITH_DIGITS.match(name):
        return name
    letters = re.sub(r"[^a-z0-9._=+-]+", "_", name.lower())[:LONGEST_FOLDER_NAME].strip(".=+-")
    return f"{letters or '_'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_names(arm: str, seed: int, trial_lr: float | None = None) -> tuple[str, str, str]:
    """Return the names of the folders that lead to a run's, from the output folder.

    Args:
        arm: Name of the arm.
        seed: Its seed.
        trial_lr: Learning rate of a trial; None for a run that is compared.
    """
    seed_folder = str(seed) if trial_lr is None else f"lr{trial_lr!r}-seed{seed}"
    return RUNS, folder_name(arm), seed_folder


def run_path(folder: Path, arm: str, seed: int, trial_lr: float | None = None) -> Path:
    """Return the folder of a run, which need not exist; see `run_names`."""
    return folder.joinpath(*run_names(arm, seed, trial_lr))


def run_paths(folder: Path) -> list[Path]:
    """Return the folders of all runs in an output folder: those with a record and not links."""
    runs = folder / RUNS
    if runs.is_symlink():
        return []
    found = []
    for arm in sorted(runs.glob("*")):
        if arm.is_symlink() or not arm.is_dir():
            continue
        found += [path for path in sorted(arm.glob("*")) if _holds_record(path)]
    return found


def _holds_record(path: Path) -> bool:
    return not path.is_symlink() and os.path.lexists(path / RECORD)


def read_record(path: Path) -> RunRecord:
    """Return what the record of a run says.

    Args:
        path: The run's folder.

    Raises:
        ValueError: If there is none, or something else in its place.
    """
    file = path / RECORD
    try:
        record = RunRecord.model_validate_json(read_regular_file(file, largest=LARGEST_RECORD))
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"'{file}' must be the record of a run, got {_reason(problem)}; "
            f"take it from a copy of the folder, or remove '{path}' and run it again"
        ) from None
    place = run_names(record.arm, record.seed, record.lr if record.trial else None)
    if path.parts[-2:] != place[-2:]:
        raise ValueError(
            f"'{file}' must be the record of the run that its folder is named after, got that of "
            f"'{'/'.join(place)}'; move it back"
        )
    return record


def status_of(path: Path, record: RunRecord) -> Status:
    """Return how a run ended: one that says "running" while no process holds it was killed."""
    if record.status != "running" or is_held(path):
        return record.status
    latest = read_record(path)  # it may have ended since it was read
    return "killed" if latest.status == "running" else latest.status


def read_points(path: Path, record: RunRecord | None = None) -> list[Line]:
    """Return the lines of a run's points; a torn last line, which a kill leaves, is left out.

    Args:
        path: The run's folder.
        record: Of the run; one that ended knows how many lines there must be.

    Raises:
        ValueError: If the file holds something else, or not all of it.
    """
    file = path / POINTS
    try:
        whole = _whole_lines(file)
    except OSError as problem:
        raise ValueError(
            f"'{file}' must be a file that can be read, got {_reason(problem)}"
        ) from None
    if record is not None and record.points is not None and _seal(whole) != record.points:
        raise ValueError(
            f"'{file}' must be unchanged since it was written, got a changed or incomplete file; "
            f"take it from a copy of the folder, or remove '{path}' and run it again"
        )
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(Line.model_validate_json(line))
        except ValidationError as problem:
            raise ValueError(
                f"'{file}' must hold a point in line {number}, got {_reason(problem)}"
            ) from None
    return lines


def run_values(
    config: Settings,
    arm: Arm,
    *,
    name: str,
    seed: int,
    lr: float,
    trial: bool = False,
    curves: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Return what the record of a run says before it begins.

    Args:
        config: Resolved settings of the command.
        arm: The run's.
        name: As shown.
        seed: Its seed.
        lr: Learning rate.
        trial: Whether it is a run of the choice of a learning rate.
        curves: What the numbers of each kind of line are called where curves are shown.
    """
    return {
        "name": name,
        "arm": arm.name,
        "seed": seed,
        "lr": lr,
        "trial": trial,
        "corrections": list(arm.corrections),
        "control": control_as_values(arm.control) if arm.control else None,
        "settings": config.model_dump(mode="json"),
        "curves": {kind: dict(names) for kind, names in curves.items()},
        "machine": machine(),
        "host": platform.node(),
    }


class RunLog:
    """What a run reports; this one keeps nothing, for the processes that do not write."""

    def log(
        self,
        kind: str,
        step: int,
        values: Mapping[str, float | None],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Keep numbers of one step.

        Args:
            kind: What was measured, such as "evaluation".
            step: Optimizer steps so far.
            values: Numbers by name.
            labels: What else tells lines of one step apart.
        """

    def keep(self, name: str, content: str) -> None:
        """Keep a file.

        Args:
            name: One of `KEPT_FILES`.
            content: Its text.
        """

    def end(
        self, status: Status, *, result: Mapping[str, Any] | None = None, error: str = ""
    ) -> None:
        """Say how the run ended; only the first call counts.

        Args:
            status: One of `ENDED`.
            result: What came out.
            error: Traceback of what ended it.
        """

    def let_go(self) -> None:
        """Release the folder."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the run: failed after an error, killed after Ctrl-C or SIGTERM.

        After a disk error nothing more is written, and the run counts as killed.
        """
        if error is None:
            self.end("killed", error="it ended without a result")
            return
        if isinstance(error, DiskError):
            self.let_go()
            return
        told = without_secrets("".join(traceback.format_exception(error)))
        self.end("failed" if isinstance(error, Exception) else "killed", error=told)


class RunWriter(RunLog):
    """Writes the folder of one run, which nobody else writes meanwhile; made by `begin_run`.

    Args:
        path: The run's folder.
        record: Of the run.
        held: Releases the folder when it is closed.
        size: Bytes of the points that are there.
    """

    def __init__(self, path: Path, record: RunRecord, held: ExitStack, *, size: int = 0) -> None:
        self.path = path
        self.record = record
        self._held = held
        self._size = size
        self._waiting: list[str] = []

    def start(self, lines: Iterable[Line]) -> None:
        """Write the record and the points that an earlier attempt left to this one."""
        _write_record(self.path, self.record)
        content = "".join(_as_text(line) for line in lines).encode()
        write_whole(self.path / POINTS, content)
        self._size = len(content)
        for name in KEPT_FILES:
            (self.path / name).unlink(missing_ok=True)

    def log(
        self,
        kind: str,
        step: int,
        values: Mapping[str, float | None],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Keep numbers of one step; see `RunLog.log`.

        On a full disk they wait in memory until there is room.
        """
        if self.record.status != "running":
            raise RegradError(
                f"run {self.record.name!r} has ended; begin another one before logging"
            )
        numbers = {name: value for name, value in values.items() if _is_number(name, value)}
        line = Line.of(kind, step, numbers, time=now(), labels=labels)
        self._waiting.append(_as_text(line))
        try:
            self._write_waiting()
        except DiskError:
            return  # there may be room next time; the end of the run raises

    def keep(self, name: str, content: str) -> None:
        """Keep a file; see `RunLog.keep`."""
        if name not in KEPT_FILES:
            raise ValueError(f"name must be one of {', '.join(KEPT_FILES)}, got {name!r}")
        write_whole(self.path / name, content)

    def end(
        self, status: Status, *, result: Mapping[str, Any] | None = None, error: str = ""
    ) -> None:
        """Say how the run ended; see `RunLog.end`.

        Raises:
            DiskError: If it cannot be written to disk; the run then counts as killed.
        """
        if self.record.status != "running":
            return
        with self._held:
            self._write_waiting()
            if error:
                self.keep(TRACEBACK, error)
            self.record = self.record.model_copy(
                update={
                    "status": status,
                    "ended": now(),
                    "result": None if result is None else dict(result),
                    "error": _last_line(error),
                    "points": _seal(read_regular_file(self.path / POINTS, largest=LARGEST_POINTS)),
                }
            )
            _write_record(self.path, self.record)

    def let_go(self) -> None:
        """Release the folder; see `RunLog.let_go`."""
        self._held.close()

    def _write_waiting(self) -> None:
        text = "".join(self._waiting)
        append(self.path / POINTS, text, at=self._size)
        self._size += len(text.encode())
        self._waiting.clear()


def begin_run(folder: Path, values: Mapping[str, Any], *, lines: Iterable[Line] = ()) -> RunWriter:
    """Begin a run in its own folder; what an earlier attempt left there is replaced.

    Args:
        folder: The output folder.
        values: Of the record: see `RunRecord`, without id and times.
        lines: Points that an earlier attempt left to this one.

    Raises:
        ValueError: If another process writes this run.
        DiskError: If it cannot be written to disk.
    """
    trial_lr = values["lr"] if values.get("trial") else None
    path = make_folder(folder, *run_names(values["arm"], values["seed"], trial_lr))
    lines = list(lines)
    with ExitStack() as stack:
        stack.enter_context(writing_run(path))
        earlier = _earlier_ids(path)
        record = RunRecord(**values, id=uuid.uuid4().hex, started=now(), earlier=earlier)
        writer = RunWriter(path, record, stack.pop_all())
    try:
        writer.start(lines)
    except BaseException:
        writer.let_go()
        raise
    return writer


def end_abandoned(
    folder: Path,
    values: Mapping[str, Any],
    *,
    status: Status,
    result: Mapping[str, Any] | None = None,
    error: str,
) -> None:
    """Record how a run ended whose process is gone.

    Args:
        folder: The output folder.
        values: As for `begin_run`, for a run that had not begun.
        status: One of `ENDED`.
        result: What came out.
        error: What ended it.
    """
    trial_lr = values["lr"] if values.get("trial") else None
    path = run_path(folder, values["arm"], values["seed"], trial_lr)
    record = _running_record(path)
    if record is None:
        with begin_run(folder, values) as writer:
            writer.end(status, result=result, error=error)
        return
    with ExitStack() as stack:
        stack.enter_context(writing_run(path, seconds=SECONDS_FOR_ORPHANS))
        size = len(_whole_lines(path / POINTS))
        writer = RunWriter(path, record, stack.pop_all(), size=size)
    writer.end(status, result=result, error=error)


def _running_record(path: Path) -> RunRecord | None:
    """Return the record of a run that began and did not end; None if there is none."""
    if not os.path.lexists(path / RECORD):
        return None
    record = read_record(path)
    return record if record.status == "running" else None


def as_json_text(value: Mapping[str, Any]) -> str:
    """Return what a file of a run holds for a receipt or the like."""
    return json.dumps(value, indent=2) + "\n"


def _earlier_ids(path: Path) -> list[str]:
    """Return the ids of the attempts that were made at a run."""
    if not os.path.lexists(path / RECORD):
        return []
    earlier = read_record(path)
    return [*earlier.earlier, earlier.id]


def _whole_lines(file: Path) -> bytes:
    """Return a file's lines without a torn last one; nothing if a kill left no file."""
    if not os.path.lexists(file):
        return b""
    content = read_regular_file(file, largest=LARGEST_POINTS)
    return content[: content.rfind(b"\n") + 1]


def _write_record(path: Path, record: RunRecord) -> None:
    write_whole(path / RECORD, record.model_dump_json(indent=1) + "\n")


def _as_text(line: Line) -> str:
    return line.model_dump_json(exclude_defaults=True) + "\n"


def _is_number(name: str, value: Any) -> bool:
    """Say whether a value is a number or None; warn if not: one odd metric must not end a run."""
    try:
        return value is None or float(value) is not None
    except (TypeError, ValueError, RuntimeError):
        warnings.warn(
            f"metric {name!r} must be one number, got {value!r}; left out",
            RegradWarning,
            stacklevel=4,
        )
        return False


def _as_json(value: float | None) -> float | NOT_A_NUMBER | None:
    """Return a number as JSON can hold it."""
    if value is None:
        return None
    number = float(value)
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return "nan"
    return "inf" if number > 0 else "-inf"


def _seal(content: bytes) -> WrittenPoints:
    return WrittenPoints(lines=content.count(b"\n"), sha256=hashlib.sha256(content).hexdigest())


def _last_line(error: str) -> str:
    lines: Sequence[str] = error.strip().splitlines()
    return lines[-1] if lines else ""


def now() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _reason(problem: Exception) -> str:
    if isinstance(problem, ValidationError):
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else first["msg"]
    if isinstance(problem, OSError) and problem.strerror:
        return repr(problem.strerror)
    return str(problem) or type(problem).__name__
