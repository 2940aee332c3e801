"""What ends a command with one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regrad.errors import RegradError, RegradWarning
from regrad.text import printable

from regrad_runner.addresses import without_secrets

KEPT_CHARACTERS = "\n\t"
LONGEST_LINE, SHOWN_FIRST, SHOWN_LAST = 2000, 1500, 400


class DiskError(RegradError):
    """The disk does not take a file, or what lies in a folder is not what may be written to: one line, no traceback."""


class BadInput(Exception):  # noqa: N818 - it says what is wrong, and with whom
    """What was asked for cannot be done: one line, exit code 2, nothing written."""


@contextmanager
def checking_input() -> Iterator[None]:
    """Turn what the block raises about its arguments into `BadInput`: for everything before the first step."""
    try:
        yield
    except (ValueError, TypeError, RegradError, OSError) as problem:
        line = " ".join(without_secrets(error_in_words(problem)).split())
        whole = len(line) <= LONGEST_LINE
        raise BadInput(
            line if whole else f"{line[:SHOWN_FIRST]} … {line[-SHOWN_LAST:]}"
        ) from problem


def in_one_line(problem: BaseException) -> str:
    """Return the first line of what an exception says; of one in a loader's process, what it said there.

    torch puts the process's traceback in front of it, and the words themselves at the end.
    """
    lines = str(problem).splitlines() or [type(problem).__name__]
    if not lines[0].startswith("Caught ") or "DataLoader worker" not in lines[0]:
        return lines[0]
    return lines[-1].partition(": ")[2] or lines[-1]


def error_in_words(problem: Exception) -> str:
    """Return what an error says: of an `OSError` the file and the reason, without its number."""
    if not isinstance(problem, OSError) or problem.strerror is None:
        return str(problem) or type(problem).__name__
    if problem.filename is None:
        return problem.strerror
    return f"'{problem.filename}' cannot be used: {problem.strerror}; choose another file or folder"


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """Write our own warnings for people, and others as Python does."""
    from regrad_runner.addresses import without_secrets  # noqa: PLC0415

    text = printable(without_secrets(str(message)), keep=KEPT_CHARACTERS)
    if issubclass(category, RegradWarning):
        return f"warning: {text}\n"
    return f"{printable(filename)}:{lineno}: {category.__name__}: {text}\n"
