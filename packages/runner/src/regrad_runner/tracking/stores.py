"""Stores of MLflow: a server, a database that the user named, or an output folder's SQLite file.

The folder's own file is made whole or not at all, is never opened through a link, and is set aside
when it is damaged: it holds nothing that the runs' folders do not hold.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from regrad_runner.addresses import shown_address
from regrad_runner.errors import DiskError
from regrad_runner.files import PART, keep_damaged, remove_left_over, unforeseeable, write_whole

DATABASE = "mlflow.db"
ARTIFACTS = "artifacts"
# What SQLite reads and writes beside a database.
BESIDE = ("", "-journal", "-wal", "-shm", ".lock")
SECONDS_FOR_OTHERS = 30.0
SECONDS_FOR_THE_SCHEMA = 300.0
# What MLflow's migrations say about a schema whose creation was interrupted.
HALF_MADE = ("duplicate column name", "already exists")

# Set before MLflow is imported, and only if the user has not set them: no telemetry, no links
# printed, and one short attempt per request. The next projection is the next attempt.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# The files that this process opened at a path: MLflow keeps its connection to an address for good.
_opened: dict[Path, list[tuple[int, int]]] = {}


class Store:
    """A way to one MLflow server or database. Making one connects to nothing.

    Args:
        folder: The output folder.
        address: The server's or database's; None for the database in the folder.

    Attributes:
        uri: The address.
        shown: The address as it may be shown.
        artifacts: Where the folder's own database keeps files; None for another store.
        notes: What to tell the user, such as that a damaged database was set aside.
    """

    def __init__(self, folder: Path, address: str | None = None) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow.tracking  # noqa: F401, PLC0415  (seconds, and not while two threads import)

        # We report a failure in one line; other output would break a live display.
        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        folder = folder.resolve()
        self.uri = address or f"sqlite:///{(folder / DATABASE).as_posix()}"
        self.shown = shown_address(self.uri)
        self.artifacts = None if address else folder / ARTIFACTS
        self.notes: list[str] = []
        self._noted: set[str] = set()
        self._client: Any = None
        self._identity: tuple[int, int] | None = None

    @property
    def artifact_location(self) -> str | None:
        """Address at which runs keep their files; None if the store decides."""
        return self.artifacts.as_uri() if self.artifacts else None

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for another kind of database or a server."""
        scheme, _, path = self.uri.partition(":///")
        return Path(path.partition("?")[0]) if scheme == "sqlite" else None

    def client(self) -> Any:
        """Return MLflow's client; the folder's database is made, or recreated, if need be.

        Raises:
            DiskError: If there is something else in the place of the database.
            Exception: What MLflow or its connection raises.
        """
        if self._client is None or self._is_another_file():
            self._client = self._connected()
        return self._client

    def note(self, text: str) -> None:
        """Note something to tell the user, once."""
        if text not in self._noted:
            self._noted.add(text)
            self.notes.append(text)

    def forget(self) -> None:
        """Look at the database again before it is used the next time: something failed."""
        self._client = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from a SQLite file; a server looks after itself."""
        if self.file is None:
            yield
            return
        check_is_file(self.file, own=self._is_own)
        with FileLock(f"{self.file}.lock", timeout=SECONDS_FOR_THE_SCHEMA):
            yield

    @property
    def _is_own(self) -> bool:
        return self.artifacts is not None

    def _is_another_file(self) -> bool:
        """Say whether the file was removed or replaced since it was opened."""
        return self.file is not None and _identity_of(self.file) != self._identity

    def _connected(self) -> Any:
        from mlflow.tracking import MlflowClient  # noqa: PLC0415 - it takes seconds

        file = self.file
        if file is None:
            return MlflowClient(self.uri)
        file.parent.mkdir(parents=True, exist_ok=True)
        with self.alone():
            told = prepare(file, own=self._is_own)
            if told:
                self.note(told)
            try:
                client = MlflowClient(_own_uri(file, self.uri))
            except Exception as problem:
                if not (self._is_own and is_half_made(problem)):
                    raise
                self.note(put_aside(file, str(problem).partition("\n")[0]))
                prepare(file, own=True)
                client = MlflowClient(_own_uri(file, self.uri))
            self._identity = _identity_of(file)
        return client


def _own_uri(file: Path, uri: str) -> str:
    """Return an address under which MLflow has opened no other file, such as one replaced since."""
    identities = _opened.setdefault(file, [])
    identity = _identity_of(file)
    if identity is None:
        return uri
    if identity not in identities:
        identities.append(identity)
    steps = "./" * identities.index(identity)
    _, question, query = uri.partition("?")
    return f"sqlite:///{file.parent.as_posix()}/{steps}{file.name}{question}{query}"


def _identity_of(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def prepare(path: Path, *, own: bool) -> str | None:
    """Make sure that a database can be opened.

    A missing one is created, and a damaged one of ours is set aside. Only one process may call this
    at a time. Creating a schema takes seconds.

    Args:
        path: The file.
        own: Whether it is the database of an output folder, which may be recreated, and not one
            that the user named.

    Returns:
        A line for the user if a damaged one was set aside, else None.

    Raises:
        DiskError: If it is a link, a folder, or damaged and not ours, or if it cannot be written.
        sqlite3.OperationalError: If it cannot be read because another program holds it.
    """
    check_is_file(path, own=own)
    remove_left_over(path.parent, path.name)
    fault = fault_of(path) if path.exists() else None
    if fault is not None and not own:
        raise DiskError(
            f"database '{path}' must be an MLflow database, but {fault}; move it away or repair it"
        )
    told = put_aside(path, fault) if fault is not None else None
    if not path.exists():
        _make(path)
    return told


def check_is_file(path: Path, *, own: bool) -> None:
    """Raise a `DiskError` if a database, or a file of SQLite beside it, is a link or a folder."""
    for ending in BESIDE:
        found = path.with_name(path.name + ending)
        linked = found.is_symlink() and (own or ending != "")
        if linked or (found.exists() and not found.is_file()):
            raise DiskError(
                f"database '{found}' must be a file, got a link or a folder; move it away"
            )


def fault_of(path: Path) -> str | None:
    """Say what is wrong with a database; None if it is whole and MLflow's."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            database.execute(f"PRAGMA busy_timeout = {int(1000 * SECONDS_FOR_OTHERS)}")
            if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                return "it is damaged"
            found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in found}
            if not tables >= {"alembic_version", "experiments", "runs"}:
                return "it is incomplete, or belongs to another program"
            if database.execute("SELECT count(*) FROM alembic_version").fetchone() == (0,):
                return "its creation was interrupted"
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as problem:
        return f"it is damaged ({problem})"
    return None


def put_aside(path: Path, fault: str) -> str:
    """Rename a damaged database and what belongs to it, and return what to tell the user."""
    kept = keep_damaged(path, endings=("-journal", "-wal", "-shm"))
    return (
        f"the database '{path}' cannot be used: {fault}; it is now '{kept}', and the runs' "
        "folders are shown in a new one"
    )


def is_half_made(problem: Exception) -> bool:
    """Say whether MLflow fails on a schema whose creation was interrupted."""
    return any(words in str(problem) for words in HALF_MADE)


def _make(path: Path) -> None:
    """Create MLflow's schema in another file, and rename that when it is complete."""
    from mlflow.tracking import MlflowClient  # noqa: PLC0415 - it takes seconds

    aside = unforeseeable(path, PART)
    try:
        MlflowClient(f"sqlite:///{aside.absolute().as_posix()}")
        with closing(sqlite3.connect(aside)) as made:
            schema = made.serialize()
        write_whole(path, schema)
    finally:
        for ending in BESIDE:
            with suppress(OSError):
                aside.with_name(aside.name + ending).unlink()
