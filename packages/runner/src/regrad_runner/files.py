"""Files that are there whole or not at all: what output folders are written, read and emptied by.

A file is written aside, under a name that nobody can foresee, made anew and never through a link,
then forced to the disk and renamed. So a kill leaves the old file or the new one, and nothing that
lies in a folder can lead a writer out of it. What is read is a regular file: a pipe is not waited
for, and a device is not read without end.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

from regrad_runner.errors import DiskError

# Endings of what is written aside, and of what is about to be removed.
PART = ".part"
OLD = ".old"
# Windows has none of these flags, and needs none: there only administrators make links.
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
BINARY = getattr(os, "O_BINARY", 0)
# Who may read and write a new file, as far as the process allows: everybody, or its owner alone.
OPEN_TO_ALL = 0o666
OWN = 0o600


@contextmanager
def disk_errors(
    path: Path, *, next_step: str = "free some space or choose another folder"
) -> Iterator[None]:
    """Turn an `OSError` of the block into a `DiskError` that names the file and what to do.

    Args:
        path: What is written.
        next_step: What to do about it, as the error says.
    """
    try:
        yield
    except OSError as problem:
        why = problem.strerror or str(problem) or type(problem).__name__
        raise DiskError(f"'{path}' must be written, got {why!r}; {next_step}") from problem


def write_whole(path: Path, content: str | bytes, *, mode: int = OPEN_TO_ALL) -> None:
    """Write a file so that a kill leaves the old one or the new one, never a half.

    Args:
        path: The file. A link of that name is replaced, and what it leads to stays unchanged.
        content: Text is written as UTF-8.
        mode: Who may read it, as far as the process allows.

    Raises:
        DiskError: If it cannot be written to disk; the old file is unchanged.
    """
    with file_aside(path, mode=mode) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def file_aside(path: Path, *, mode: int = OPEN_TO_ALL) -> Iterator[IO[bytes]]:
    """Give a file to write, which gets its name at the end of the block; see `write_whole`."""
    with disk_errors(path):
        aside = unforeseeable(path, PART)
        file = new_file(aside, mode=mode)
        try:
            with file:
                yield file
                force_content(file)
            aside.replace(path)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise


def unforeseeable(path: Path, ending: str) -> Path:
    """Return a hidden name beside a path, which nobody can have prepared.

    It is short enough for every file system, however long the path's own name is.
    """
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}{ending}")


def new_file(path: Path, *, mode: int = OPEN_TO_ALL) -> IO[bytes]:
    """Open a file for writing that does not exist, not even as a link.

    Raises:
        OSError: If there is something of that name, or it cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK | BINARY
    return os.fdopen(os.open(path, flags, mode), "wb")


