"""The SQLite file that MLflow keeps runs in: made whole or not at all, and never opened through a link."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from regrad_runner.errors import DiskError
from regrad_runner.files import PART, remove_left_over, unforeseeable, write_whole

# What SQLite reads and writes beside a database.
BESIDE = ("", "-journal", "-wal", "-shm", ".lock")
SECONDS_FOR_OTHERS = 30.0
# What MLflow's migrations say of a schema whose making was broken off.
HALF_MADE = ("duplicate column name", "already exists")


def prepare(path: Path, *, own: bool) -> str | None:
    """See that a database can be opened: make one where there is none, and put a damaged one of ours aside.

    Call it while no other process does. Making a schema takes seconds.

    Args:
        path: The file.
        own: Whether it is the database of an output folder, which may be made anew, and not one that somebody named.

    Returns:
        What is to be told: that a damaged one was put aside. None where there is nothing to tell.

    Raises:
        DiskError: If it is a link, a folder or damaged, and not to be moved, or cannot be written.
        sqlite3.OperationalError: If it cannot be read now, because another program holds it.
    """
    check_is_file(path, own=own)
    remove_left_over(path.parent, path.name)
    fault = fault_of(path) if path.exists() else None
    if fault is not None and not own:
        raise DiskError(
            f"database '{path}' must be one of MLflow, but {fault}; move it away or mend it"
        )
    told = put_aside(path, fault) if fault is not None else None
    if not path.exists():
        _make(path)
    return told


def check_is_file(path: Path, *, own: bool) -> None:
    """Raise a `DiskError` where a database, or what SQLite writes beside it, is a link or a folder."""
    for ending in BESIDE:
        found = path.with_name(path.name + ending)
        linked = found.is_symlink() and (own or ending != "")
        if linked or (found.exists() and not found.is_file()):
            raise DiskError(
                f"database '{found}' must be a file, got a link or a folder; move it away"
            )


def fault_of(path: Path) -> str | None:
    """Say what is wrong with a database; None where it is whole and MLflow's."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            database.execute(f"PRAGMA busy_timeout = {int(1000 * SECONDS_FOR_OTHERS)}")
            if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                return "it is damaged"
            found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in found}
            if not tables >= {"alembic_version", "experiments", "runs"}:
                return "it is not whole, or of another program"
            if database.execute("SELECT count(*) FROM alembic_version").fetchone() == (0,):
                return "its making was broken off"
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as problem:
        return f"it is damaged ({problem})"
    return None


def put_aside(path: Path, fault: str) -> str:
    """Rename a damaged database and what belongs to it, and return what is to be told."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for ending in ("-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(kept.with_name(kept.name + ending))
    path.rename(kept)
    return (
        f"the database '{path}' cannot be used: {fault}; it is now '{kept}', and a new one takes what is still "
        "in the folder's records"
    )


def is_half_made(problem: Exception) -> bool:
    """Say whether MLflow fails on a schema whose making was broken off."""
    return any(words in str(problem) for words in HALF_MADE)


def _make(path: Path) -> None:
    """Make MLflow's schema in another file, and give it the name when it is whole."""
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
