"""The command `regrad`: one clear line and exit code 2 for bad input, no traceback."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from regrad.distributions import hide_broken
from regrad.errors import RegradError
from regrad.text import printable

from regrad_runner.errors import KEPT_CHARACTERS, format_warning

FAILED, BAD_INPUT, STOPPED = 1, 2, 130
# What a disk answers that is full, read-only or broken: no traceback tells more.
OF_THE_DISK = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after the command's name; None for those of the process.

    Returns:
        The exit code: 0, 1 where a run failed, 2 for bad input with nothing written, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] == ["plugins", "list"] and set(words[2:]) <= {"--json"}:
        from regrad_runner.plugins.listing import show_plugins  # noqa: PLC0415 - the parser imports pydantic, this does not

        show_plugins(as_json="--json" in words)
        return 0
    return _run(words)


def _run(words: list[str]) -> int:
    hide_broken()  # before anything is imported that reads every distribution's metadata
    import typer  # noqa: PLC0415 - a listing needs no parser

    from regrad_runner.cli.app import app  # noqa: PLC0415
    from regrad_runner.errors import BadInput, error_in_words, in_one_line  # noqa: PLC0415

    # Typer has its own copy of click since some version: its usage error goes by no public name in every one.
    usage_error: Any = typer.BadParameter.__base__
    warnings.formatwarning = format_warning
    try:
        return int(app(words or ["--help"], prog_name="regrad", standalone_mode=False) or 0)
    except BadInput as problem:
        return _complain(str(problem))
    except RegradError as problem:
        # Such as a full disk: it says what to do, and a tracked run has the traceback.
        return _complain(in_one_line(problem), code=FAILED)
    except OSError as problem:
        if problem.errno not in OF_THE_DISK:
            raise
        return _complain(error_in_words(problem), code=FAILED)
    except usage_error as problem:
        return _complain(_with_value(problem, words))
    except (typer.Abort, KeyboardInterrupt):
        return STOPPED


def _with_value(problem: Any, words: Sequence[str]) -> str:
    """Return what the parser says, with the value that it refused: it names the flag alone."""
    message = str(problem.format_message())
    for flag in getattr(getattr(problem, "param", None), "opts", ()):
        for word, following in zip(words, [*words[1:], ""], strict=True):
            value = following if word == flag else word.removeprefix(f"{flag}=")
            if (word == flag or value != word) and value not in message:
                return f"{message.rstrip('.')}, got {value!r}"
    return message


def _complain(problem: str, code: int = BAD_INPUT) -> int:
    # A RANK that a launcher left behind makes nobody else speak.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if problem and (alone or os.environ.get("RANK", "0") == "0"):
        from regrad_runner.addresses import without_secrets  # noqa: PLC0415

        sys.stderr.write(f"regrad: {printable(without_secrets(problem), keep=KEPT_CHARACTERS)}\n")
    return code
