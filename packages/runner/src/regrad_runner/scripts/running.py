"""Run a script in this process, as `python SCRIPT` or `python -m MODULE` would."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

SCRIPT_FAILED, INTERRUPTED = 1, 130


def check_script(words: Sequence[str]) -> None:
    """Raise a `ValueError` if these words name no script that can be run.

    Args:
        words: "SCRIPT ARGS..." or "-m MODULE ARGS...".
    """
    if not words:
        raise ValueError("script must be given after '--', such as: -- train.py --lr 0.001")
    if words[0] == "-m":
        if len(words) == 1:
            raise ValueError("module must be named after '-m', such as: -- -m package.train")
        return
    if words[0] in {"python", "python3"}:
        raise ValueError(
            f"script must be given without {words[0]!r}, which is already running, got "
            f"{' '.join(words[:2])!r}; leave it out"
        )
    if not Path(words[0]).is_file():
        raise ValueError(
            f"script must be a file, got {words[0]!r}; give its path from the current folder"
        )


def run_script(words: Sequence[str], *, ends_quietly: type[BaseException] | tuple[()] = ()) -> int:
    """Run a script to its end and return the exit code that Python would end with.

    `sys.argv`, `sys.path[0]` and `__main__` are as if Python had been started with it. An
    exception is shown by `sys.excepthook`, without the frames that are not the script's.

    Args:
        words: As `check_script` takes them.
        ends_quietly: An exception that is no failure of the script's.

    Returns:
        0 at its end or after such an exception, what it gave to `sys.exit`, 1 after an exception,
        130 after Ctrl-C.
    """
    arguments = [*words[2:]] if words[0] == "-m" else [*words[1:]]
    try:
        if words[0] == "-m":
            sys.path[0] = str(Path.cwd())
            sys.argv = [words[1], *arguments]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            script = words[0]
            sys.path[0] = str(Path(script).resolve().parent)
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
    except ends_quietly:
        return 0
    except SystemExit as end:
        return _exit_code(end)
    except KeyboardInterrupt as problem:
        _show(problem)
        return INTERRUPTED
    except BaseException as problem:  # noqa: BLE001 - Python shows whatever ends a script
        _show(problem)
        return SCRIPT_FAILED
    return 0


def _exit_code(end: SystemExit) -> int:
    """Return the code that Python would end with; what is not a number is shown, as Python does."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    sys.stderr.write(f"{end.code}\n")
    return SCRIPT_FAILED


def _show(problem: BaseException) -> None:
    sys.stdout.flush()
    frames = _frames_of_script(problem.__traceback__)
    sys.excepthook(type(problem), problem.with_traceback(frames), frames)


def _frames_of_script(frames: TracebackType | None) -> TracebackType | None:
    """Return the traceback from where the script's own code begins."""
    outside = {__file__, "<frozen runpy>", runpy.__file__}
    left = frames
    while left is not None:
        if left.tb_frame.f_code.co_filename not in outside:
            return left
        left = left.tb_next
    return frames