def append(path: Path, text: str, *, at: int | None = None, mode: int = OPEN_TO_ALL) -> None:
    """Add text at the end of a file, which is made if there is none: all of it, or nothing.

    Args:
        path: The file.
        text: To add.
        at: Length in bytes to which the file is cut first, because a write was broken off
            there. None to cut nothing.
        mode: Who may read a file that is made, as far as the process allows.

    Raises:
        DiskError: If it cannot be written to disk, or something of that name is not a file.
    """
    with disk_errors(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK | NO_WAIT | BINARY
        file = os.open(path, flags, mode)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            _add_all(file, text.encode(), size=found.st_size if at is None else at)
        finally:
            os.close(file)


def _add_all(file: int, content: bytes, *, size: int) -> None:
    """Cut an open file to a size and write at its end; cut it to that size again on a failure."""
    if os.fstat(file).st_size != size:
        os.ftruncate(file, size)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError:
        os.ftruncate(file, size)
        raise


def make_folder(root: Path, *names: str, mode: int = 0o777) -> Path:
    """Make a folder below an output folder, and return it.

    Args:
        root: The output folder. It is made if it does not exist, and may be a link.
        *names: The folders below it, each in the one before. None of them may be a link.
        mode: Who may look into the folders that are made, as far as the process allows.

    Raises:
        DiskError: If it cannot be written to disk, or there is a file or link of that name.
    """
    folder = root
    with disk_errors(root, next_step="choose another folder"):
        root.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder = folder / name
        check_own_folder(folder)
        with disk_errors(folder):
            folder.mkdir(mode=mode, exist_ok=True)
    return folder


def check_own_folder(folder: Path) -> None:
    """Raise a `DiskError` if the name is taken by a link, which could lead out, or by a file."""
    if folder.is_symlink():
        raise DiskError(f"'{folder}' must be a folder, got a link; move the link away")
    if folder.exists() and not folder.is_dir():
        raise DiskError(f"'{folder}' must be a folder, got a file; move the file away")


@contextmanager
def folder_aside(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a folder to fill, which gets its name at the end of the block.

    Args:
        path: The folder. Folders above it are made.
        replace: Whether an older one of that name is removed.

    Raises:
        OSError: If it cannot be written to disk, or an older one must stay; what was there is as
            it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = unforeseeable(path, PART)
    aside.mkdir()
    try:
        yield aside
        force_names(aside)
        if replace and os.path.lexists(path):
            remove_folder(path)
        aside.rename(path)
        force_names(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a new file of a folder that is written aside, and force its content to the disk."""
    with new_file(path) as file:
        yield file
        force_content(file)


def move_aside(path: Path, other: Path) -> None:
    """Rename a folder; whatever had the other name is removed."""
    if os.path.lexists(other):
        remove_folder(other)
    path.rename(other)


def keep_damaged(path: Path, *, endings: Sequence[str] = ()) -> Path:
    """Rename a damaged file to the first free "NAME.damaged-N" and return where it is now.

    Args:
        path: The file.
        endings: Of the names of files beside it that belong to it, and go with it.
    """
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for ending in endings:
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(kept.with_name(kept.name + ending))
    path.rename(kept)
    return kept


def remove_folder(path: Path) -> None:
    """Remove a folder, a file, or a link alone; a kill leaves no half of it under its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    gone = unforeseeable(path, OLD)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_left_over(folder: Path, prefix: str) -> None:
    """Remove what a kill left of files and folders that were written aside.

    Args:
        folder: Written by this process alone.
        prefix: How the names begin that they were to get.
    """
    for ending in (PART, OLD):
        for left in folder.glob(f".{prefix}*{ending}"):
            with suppress(OSError):
                remove_folder(left)


def is_left_over(file: Path, name: str) -> bool:
    """Say whether a file is what a kill left of one that was written aside, and no link.

    Args:
        file: There it is.
        name: That the file was to get.
    """
    parts = rf"\.{re.escape(name)}\.[0-9a-f]{{16}}{re.escape(PART)}"
    return re.fullmatch(parts, file.name) is not None and stat.S_ISREG(file.lstat().st_mode)


def read_bytes(path: Path) -> bytes:
    """Return what a file holds.

    Args:
        path: A file, or a link to one.

    Raises:
        OSError: If it cannot be read, or is a pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system itself says so
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def force_content(file: IO[bytes]) -> None:
    """Force what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def read_regular_file(path: Path, *, largest: int) -> bytes:
    """Return what a file of an output folder holds.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Raises:
        OSError: If there is none, or it is a link, a pipe or something else that is not a file, or
            if it is larger.
    """
    with open_regular_file(path, follow_link=False) as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise OSError(errno.EFBIG, f"more than {largest} bytes", str(path))
        return file.read(largest + 1)[:largest]


def open_regular_file(path: Path, *, follow_link: bool) -> BufferedReader:
    """Open a file for reading, without waiting for a pipe.

    Args:
        path: The file.
        follow_link: Whether it may be a link to a file.

    Raises:
        OSError: If there is none, or it is a folder, a pipe or something else that is not a file.
    """
    flags = os.O_RDONLY | NO_WAIT | BINARY
    if not follow_link:
        flags |= NO_LINK
    number = os.open(path, flags)
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def force_names(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    if os.name != "posix":  # a folder cannot be opened there, and a rename waits for the disk
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
