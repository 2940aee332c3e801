"""Steps whose loss or gradients are not finite are skipped; several in a row end the run."""

from __future__ import annotations

import csv
import io
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from regrad.errors import RegradError, RegradWarning
from regrad.sharding import is_sharded, local
from torch import Tensor, nn

from regrad_runner.addresses import without_secrets
from regrad_runner.results.run import NOT_FINITE, RunLog

STEPS_KEPT = 50
SKIPS_IN_A_ROW = 10


class NonFiniteError(RegradError):
    """Too many steps in a row were not finite.

    Attributes:
        table: CSV of the last steps: step, loss, and the norm of each tensor's gradient by its
            name.
    """

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


class Watch:
    """Look at loss and gradients of every step, before they are clipped or corrected.

    The norms stay on the device: one number per step is waited for.

    Args:
        parameters: Trained parameters by name.
        accelerator: Of the run. Its processes skip a step together.

    Attributes:
        skipped: Steps that were not finite so far.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], accelerator: Accelerator
    ) -> None:
        self.skipped = 0
        self._accelerator = accelerator
        trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self._names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self._in_a_row = 0
        self._steps: deque[int] = deque(maxlen=STEPS_KEPT)
        # Of the last steps, one row each: loss and norms. `_next` is the row that is written next.
        self._ring = torch.zeros(STEPS_KEPT, 1 + len(trained), device=accelerator.device)
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        """Return the counts that a resumed run continues with, without the norms."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.skipped = state["skipped"]
        self._in_a_row = state["in_a_row"]

    @torch.no_grad()
    def is_finite(self, step: int, loss: Tensor) -> bool:
        """Keep the norms of a step and say whether it may be taken.

        Args:
            step: Its number, from 1.
            loss: Of its last micro-batch, one element.

        Raises:
            NonFiniteError: If too many in a row were not finite, this one the last of them.
        """
        row = self._ring[self._next]
        row[0] = loss.detach()
        row[1:] = self._norms()
        self._next = (self._next + 1) % STEPS_KEPT
        self._steps.append(step)
        if self._is_finite_everywhere(row):
            self._in_a_row = 0
            return True
        self._count(step)
        return False

    def _is_finite_everywhere(self, row: Tensor) -> bool:
        """Say whether numbers are finite on every process."""
        is_finite = row.isfinite().all()
        if self._accelerator.num_processes == 1:
            return bool(is_finite)
        unfit = self._accelerator.reduce((~is_finite).float(), "sum")
        return unfit.item() == 0  # type: ignore[no-any-return]

    def _norms(self) -> Tensor:
        """Return the norms of the gradients that this process has, 0 where there is none."""
        places: list[int] = []
        gradients: list[Tensor] = []
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                places.append(place)
                gradients.append(local(parameter.grad).float())
        if not gradients:
            return torch.zeros(len(self._parameters), device=self._ring.device)
        present = torch.stack(list(torch._foreach_norm(gradients)))
        if len(places) == len(self._parameters):
            return present
        norms = torch.zeros(len(self._parameters), device=self._ring.device)
        norms[places] = present
        return norms

    def _count(self, step: int) -> None:
        """Count a step that is skipped, and end the run if there were too many in a row."""
        self.skipped += 1
        self._in_a_row += 1
        if self.skipped == 1:
            warnings.warn(
                f"loss or gradients of step {step} are not finite; the step is skipped, and "
                f"{SKIPS_IN_A_ROW} in a row end the run",
                RegradWarning,
                stacklevel=4,
            )
        if self._in_a_row >= SKIPS_IN_A_ROW:
            raise NonFiniteError(
                f"loss or gradients were not finite in {SKIPS_IN_A_ROW} steps in a row, "
                f"the last is step {step}; "
                "lower lr, clip the gradients, or look at nonfinite.csv",
                self.table(),
            )

    def table(self) -> str:
        """Return the kept steps as CSV, oldest first. Call it on every process.

        The columns are the step, the loss, and the norm of each gradient by its tensor's name.
        """
        oldest_first = torch.roll(self._ring, -self._next, 0)[-len(self._steps) :]
        kept = self._of_whole_tensors(oldest_first).tolist()
        text = io.StringIO(newline="")
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["step", "loss", *self._names])
        rows.writerows([step, *row] for step, row in zip(self._steps, kept, strict=True))
        return text.getvalue()

    def _of_whole_tensors(self, rows: Tensor) -> Tensor:
        """Return norms of whole tensors where the processes kept those of their shards."""
        loss_is_sharded = False
        sharded = torch.tensor(
            [loss_is_sharded, *(is_sharded(parameter) for parameter in self._parameters)],
            device=rows.device,
        )
        if not sharded.any():
            return rows
        whole = self._accelerator.reduce(rows.square(), "sum").sqrt()
        return torch.where(sharded, whole, rows)


@contextmanager
def keeping_norms(record: RunLog) -> Iterator[None]:
    """Keep the last steps' norms of a run that ends by `NonFiniteError`, and say that it diverged.

    Args:
        record: Of the run.
    """
    try:
        yield
    except NonFiniteError as problem:
        record.keep(NOT_FINITE, problem.table)
        told = without_secrets("".join(traceback.format_exception(problem)))
        record.end("diverged", error=told)
        raise
