"""Start several gloo processes for a suite or a function, and collect what each of them saw."""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from torch import distributed

from regrad_testing.clauses import require, skip
from regrad_testing.worker import CODES, GRACE, WORLD, Task, lead

PATIENCE = 240
ATTEMPTS = 2
NATIVE_CRASHES = (-signal.SIGABRT, -signal.SIGSEGV)
HEAVY = [
    "regrad.hidden",  # first: torch ends with a distribution that it cannot read
    "regrad_testing.worker",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def run_on_processes(
    function: Callable[..., Any],
    *arguments: Any,
    processes: int = WORLD,
    patience: float = PATIENCE,
) -> list[Any]:
    """Call a function on several gloo processes at once, and return what each returned.

    The function is imported in the processes from the file that holds it, so it must
    stand at the top level of one, and that file must be importable on its own. The
    group is initialized when the function begins, and `RANK`, `LOCAL_RANK` and
    `WORLD_SIZE` are set as torchrun sets them.

    Args:
        function: Called with the rank, from 0, and `arguments`. It returns what JSON
            can hold.
        arguments: More arguments, which pickle can hold.
        processes: How many. At least 1.
        patience: Seconds after which processes that still run are ended. Positive.

    Returns:
        What each process returned, by rank.

    Raises:
        AssertionError: If the function raised on a process, or a process ended early
            or too late; with the traceback and what the processes printed.

    Example:
        >>> from calendar import isleap  # of the years 0 and 1, the ranks
        >>> run_on_processes(isleap)
        [True, False]
    """
    if not inspect.isfunction(function):
        raise TypeError(f"function must be written in a Python file, got {function!r}")
    seen = _launch(function, arguments, processes, patience)
    returned = [by_case[function.__qualname__] for by_case in seen]
    errors = [value["error"] for value in returned if isinstance(value, dict) and "error" in value]
    require(not errors, f"{function.__qualname__} raised on a process:\n" + "\n".join(errors))
    return returned


def launch(
    suite: type, patience: float = PATIENCE, *, processes: int = WORLD
) -> list[dict[str, Any]]:
    """Run `suite.cases()` on some gloo processes and return, per rank, result or error by case.

    The class is imported in the processes from the file that holds it, so it must
    stand at the top level of one, and that file must be importable on its own.

    Args:
        suite: The class. Its `cases()` returns functions by name; each is called with
            the rank, in a process group of its own.
        patience: Seconds after which processes that still run are ended.
        processes: How many.

    Raises:
        AssertionError: If a process ends early.
    """
    return _launch(suite, (), processes, patience)


def _launch(
    thing: Any, arguments: tuple[Any, ...], processes: int, patience: float
) -> list[dict[str, Any]]:
    """Return the results of a suite or a function, by case, for each rank."""
    if not distributed.is_available():
        skip("this torch was built without torch.distributed")
    if "<locals>" in thing.__qualname__:
        skip("processes import the suite from its file; define the class at its top level")
    with tempfile.TemporaryDirectory() as name:
        place = (inspect.getfile(thing), thing.__qualname__)
        for attempt in range(ATTEMPTS):
            folder = Path(name) / str(attempt)
            folder.mkdir()
            task = Task(*place, arguments, folder, processes, patience, dict(os.environ))
            codes, printed = _run(task)
            if not _ended_in_native_code(codes):
                break
        require(
            codes == [0] * processes,
            f"{processes} processes ended with {codes} (None: timed out):\n{printed}",
        )
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _ended_in_native_code(codes: list[int | None] | None) -> bool:
    """Say whether a rank's own native code ended it.

    It was seen once, as a thread of gloo freed memory that was not its own, and not again in 227
    launches of that suite. What is wrong in a suite ends every attempt.
    """
    return any(code in NATIVE_CRASHES for code in codes or ())


def _run(task: Task) -> tuple[list[int | None] | None, str]:
    """Run a task; return the exit code of every rank, if it came to that, and what they printed."""
    leader: Any = _context().Process(target=lead, args=(task,))  # type: ignore[attr-defined]
    leader.start()
    try:
        leader.join(task.patience + 2 * GRACE)
    finally:
        if leader.is_alive():
            _end(leader)
    file = task.folder / CODES
    codes = json.loads(file.read_text()) if file.exists() else None
    printed = [path.read_text(errors="replace") for path in sorted(task.folder.glob("*.txt"))]
    return codes, "\n".join(printed)


def _end(leader: Any) -> None:
    """End the first process, and with it the ranks that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # it has not come to be a group's leader
            os.killpg(leader.pid, signal.SIGKILL)
    leader.kill()
    leader.join()


def _context() -> BaseContext:
    """Return how to start processes: where the system can fork, from one that has torch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(HEAVY)
    return multiprocessing.get_context("forkserver")
