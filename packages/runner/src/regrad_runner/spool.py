"""What waits to be sent, on the disk: a record is there before anything is sent, and stays until it is noted as sent.

Each process that tracks has a folder of its own in `unsent`, and holds its lock as long as it lives::

    unsent/20260102-030405-1a2b3c4d.lock
    unsent/20260102-030405-1a2b3c4d/records.jsonl    one JSON object per line, only ever appended to
    unsent/20260102-030405-1a2b3c4d/sent.json        how many bytes of it are delivered, and the server's run ids
    unsent/20260102-030405-1a2b3c4d/files/           copies of attached files
    unsent/20260102-030405-1a2b3c4d/refused.jsonl    records that the server will never take, with its reason

The operating system has a record when `Spool.append` returns, so that killing the process loses none.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Record = dict[str, Any]
READ_AT_ONCE = 1000


@dataclass
class Sent:
    """What was delivered.

    Attributes:
        offset: Bytes of the records.
        runs: By our run id the server's experiment id and run id.
    """

    offset: int = 0
    runs: dict[str, list[str]] = field(default_factory=dict)


class Spool:
    """The records of one process, in order; made by `new_spool` and `take_spool`, which see that nobody else has it.

    Args:
        path: Its folder in `unsent`.
        lock: Held until `leave`.

    Attributes:
        waiting: Records that are not delivered.
        sent: What was delivered; `note_sent` keeps it on the disk.
        problem: Why records could not be written and wait in memory; None if all are on the disk.
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self.waiting = 0
        self.sent = Sent()
        self.problem: OSError | None = None
        self._file_lock = lock
        self._unwritten: list[bytes] = []
        self._size = 0
        self._mutex = threading.Lock()

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
        """Copy a file aside and return what `file` finds it by: the file itself, where there is no room for a copy."""
        copy = self.path / "files" / uuid.uuid4().hex[:8] / path.name
        try:
            copy.parent.mkdir(parents=True)
            shutil.copyfile(path, copy)
        except OSError:
            self.forget_file(copy)
            return str(path.resolve())
        return copy.relative_to(self.path).as_posix()

    def file(self, name: str) -> Path:
        """Return where a file is."""
        return self.path / name

    def forget_file(self, path: Path) -> None:
        """Remove a file if it is a copy."""
        if path.is_relative_to(self.path):
            shutil.rmtree(path.parent, ignore_errors=True)

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
            with suppress(OSError):  # then the next process sends them again, which changes nothing
                aside = self.path / ".sent.json.part"
                aside.write_text(json.dumps(asdict(self.sent)), encoding="utf-8")
                aside.replace(self.path / "sent.json")

    def refuse(self, line: bytes, reason: str) -> None:
        """Put a record aside that the server will never take."""
        refused = {"reason": reason, "record": _record(line)}
        with suppress(OSError), (self.path / "refused.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(refused) + "\n")

    def take_up(self) -> int:
        """Go on with what a process left that is gone, and end its open runs as killed.

        Returns:
            How many of the records that wait are such ends.
        """
        self._cut_torn_line()
        with suppress(
            OSError, ValueError, TypeError
        ):  # then all is sent again, which changes nothing
            self.sent = Sent(**json.loads((self.path / "sent.json").read_text(encoding="utf-8")))
        still_open, last, ends = dict[str, None](), 0, 0
        for start, record in self._all():
            self.waiting += start >= self.sent.offset
            ends += start >= self.sent.offset and "killed" in record
            last = max(last, record.get("time", 0))
            if record["op"] == "start":
                still_open[record["run"]] = None
            elif record["op"] == "finish":
                still_open.pop(record["run"], None)
        for run in reversed(still_open):
            end = {"op": "finish", "run": run, "status": "KILLED", "time": last, "killed": True}
            self.append(end | {"error": "the process was killed without a word"})
        return ends + len(still_open)

    def address(self) -> str | None:
        """Return where the records go; None for the database in the output folder."""
        with (self.path / "records.jsonl").open("rb") as file:
            return _record(next(file, b"")).get("address")

    def release(self) -> None:
        """Let go of it as it is."""
        self._file_lock.release()

    def leave(self) -> None:
        """Let go; remove what is delivered, which is everything unless records wait or were refused."""
        if not self.waiting:
            shutil.rmtree(self.path / "files", ignore_errors=True)
            for name in (
                ".sent.json.part",
                "sent.json",
                "records.jsonl",
                self._file_lock.lock_file,
            ):
                with suppress(OSError):
                    (self.path / name).unlink()
        self.release()
        for folder in (self.path, self.path.parent):
            with suppress(OSError):  # there is more in it
                folder.rmdir()

    def _write(self) -> None:
        """Write all that is unwritten, or nothing of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        data = memoryview(b"".join(self._unwritten))
        size = self._size + len(data)
        file = os.open(self.path / "records.jsonl", os.O_WRONLY | os.O_CREAT, 0o644)
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
    """
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    return Spool(path, _lock(path))


def spools(folder: Path) -> list[Path]:
    """Return the spools in a folder, oldest first.

    Args:
        folder: `unsent`; may be missing.
    """
    return sorted(path.parent for path in folder.glob("*/records.jsonl"))


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
    if (path / "records.jsonl").is_file():
        return spool
    spool.leave()
    return None


def _lock(path: Path) -> FileLock:
    """Lock a spool for as long as the process lives, whichever thread releases it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", timeout=0, thread_local=False)
    lock.acquire()
    return lock


def _record(line: bytes) -> Record:
    """Read a line; a damaged one is a record that is refused."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {"op": "unreadable", "line": line.decode(errors="replace")}
