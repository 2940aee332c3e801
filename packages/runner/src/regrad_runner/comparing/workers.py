"""Several runs of a comparison at once on one machine, each in a worker process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from regrad.errors import RegradError

from regrad_runner.comparing.plan import Plan, plan_of
from regrad_runner.comparing.running import Comparison, values_of
from regrad_runner.errors import format_warning
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell
from regrad_runner.results.run import end_abandoned
from regrad_runner.settings.config import CompareConfig
from regrad_runner.settings.loading import load_config
from regrad_runner.signals import stoppable

SECONDS_TO_END = 15.0
# By default glibc returns the memory of an evaluation to the system and requests it again for the
# next one, which takes a third of the time of evaluations on small images.
KEEPING_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
# What a worker sends: a line for the user, that its cell ended, or that it could not start.
SAYS = "says"
DONE = "done"
BROKEN = "broken"


@dataclass
class Worker:
    """A process that runs cells.

    Attributes:
        process: Itself.
        line: To it and from it.
        task: What it runs, with the learning rate; None while it waits.
    """

    process: BaseProcess
    line: Connection
    task: tuple[Cell, float] | None = None


class Workers:
    """Worker processes, as a context manager: they end with it, after an error at once.

    They start with it too, and load libraries and data while the first process does the same.

    Args:
        plan: Of the comparison; its folder is there.
        display: Shows what is under way.
        cells: How many there are to run: no more processes than that start at once.
    """

    def __init__(self, plan: Plan, display: Display, *, cells: int) -> None:
        self._plan = plan
        self._display = display
        self._cells = cells
        self._workers: list[Worker] = []
        self._started = 0

    def run_cells(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[Cell]:
        """Run cells at the same time; see `running.Runner`."""
        waiting = deque(todo)
        while waiting or self._busy():
            self._hand_out(waiting)
            lines = {worker.line: worker for worker in self._busy()}
            for line in connection.wait(list(lines)):
                yield from self._hear(lines[line])  # type: ignore[index]

    def __enter__(self) -> Self:
        try:
            for _ in range(min(self._plan.jobs, self._cells)):
                self._start()
        except BaseException as problem:
            self.__exit__(type(problem), problem, problem.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for worker in self._workers:
                if error is not None:
                    worker.process.terminate()
                with suppress(OSError):  # it is gone
                    worker.line.send(None)
            for worker in self._workers:
                worker.process.join(SECONDS_TO_END)
        finally:
            for worker in self._workers:
                worker.process.kill()  # where it has not ended, or Ctrl-C came again
                worker.line.close()

    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.task is not None]

    def _hand_out(self, waiting: deque[tuple[Cell, float]]) -> None:
        """Give every worker something to do, and start as many as there may be."""
        while waiting:
            idle = next((worker for worker in self._workers if worker.task is None), None)
            if idle is None and len(self._workers) == self._plan.jobs:
                break
            worker = idle or self._start()
            worker.task = waiting.popleft()
            with suppress(OSError):  # it is gone, which is heard next
                worker.line.send(worker.task)
        names = [worker.task[0].name for worker in self._workers if worker.task is not None]
        self._display.begin("; ".join(names), steps=None)

    def _hear(self, worker: Worker) -> Iterator[Cell]:
        """Take what a worker says; yield its cell if that has ended."""
        try:
            what, text = worker.line.recv()
        except (EOFError, OSError):
            yield self._bury(worker)
            return
        if what == SAYS:
            self._display.say(text)
        elif what == BROKEN:
            raise RegradError(f"a worker process could not start: {text}")
        elif worker.task is not None:
            cell, _ = worker.task
            worker.task = None
            yield cell

    def _bury(self, worker: Worker) -> Cell:
        """Say that a cell failed whose process is gone, perhaps because memory ran out."""
        worker.process.join()
        worker.line.close()
        self._workers.remove(worker)
        if worker.task is None:
            raise RegradError("a worker process ended before it was given anything to do")
        cell, lr = worker.task
        why = f"its process ended with exit code {worker.process.exitcode}"
        self._display.say(f"{cell.name} failed: {why}")
        end_abandoned(
            self._plan.path, values_of(self._plan, cell, lr=lr), status="failed", error=why
        )
        return cell

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        place = (self._plan.path, self._started, theirs)
        process = context.Process(target=work, args=place, name=f"regrad-worker-{self._started}")
        with ignoring_interrupts(), _keeping_memory():
            process.start()
        theirs.close()  # so that its end is heard
        self._started += 1
        self._workers.append(Worker(process, ours))
        return self._workers[-1]


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Let processes that start in the block ignore Ctrl-C.

    A terminal sends it to all of them, but the first process decides.
    """
    resource_tracker.ensure_running()  # starting it would let the signal through again
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _keeping_memory() -> Iterator[None]:
    """Let processes that start in the block keep memory for what they do again and again.

    What the user has set in the environment stays.
    """
    added = {name: value for name, value in KEEPING_MEMORY.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class Relay(Display):
    """Tells the first process what is to be said, and shows nothing."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def say(self, text: str) -> None:
        """Have a line printed."""
        self._line.send((SAYS, text))

    def begin(self, name: str, *, steps: int | None) -> None:
        """Show nothing."""

    def step(self, step: int) -> None:
        """Show nothing."""


def work(path: Path, number: int, line: Connection) -> None:
    """Run the cells that come through a line, until None comes or nobody is there any more.

    Args:
        path: The comparison's folder.
        number: Of this worker, from 0: where there are several devices, they take turns.
        line: To the first process.
    """
    warnings.formatwarning = format_warning
    with stoppable(), suppress(EOFError, BrokenPipeError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            if torch.accelerator.is_available():
                torch.accelerator.set_device_index(number % torch.accelerator.device_count())
            plan = plan_of(path, load_config(CompareConfig, file=path / "config.yaml", flags={}))
        except (ValueError, TypeError, RuntimeError) as problem:
            line.send((BROKEN, str(problem)))
            return
        comparison = Comparison(plan, Relay(line))
        for cell, lr in iter(line.recv, None):
            comparison.run_cell(cell, lr=lr)
            line.send((DONE, ""))
