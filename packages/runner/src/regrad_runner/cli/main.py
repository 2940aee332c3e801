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

FAILED = 1
BAD_INPUT = 2
STOPPED = 130
# Errors of a full, read-only or broken disk: a traceback would not help.
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
        The exit code: 0; 1 where a run failed; 2 for bad input, with nothing written; 130 after
        Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if _is_plugins_list(words):
        # The parser imports pydantic; the list does not.
        from regrad_runner.plugins.listing import show_plugins  # noqa: PLC0415

        show_plugins(as_json="--json" in words)
        return 0
    return _run(words)


def _is_plugins_list(words: list[str]) -> bool:
    return words[:2] == ["plugins", "list"] and set(words[2:]) <= {"--json"}


def _run(words: list[str]) -> int:
    hide_broken()  # before anything is imported that reads every distribution's metadata
    import typer  # noqa: PLC0415 - a listing needs no parser

    from regrad_runner.cli.app import app  # noqa: PLC0415
    from regrad_runner.errors import (  # noqa: PLC0415
        BadInput,
        error_in_words,
        format_warning,
        in_one_line,
    )

    # Typer has had its own copy of click since some version: in none of them does its usage error
    # have a public name.
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
        return _complain(f"{_with_value(problem, words)}{_hint_at_script(words)}")
    except (typer.Abort, KeyboardInterrupt):
        return STOPPED


def _with_value(problem: Any, words: Sequence[str]) -> str:
    """Return what the parser says, with the value that it refused: it names the flag alone."""
    message = str(problem.format_message())
    for flag in getattr(getattr(problem, "param", None), "opts", ()):
        for value in _values_of(flag, words):
            if value not in message:
                return f"{message.rstrip('.')}, got {value!r}"
    return message


def _hint_at_script(words: Sequence[str]) -> str:
    """Return what to do if a script's own flags were taken for ours; else nothing."""
    scripts = [word for word in words if word.endswith(".py")]
    if not scripts or "--" in words:
        return ""
    return f"; a script and its arguments go after '--': -- {scripts[0]} ..."


def _values_of(flag: str, words: Sequence[str]) -> list[str]:
    """Return what was typed as the values of a flag, as `--flag VALUE` or `--flag=VALUE`."""
    values: list[str] = []
    for place, word in enumerate(words):
        if word == flag:
            values += words[place + 1 : place + 2] or [""]
        elif word.startswith(f"{flag}="):
            values.append(word.removeprefix(f"{flag}="))
    return values


def _complain(problem: str, code: int = BAD_INPUT) -> int:
    """Print one line, from the first process alone, and return the exit code."""
    # A RANK left over from a launcher must not silence a single process.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    speaks = alone or os.environ.get("RANK", "0") == "0"
    if problem and speaks:
        from regrad_runner.addresses import without_secrets  # noqa: PLC0415
        from regrad_runner.errors import KEPT_CHARACTERS  # noqa: PLC0415

        sys.stderr.write(f"regrad: {printable(without_secrets(problem), keep=KEPT_CHARACTERS)}\n")
    return code
