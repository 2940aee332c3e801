"""What the processes of a launch do: the first imports the file and starts every rank."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

from regrad_testing.files import load_file

WORLD = 2
GROUP_PATIENCE = timedelta(seconds=60)
GRACE = 5.0
MODULE = "regrad_testing_suite"
LEADER = "leader"
CODES = "exit codes.json"

Case = Callable[[int], Any]


@dataclass(frozen=True)
class Task:
    """What some processes have to do.

    Attributes:
        file: Holds a suite or a function; every process imports it by its path.
        name: Qualified name of that suite or function in the file.
        arguments: Of a function, after the rank.
        folder: For rendezvous, results and what is printed.
        processes: How many.
        patience: Seconds after which processes that still run are ended.
        environment: Variables of the process that asks: the one that starts others may
            be older.
    """

    file: str
    name: str
    arguments: tuple[Any, ...]
    folder: Path
    processes: int
    patience: float
    environment: Mapping[str, str]

    def cases(self) -> Mapping[str, Case]:
        """Return what every rank runs, one after the other: a suite's cases, or one function."""
        module = sys.modules.get(MODULE) or load_file(Path(self.file), MODULE)
        found: Any = module
        for part in self.name.split("."):
            found = getattr(found, part)
        if isinstance(found, type):
            return found.cases()  # type: ignore[attr-defined, no-any-return]
        return {self.name: lambda rank: found(rank, *self.arguments)}


def lead(task: Task) -> None:
    """Import the file once, start every rank from here, and write their exit codes to the folder.

    Importing takes longer than most cases, so where the system can fork the ranks do not repeat it.
    """
    _print_to(task.folder / f"{LEADER}.txt")
    os.environ.update(task.environment)
    if hasattr(os, "setsid"):
        os.setsid()  # whoever started this process can end it together with its ranks
    method = "spawn"
    if hasattr(os, "fork"):
        method = "fork"
        task.cases()
        gc.freeze()
    context: Any = multiprocessing.get_context(method)
    ranks = [context.Process(target=work, args=(task, rank)) for rank in range(task.processes)]
    for process in ranks:
        process.start()
    codes = _exit_codes(ranks, task.patience)
    (task.folder / CODES).write_text(json.dumps(codes))


def _exit_codes(processes: list[Any], patience: float) -> list[int | None]:
    """Wait for processes and return their exit codes, None for those that were ended.

    When one fails the others wait for it in vain, and are soon ended as well.
    """
    deadline = time.monotonic() + patience
    running = {process.sentinel: process for process in processes}
    while running and time.monotonic() < deadline:
        for sentinel in wait([*running], timeout=deadline - time.monotonic()):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE)
    codes = [process.exitcode for process in processes]
    for process in running.values():
        process.kill()
        process.join()
    return codes


def work(task: Task, rank: int) -> None:
    """Run the cases of a task as one rank, write the results to FOLDER/RANK.json, and exit."""
    _print_to(task.folder / f"{rank}.txt")
    faulthandler.enable()  # where torch's native code ends this process, it says where
    torch.set_num_threads(1)
    _say_who_this_is(rank, task.processes)
    results = {}
    for number, (name, case) in enumerate(task.cases().items()):
        store = FileStore(str(task.folder / f"rendezvous {number}"), task.processes)
        results[name] = run_case(case, store, rank, task.processes)
    (task.folder / f"{rank}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit


def _say_who_this_is(rank: int, world: int) -> None:
    """Set the variables that torchrun sets, where Lightning and Accelerate read them."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world)


def run_case(case: Case, store: Any, rank: int, world: int) -> Any:
    """Run one case in a process group of its own; return its result, or what it raised."""
    group: Any = PrefixStore("group", store)
    distributed.init_process_group(
        "gloo", store=group, rank=rank, world_size=world, timeout=GROUP_PATIENCE
    )
    try:
        result = case(rank)
    # Whatever an author's code raises is the result, and the next case runs.
    except BaseException:  # noqa: BLE001
        result = {"error": traceback.format_exc()}
    gc.collect()  # wrappers are cycles, and must not outlive the group that they use
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world)], GROUP_PATIENCE)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return result


def _print_to(path: Path) -> None:
    """Send what this process prints, from C++ as well, to a file."""
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    printed = os.open(path, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(printed, stream)
