"""What ends a command with one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regrad.errors import RegradError, RegradWarning
from regrad.text import printable

from regrad_runner.addresses import without_secrets

KEPT_CHARACTERS = "\n\t"
# Characters of an error in one line: the most, and what is shown of a longer one.
LONGEST_LINE = 2000
SHOWN_FIRST = 1500
SHOWN_LAST = 400


class DiskError(RegradError):
    """A file cannot be written: the disk is full or refuses, or something else has its name."""


class BadInput(Exception):  # noqa: N818 - it says what is wrong, and with whom
    """What was asked for cannot be done: one line, exit code 2, nothing is written."""


@contextmanager
def checking_input() -> Iterator[None]:
    """Turn what the block raises about its arguments into `BadInput`.

    It is for everything before the first step of training.
    """
    try:
        yield
    except (ValueError, TypeError, RegradError, OSError) as problem:
        line = " ".join(without_secrets(error_in_words(problem)).split())
        if len(line) > LONGEST_LINE:
            line = f"{line[:SHOWN_FIRST]} … {line[-SHOWN_LAST:]}"
        raise BadInput(line) from problem


def in_one_line(problem: BaseException) -> str:
    """Return the first line of what an exception says.

    Where it comes from a loader's process, torch puts the traceback of that process in front of
    what it said: then that is returned, from the last line.
    """
    lines = str(problem).splitlines() or [type(problem).__name__]
    is_from_loader = lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]
    if is_from_loader:
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]


def error_in_words(problem: Exception) -> str:
    """Return what an error says; for an `OSError` the file and the reason, without its number."""
    if not isinstance(problem, OSError) or problem.strerror is None:
        return str(problem) or type(problem).__name__
    if problem.filename is None:
        return problem.strerror
    return f"'{problem.filename}' cannot be used: {problem.strerror}; choose another file or folder"


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """Return our own warnings as people read them, and others as Python writes them."""
    text = printable(without_secrets(str(message)), keep=KEPT_CHARACTERS)
    if issubclass(category, RegradWarning):
        return f"warning: {text}\n"
    return f"{printable(filename)}:{lineno}: {category.__name__}: {text}\n"
