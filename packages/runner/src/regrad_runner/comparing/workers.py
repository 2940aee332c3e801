"""Several runs of a comparison at once on one machine, each in a worker process."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import nan
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from regrad.errors import RegradError

from regrad_runner.comparing.plan import Plan, plan_of
from regrad_runner.comparing.running import Comparison, failed_result
from regrad_runner.errors import format_warning
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.locks import CELLS
from regrad_runner.results.outcomes import Outcome, Trial, cell_file, read_outcome, write_outcome
from regrad_runner.settings.config import CompareConfig
from regrad_runner.settings.loading import load_config
from regrad_runner.signals import stoppable
from regrad_runner.tracking.mlflow_ import SECONDS_AT_THE_END, Run, open_tracker

# What a worker needs beyond the delivery of its last numbers to end.
SECONDS_TO_END = SECONDS_AT_THE_END + 15
SAYS, DONE, BROKEN = "says", "done", "broken"


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

    Args:
        plan: Of the comparison; its folder is there.
        parent: Our id of the tracked run that stands for the comparison.
        display: Told what is under way.
    """

    def __init__(self, plan: Plan, parent: str, display: Display) -> None:
        self._plan, self._parent, self._display = plan, parent, display
        self._workers: list[Worker] = []
        self._started = 0

    def outcomes(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[tuple[Cell, Outcome]]:
        """Run cells at the same time; see `compare.Runner`."""
        waiting = deque(todo)
        while waiting or self._busy():
            self._hand_out(waiting)
            lines = {worker.line: worker for worker in self._busy()}
            for line in connection.wait(list(lines)):
                yield from self._hear(lines[line])  # type: ignore[index]

    def __enter__(self) -> Self:
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
            with suppress(OSError):  # there is none, or what came out of a cell was not taken
                (self._plan.path / CELLS).rmdir()

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

    def _hear(self, worker: Worker) -> Iterator[tuple[Cell, Outcome]]:
        """Take what a worker says; yield what came out of its cell, where that is said."""
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
            path = cell_file(self._plan.path, cell)
            yield cell, read_outcome(path)
            path.unlink()  # it is in the tables now

    def _bury(self, worker: Worker) -> tuple[Cell, Outcome]:
        """Return the failure of the cell whose process is gone, such as one that took more memory than there is."""
        worker.process.join()
        worker.line.close()
        self._workers.remove(worker)
        if worker.task is None:
            raise RegradError("a worker process ended before it was given anything to do")
        cell, lr = worker.task
        self._display.say(
            f"{cell.name} failed: its process ended with exit code {worker.process.exitcode}"
        )
        if cell.lr is not None:
            return cell, Outcome(trial=Trial(arm=cell.arm, lr=lr, seed=cell.seed, validation=nan))
        return cell, Outcome(result=failed_result(self._plan.arm(cell.arm), cell, lr=lr))

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        place = (self._plan.path, self._started, self._parent, theirs)
        process = context.Process(target=work, args=place, name=f"regrad-worker-{self._started}")
        with _ignoring_interrupts():
            process.start()
        theirs.close()  # so that its end is heard
        self._started += 1
        self._workers.append(Worker(process, ours))
        return self._workers[-1]


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
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


def work(path: Path, number: int, parent: str, line: Connection) -> None:
    """Run the cells that come through a line, until None comes or nobody is there any more.

    Args:
        path: The comparison's folder.
        number: Of this worker, from 0: where there are several devices, they take turns.
        parent: Our id of the tracked run that stands for the comparison.
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
        with open_tracker(
            plan.config.tracker, folder=path, uri=plan.config.tracking_uri
        ) as tracker:
            comparison = Comparison(
                plan, ResultsFolder(path), tracker, Run(tracker, parent), Relay(line)
            )
            for cell, lr in iter(line.recv, None):
                write_outcome(path, cell, comparison.outcome(cell, lr=lr))
                line.send((DONE, ""))
