"""What a job of a queue does: it runs one cell of a comparison, in a process of its own."""

from __future__ import annotations

import os
import signal
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regrad_runner.comparing.plan import Plan, Planned
from regrad_runner.comparing.prepared import prepared_plan
from regrad_runner.comparing.running import Comparison, Runner
from regrad_runner.comparing.script_cells import ScriptCells
from regrad_runner.comparing.script_plan import ScriptPlan
from regrad_runner.errors import format_warning
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell
from regrad_runner.results.run import RECORD, read_record
from regrad_runner.terminal import Terminal

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
HAS_RESULT = ("finished", "diverged")


@dataclass(frozen=True)
class CellTask:
    """A cell to run as a job.

    Attributes:
        cell: The run.
        lr: Its learning rate.
        number: Of the job, from 0: where jobs share several devices, they take turns.
    """

    cell: Cell
    lr: float
    number: int


@dataclass(frozen=True)
class CellJob:
    """Runs cells of a folder, each in a job; submitit pickles it, and calls it there.

    It can be repeated at any time: a cell that has a result is left as it is, and one that was
    broken off goes on from its last checkpoint, or starts again.

    Attributes:
        folder: Of the comparison, as every node finds it.
        checkpoint_seconds: Least time between the checkpoints of a run on a workload.
        visible_devices: What `CUDA_VISIBLE_DEVICES` says where the comparison was started; the
            local executor changes it.
        shares_devices: Whether the jobs of one machine take turns on all of its devices.
    """

    folder: Path
    checkpoint_seconds: float
    visible_devices: str | None = None
    shares_devices: bool = False

    def __call__(self, task: CellTask) -> None:
        """Run a cell in its own folder; a failure is an outcome too.

        Args:
            task: Which cell.
        """
        warnings.formatwarning = format_warning
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # by which it is cancelled
        cell = task.cell
        display = Display(Terminal(stderr=True), runs=1)
        if has_result(self.folder.joinpath(*cell.folder_names)):
            display.say(f"{cell.name}: it has already ended")
            return
        if self.shares_devices:
            self._take_device(task.number)
        plan = prepared_plan(self.folder)
        display.say(f"{cell.name}: learning rate {task.lr:g}")
        with self._runner(plan, display) as cells:
            for _ in cells.run_cells([(cell, task.lr)]):
                pass
        status = read_record(self.folder.joinpath(*cell.folder_names)).status
        display.end(f"{cell.name}: {status}")

    def checkpoint(self, task: CellTask) -> Any:
        """Return what to do when the job is started again after a preemption; see submitit.

        The run has kept its own checkpoints, so it is the same again.
        """
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415 - an extra

        return DelayedSubmission(self, task)

    def _runner(self, plan: Planned[Any], display: Display) -> AbstractContextManager[Runner]:
        """Return what runs a cell of a plan in the process of a job."""
        if isinstance(plan, ScriptPlan):
            return ScriptCells(plan, display)
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be of a workload or a script, got {type(plan).__name__}")
        comparison = Comparison(plan, display, checkpoint_seconds=self.checkpoint_seconds)
        return nullcontext(comparison)

    def _take_device(self, number: int) -> None:
        """Let the job have the device whose turn it is."""
        if self.visible_devices is None:
            os.environ.pop(VISIBLE_DEVICES, None)
        else:
            os.environ[VISIBLE_DEVICES] = self.visible_devices
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(number % torch.accelerator.device_count())


def has_result(run_folder: Path) -> bool:
    """Say whether a run ended with a result, so that running it again would change nothing.

    Args:
        run_folder: Of the run; it need not exist.
    """
    if not os.path.lexists(run_folder / RECORD):
        return False
    return read_record(run_folder).status in HAS_RESULT
