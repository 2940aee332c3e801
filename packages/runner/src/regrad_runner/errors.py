"""What ends a command with one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from regrad.errors import RegradError


class BadInput(Exception):  # noqa: N818 - it says what is wrong, and with whom
    """What was asked for cannot be done: one line, exit code 2, nothing written."""


@contextmanager
def checking_input() -> Iterator[None]:
    """Turn what the block raises about its arguments into `BadInput`: for everything before the first step."""
    try:
        yield
    except (ValueError, TypeError, RegradError) as problem:
        raise BadInput(" ".join(str(problem).split())) from problem
