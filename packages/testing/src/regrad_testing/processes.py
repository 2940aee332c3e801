"""Start two processes or more for a suite and collect what each of them saw."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import tempfile
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from torch import distributed

from regrad_testing.clauses import require, skip
from regrad_testing.worker import WORLD, work

PATIENCE = 240
HEAVY = [
    "regrad.hidden",  # first: torch ends with a distribution that it cannot read
    "regrad_testing.worker",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def launch(
    suite: type, patience: float = PATIENCE, *, processes: int = WORLD
) -> list[dict[str, Any]]:
    """Run `suite.cases()` on some gloo processes and return, per rank, result or error by case.

    The class is imported in each process from the file that holds it, so it must
    stand at the top level of one, and that file must be importable on its own.

    Args:
        suite: The class.
        patience: Seconds until processes that still run are ended.
        processes: How many.

    Raises:
        AssertionError: If a process ends early.
    """
    if not distributed.is_available():
        skip("this torch was built without torch.distributed")
    if "<locals>" in suite.__qualname__:
        skip("processes import the suite from its file; define the class at its top level")
    with tempfile.TemporaryDirectory() as name:
        folder, context = Path(name), _context()
        place = (inspect.getfile(suite), suite.__qualname__, folder)
        started: list[Any] = [
            context.Process(target=work, args=(*place, rank, processes))  # type: ignore[attr-defined]
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + patience
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        printed = [path.read_text(errors="replace") for path in sorted(folder.glob("*.txt"))]
        require(
            codes == [0] * processes,
            f"{processes} processes ended with {codes} (None: too late):\n" + "\n".join(printed),
        )
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _context() -> BaseContext:
    """Return how to start processes: from a server that has imported torch once, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(HEAVY)
    return multiprocessing.get_context("forkserver")
