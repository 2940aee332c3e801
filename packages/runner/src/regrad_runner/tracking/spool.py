"""What waits to be sent, on the disk: a record is there before anything is sent, and stays until it is noted as sent.

Each process that tracks has a folder of its own in `unsent`, and holds its lock as long as it lives::

    unsent/20260102-030405-1a2b3c4d.lock
    unsent/20260102-030405-1a2b3c4d/records.jsonl    one JSON object per line, only ever appended to
    unsent/20260102-030405-1a2b3c4d/sent.json        how many bytes of it are delivered, and the server's run ids
    unsent/20260102-030405-1a2b3c4d/files/           copies of attached files
    unsent/20260102-030405-1a2b3c4d/refused.jsonl    records that the server will never take, with its reason

The operating system has a record when `Spool.append` returns, so that killing the process loses none.

A folder may come from anywhere, so nothing in it is trusted: links are refused, a record is of a known form or
unreadable, and the file that it names is one that lies in `files/`, or none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from regrad_runner.errors import DiskError
from regrad_runner.files import NO_LINK, OWN, append, check_own_folder, read_bytes, write_whole

Record = dict[str, Any]
READ_AT_ONCE = 1000
NAME = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
COPY = re.compile(r"files/([0-9a-f]{8})/([^/\0]+)")
# Of a run, by which it is looked for in MLflow: no quote in it.
OwnId = Annotated[str, Field(pattern=r"^[\w -]{1,64}$")]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    run: str


class _Start(_Form):
    op: Literal["start"]
    run: OwnId
    time: int
    experiment: str
    name: str = ""
    parent: str = Field(default="", pattern=r"^[\w -]{0,64}$")
    address: str | None = None
    host: str = ""


class _Metrics(_Form):
    op: Literal["metrics"]
    values: list[tuple[str, float, int, int]]
    time: int = 0


class _Params(_Form):
    op: Literal["params"]
    values: list[tuple[str, str]]


class _Artifact(_Form):
    op: Literal["artifact"]
    path: str


class _Text(_Form):
    op: Literal["text"]
    name: Literal["traceback.txt"]
    text: str


class _Finish(_Form):
    op: Literal["finish"]
    run: OwnId
    status: Literal["FINISHED", "FAILED", "KILLED"]
    time: int
    error: str = ""


FORMS: TypeAdapter[Any] = TypeAdapter(
    Annotated[_Start | _Metrics | _Params | _Artifact | _Text | _Finish, Field(discriminator="op")]
)


@dataclass
class Sent:
    """What was delivered.

    Attributes:
        offset: Bytes of the records.
        runs: By our run id the server's experiment id and run id.
    """

    offset: int = 0
    runs: dict[str, list[str]] = field(default_factory=dict)


SENT = TypeAdapter(Sent)


class Spool:
    """The records of one process, in order; made by `new_spool` and `take_spool`, which see that nobody else has it.

    Args:
        path: Its folder in `unsent`.
        lock: Held until `leave`.

    Attributes:
        waiting: Records that are not delivered.
        delivered: Records that were, by this object.
        sent: What was delivered; `note_sent` keeps it on the disk.
        problem: Why records could not be written and wait in memory; None if all are on the disk.
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self.waiting = 0
        self.delivered = 0
        self.sent = Sent()
        self.problem: OSError | None = None
        self._file_lock = lock
        self._unwritten: list[bytes] = []
        self._size = 0
        self._mutex = threading.Lock()
        self._without_copy: dict[str, Path] = {}

    def append(self, record: Record) -> None:
        """Take one record. On a full disk it waits in memory, and `problem` says so."""
        with self._mutex:
            self._unwritten.append(json.dumps(record).encode() + b"\n")
            self.waiting += 1
            try:
                self._write()
                self.problem = None
            except OSError as problem:
                self.problem = problem

    def keep_file(self, path: Path) -> str:
        """Copy a file aside and return the name by which `file` finds the copy.

        Where there is no room for a copy, `file` finds the file itself, as long as this process lives.
        """
        name = f"files/{uuid.uuid4().hex[:8]}/{path.name}"
        copy = self.path / name
        try:
            self._make_own_folder()
            copy.parent.mkdir(parents=True)
            shutil.copyfile(path, copy)
        except OSError:
            self.forget_file(name)
            self._without_copy[name] = path.resolve()
        return name

    def file(self, name: str) -> Path | None:
        """Return where a file is that a record names; None unless it is a file that was copied here.

        Args:
            name: From a record, which may say anything.
        """
        if name in self._without_copy:
            return self._without_copy[name]
        copy = self._copy(name)
        return copy if copy is not None and copy.is_file() else None

    def forget_file(self, name: str) -> None:
        """Remove the copy that a record names, and nothing else."""
        self._without_copy.pop(name, None)
        copy = self._copy(name)
        if copy is None:
            return
        with suppress(OSError):
            copy.unlink()
        with suppress(OSError):  # there is more in it
            copy.parent.rmdir()

    def _copy(self, name: str) -> Path | None:
        """Return the place of a copy; None where the name leads anywhere else, by dots, links or otherwise."""
        parts = COPY.fullmatch(name)
        if parts is None or parts[2] in (".", ".."):
            return None
        copy = self.path / "files" / parts[1] / parts[2]
        own = self.path.resolve() / "files" / parts[1] / parts[2]
        return copy if copy.resolve() == own else None

    def read(self) -> list[tuple[bytes, Record]]:
        """Return the next records to send, each with its line; at most `READ_AT_ONCE`, none where none wait."""
        with self._mutex:
            lines = self._lines(self.sent.offset) or self._unwritten[:READ_AT_ONCE]
        return [(line, _record(line)) for line in lines]

    def note_sent(self, lines: Sequence[bytes]) -> None:
        """Note that the first lines of what `read` returned are delivered."""
        with self._mutex:
            if self._unwritten and self._unwritten[0] is lines[0]:
                del self._unwritten[: len(lines)]
            else:
                self.sent.offset += sum(map(len, lines))
            self.waiting -= len(lines)
            self.delivered += len(lines)
            self._keep_sent()

    def send_again(self) -> None:
        """Let all that is on the disk wait again: the database that it was delivered to is no more."""
        with self._mutex:
            unwritten = len(self._unwritten)
            self.sent = Sent()
            self.waiting = sum(1 for _ in self._all()) + unwritten
            self._keep_sent()

    def _keep_sent(self) -> None:
        with suppress(DiskError):  # then the next process sends them again, which changes nothing
            write_whole(self.path / "sent.json", json.dumps(asdict(self.sent)), mode=OWN)

    def refuse(self, line: bytes, reason: str) -> None:
        """Put a record aside that the server will never take."""
        refused = {"reason": reason, "record": _record(line)}
        with suppress(DiskError):
            append(self.path / "refused.jsonl", json.dumps(refused) + "\n", mode=OWN)

    def take_up(self, *, end_runs: bool = True) -> int:
        """Go on with what a process left that is gone, and end its open runs as killed.

        Args:
            end_runs: Whether to do so; otherwise nothing is added.

        Returns:
            How many of the records that wait are such ends.
        """
        self._cut_torn_line()
        starts = {0, self._size}
        starts.update(start for start, _ in self._all())
        with suppress(OSError, ValueError):  # then all is sent again, which changes nothing
            sent = SENT.validate_json(read_bytes(self.path / "sent.json"), strict=True)
            whole = all(len(ids) == 2 for ids in sent.runs.values())
            if whole and sent.offset in starts:
                self.sent = sent
        still_open, last, ends = dict[str, None](), 0, 0
        for start, record in self._all():
            self.waiting += start >= self.sent.offset
            ends += start >= self.sent.offset and "killed" in record
            last = max(last, record.get("time", 0))
            if record["op"] == "start":
                still_open[record["run"]] = None
            elif record["op"] == "finish":
                still_open.pop(record["run"], None)
        if not end_runs:
            return ends
        for run in reversed(still_open):
            end = {"op": "finish", "run": run, "status": "KILLED", "time": last, "killed": True}
            self.append(end | {"error": "the process was killed without a word"})
        return ends + len(still_open)

    def address(self) -> str | None:
        """Return where the records were to go; None for the database in the output folder."""
        with (self.path / "records.jsonl").open("rb") as file:
            address = _record(next(file, b"")).get("address")
        return address if isinstance(address, str) else None

    def release(self) -> None:
        """Let go of it as it is."""
        self._file_lock.release()

    def leave(self) -> None:
        """Let go; remove what is delivered, which is everything unless records wait or were refused."""
        if not self.waiting and not self.path.is_symlink():
            self._remove_copies()
            for name in ("sent.json", "records.jsonl"):
                with suppress(OSError):
                    (self.path / name).unlink()
            with suppress(OSError):
                Path(self._file_lock.lock_file).unlink()
        self.release()
        for folder in (self.path, self.path.parent):
            with suppress(OSError):  # there is more in it
                folder.rmdir()

    def _remove_copies(self) -> None:
        """Remove the copies that are left, and their folders where nothing else is in them."""
        for copy in (self.path / "files").glob("*/*"):
            self.forget_file(f"files/{copy.parent.name}/{copy.name}")
        with suppress(OSError):
            (self.path / "files").rmdir()

    def _make_own_folder(self) -> None:
        """Make its folder, which nobody else may read: records hold what scripts log."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)

    def _write(self) -> None:
        """Write all that is unwritten, or nothing of it."""
        self._make_own_folder()
        data = memoryview(b"".join(self._unwritten))
        size = self._size + len(data)
        file = os.open(self.path / "records.jsonl", os.O_WRONLY | os.O_CREAT | NO_LINK, OWN)
        try:
            os.lseek(file, self._size, os.SEEK_SET)
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, self._size)
            raise
        finally:
            os.close(file)
        self._size = size
        self._unwritten.clear()

    def _lines(self, offset: int) -> list[bytes]:
        if offset >= self._size:
            return []
        with (self.path / "records.jsonl").open("rb") as file:
            file.seek(offset)
            lines = list(islice(file, READ_AT_ONCE))
        while offset + sum(map(len, lines)) > self._size:
            lines.pop()  # what a signal broke off is written again
        return lines

    def _all(self) -> Iterator[tuple[int, Record]]:
        """Yield where each record starts, and the record."""
        offset = 0
        while lines := self._lines(offset):
            for line in lines:
                yield offset, _record(line)
                offset += len(line)

    def _cut_torn_line(self) -> None:
        path = self.path / "records.jsonl"
        self._size = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, self._size)


def new_spool(folder: Path) -> Spool:
    """Return an empty spool for this process.

    Args:
        folder: `unsent`; made if it does not exist.

    Raises:
        DiskError: If it is a link or a file.
    """
    check_own_folder(folder)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    return Spool(path, _lock(path))


def spools(folder: Path) -> list[Path]:
    """Return the spools in a folder, oldest first: folders named as `new_spool` names them, and no link among them.

    Args:
        folder: `unsent`; may be missing.
    """
    if folder.is_symlink():
        return []
    return sorted(path for path in folder.glob("*") if _is_spool(path))


def take_spool(path: Path) -> Spool | None:
    """Return a spool whose process is gone; None if it lives, or another process takes care or took care of it.

    Args:
        path: One of `spools`, which may be gone by now.
    """
    try:
        lock = _lock(path)
    except Timeout:
        return None
    spool = Spool(path, lock)
    if _is_spool(path):
        return spool
    spool.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    return None


def _is_spool(path: Path) -> bool:
    """Say whether a folder holds records, and neither it nor anything in it that is read or removed is a link."""
    inside = [path / name for name in ("records.jsonl", "sent.json", "refused.jsonl", "files")]
    linked = any(found.is_symlink() for found in (path, *inside))
    return bool(NAME.fullmatch(path.name)) and not linked and (path / "records.jsonl").is_file()


def _lock(path: Path) -> FileLock:
    """Lock a spool for as long as the process lives, whichever thread releases it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if Path(f"{path}.lock").is_symlink():
        raise DiskError(f"'{path}.lock' must be a lock file, got a link; move it away")
    lock = FileLock(f"{path}.lock", timeout=0, thread_local=False)
    lock.acquire()
    return lock


def _record(line: bytes) -> Record:
    """Read a line; a damaged one, or one of another form, is a record that is refused."""
    try:
        record = json.loads(line)
        FORMS.validate_json(line)
    except (ValueError, RecursionError, ValidationError):
        return {"op": "unreadable", "line": line.decode(errors="replace")}
    return dict(record)
