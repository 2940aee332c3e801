"""Checkpoints of a cell that runs as a job, so that it goes on where it was preempted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from regrad_runner.checkpoints.checkpoint import load_latest, save_checkpoint
from regrad_runner.errors import DiskError
from regrad_runner.files import remove_folder
from regrad_runner.results.points import METRICS
from regrad_runner.results.run import Line, read_points
from regrad_runner.training.run import TrainingRun

CELL_CHECKPOINTS = "checkpoints"


class CellCheckpoints:
    """The checkpoints of one run of a comparison, in the run's own folder.

    They are saved right after evaluations, where no effect or probe is half seen, and removed when
    the run has ended.

    Args:
        run_folder: Of the run; it need not exist yet.
        seconds: Least time between two of them.
    """

    def __init__(self, run_folder: Path, *, seconds: float) -> None:
        self._folder = run_folder / CELL_CHECKPOINTS
        self._seconds = seconds
        self._last = time.monotonic()
        self._lines: list[Line] = []
        if self._is_there:
            self._lines = _lines_of_training(read_points(run_folder))

    @property
    def lines(self) -> list[Line]:
        """The points that an earlier attempt left, if it left a checkpoint too."""
        return self._lines

    def lines_until(self, step: int) -> list[Line]:
        """Return the points up to a step: what follows comes again."""
        return [line for line in self._lines if line.step <= step]

    def load_into(self, run: TrainingRun) -> list[str]:
        """Restore a run from its latest whole checkpoint, or leave it at its start.

        Args:
            run: Freshly made.

        Returns:
            What to tell the user.

        Raises:
            RegradError: If there are checkpoints and the run cannot go on from them; the run may
                then be neither here nor there.
        """
        latest, notes = load_latest(run, self._folder)
        if latest is None:
            return notes
        return [*notes, f"continuing from step {run.position.step}"]

    def keep(self, run: TrainingRun) -> None:
        """Save a checkpoint if the run has just been evaluated and it is time for one."""
        points = run.position.points
        step = run.position.step
        is_evaluated = bool(points) and points[-1].step == step
        is_due = time.monotonic() - self._last >= self._seconds
        if not is_evaluated or not is_due or step == run.total_steps:
            return
        save_checkpoint(run, self._folder, keep=1)
        self._last = time.monotonic()

    @contextmanager
    def removed_at_the_end(self) -> Iterator[None]:
        """Remove them when the run has ended, or failed for a reason of its own.

        What ends the process leaves them for the next attempt, and so does a full disk.
        """
        try:
            yield
        except DiskError:
            raise
        except Exception:
            self.remove()
            raise
        self.remove()

    def remove(self) -> None:
        """Remove them all."""
        if self._is_there:
            remove_folder(self._folder)

    @property
    def _is_there(self) -> bool:
        return os.path.lexists(self._folder)


class NoCheckpoints:
    """Keeps nothing, for a run that starts anew when it is repeated; see `CellCheckpoints`."""

    lines: tuple[Line, ...] = ()

    def lines_until(self, step: int) -> list[Line]:
        """Return no points, whatever the step."""
        del step
        return []

    def load_into(self, run: TrainingRun) -> list[str]:
        """Leave a run at its start."""
        del run
        return []

    def keep(self, run: TrainingRun) -> None:
        """Save nothing."""

    def removed_at_the_end(self) -> AbstractContextManager[None]:
        """Remove nothing when the run has ended."""
        return nullcontext()

    def remove(self) -> None:
        """Remove nothing."""


def _lines_of_training(lines: Iterable[Line]) -> list[Line]:
    """Leave out what a run says only at its end."""
    return [line for line in lines if line.kind != METRICS]
