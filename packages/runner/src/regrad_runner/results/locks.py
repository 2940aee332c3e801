"""Who may write a folder: one command, or many cells of a job array, each in its run's folder.

The system releases a lock when its process ends, however it ends, so a kill locks nobody out.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from regrad_runner.errors import DiskError
from regrad_runner.files import check_own_folder, disk_errors, make_folder

LOCK = ".regrad.lock"
SYNC_LOCK = ".regrad.sync.lock"
# In the folder of a run: held by its writer, and by the command that runs it as a cell.
RUN_LOCK = ".lock"
CELL_LOCK = ".cell.lock"
RUNS = "runs"
# How long to wait for a cell that begins, or for a look at which runs are under way: both hold a
# lock only briefly.
SECONDS_FOR_A_MOMENT = 2.0
# How long to wait for a process that is ending, and for what a dead one left behind: its loaders
# may hold its locks until they notice.
SECONDS_FOR_ORPHANS = 60.0


@contextmanager
def writing(folder: Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold a folder while it is written.

    It is made if it does not exist, and removed again if nothing was written.

    Args:
        folder: An output folder.
        seconds: To wait for a command that still writes it, and for each run that is still written.

    Raises:
        ValueError: If another command writes it.
        DiskError: If it cannot be made or locked.
    """
    was_there = folder.is_dir()
    make_folder(folder)
    try:
        with _folder_held(folder, seconds=seconds):
            _check_no_run_is_written(folder, seconds=seconds)
            yield
    finally:
        if not was_there:
            _remove_if_empty(folder)


@contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Hold a folder while its tables and figures are rewritten; its cells may run meanwhile.

    Raises:
        ValueError: If another command writes it.
        DiskError: If it cannot be locked.
    """
    with _folder_held(folder):
        yield


@contextmanager
def syncing(folder: Path) -> Iterator[None]:
    """Hold the tracking of a folder that no command writes; its cells may run meanwhile.

    Raises:
        ValueError: If another command writes the folder, or syncs it.
        DiskError: If it cannot be locked.
    """
    with _held(folder / SYNC_LOCK, f"the tracking of '{folder}'"):
        with _folder_held(folder):
            pass
        yield


@contextmanager
def running_cell(folder: Path, *names: str) -> Iterator[None]:
    """Hold one cell of a folder, beside which others may run.

    Args:
        folder: Of the comparison.
        *names: Of the folders that lead to the cell's run.

    Raises:
        ValueError: If another process runs this cell, or a command writes the folder.
        DiskError: If it cannot be locked.
    """
    with ExitStack() as stack:
        with _folder_held(folder, seconds=SECONDS_FOR_A_MOMENT):
            path = make_folder(folder, *names) / CELL_LOCK
            stack.enter_context(_held(path, f"this cell of '{folder}'"))
        try:
            yield
        finally:
            # Nobody can take the lock in between: that needs the folder's lock.
            with suppress(ValueError, DiskError), _folder_held(folder):
                stack.close()
                with suppress(OSError):
                    path.unlink()


@contextmanager
def writing_run(run: Path, *, seconds: float = SECONDS_FOR_A_MOMENT) -> Iterator[None]:
    """Hold the folder of one run while it is written.

    Args:
        run: The run's folder, in an output folder that this command or cell holds.
        seconds: To wait for a process that holds it.

    Raises:
        ValueError: If another process writes it.
        DiskError: If it cannot be locked.
    """
    path = run / RUN_LOCK
    with _held(path, f"'{run}'", seconds=seconds):
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def is_held(run: Path) -> bool:
    """Say whether a process runs a run.

    Args:
        run: The run's folder.
    """
    for name in (RUN_LOCK, CELL_LOCK):
        if not (run / name).is_file():
            continue
        try:
            with _held(run / name, f"'{run}'"):
                pass
        except ValueError:
            return True
    return False


def is_lock(path: Path) -> bool:
    """Say whether a file is the lock of its folder: an empty file, and no link.

    It stays when a process is killed.
    """
    if path.name not in (LOCK, SYNC_LOCK):
        return False
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


@contextmanager
def _folder_held(folder: Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold a folder; if cells run in it, wait a moment, because one may just be beginning."""
    if next((folder / RUNS).glob(f"*/*/{CELL_LOCK}"), None) is not None:
        seconds = max(seconds, SECONDS_FOR_A_MOMENT)
    with _held(folder / LOCK, f"'{folder}'", seconds=seconds):
        yield


@contextmanager
def _held(path: Path, what: str, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise DiskError(f"'{path}' must be a lock file, got a link or a folder; move it away")
    lock = FileLock(path, timeout=seconds, thread_local=False)
    with disk_errors(path, next_step="choose another folder"):
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{what} must be written by one command at a time, and another is writing it; wait "
                "until it ends"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _check_no_run_is_written(folder: Path, *, seconds: float) -> None:
    """Raise a `ValueError` if a process writes a run of the folder, which is held."""
    check_own_folder(folder / RUNS)
    for name in (RUN_LOCK, CELL_LOCK):
        for path in sorted((folder / RUNS).glob(f"*/*/{name}")):
            with _held(path, f"'{folder}'", seconds=seconds):
                pass
            # Nobody holds it, and nobody can begin while the folder is held.
            with suppress(OSError):
                path.unlink()


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder in which there is nothing but its lock."""
    with suppress(OSError):
        if [found.name for found in folder.iterdir()] == [LOCK] and is_lock(folder / LOCK):
            (folder / LOCK).unlink()
            folder.rmdir()
