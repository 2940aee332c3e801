"""Show what each correction would change before training, by one batch on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn, optim

from regrad.correction import Correction
from regrad.devices import random_numbers_kept
from regrad.engine import Engine
from regrad.errors import RegradError
from regrad.meter import change_and_cosine

COLUMNS = ("correction", "stage", "tensor", "relative_change", "cosine")
HEAD = "{:<16} {:<10} {:<40} {:>15} {:>8}"
LINE = "{:<16} {:<10} {:<40} {:>15.4} {:>8.4}"


class BatchTrial(Protocol):
    """What this file needs from an attachment, see `regrad.Attachment`."""

    model: nn.Module
    optimizer: optim.Optimizer
    corrections: tuple[Correction, ...]
    reasons: tuple[str, ...]
    engine: Engine

    @property
    def criterion(self) -> Any:
        """The criterion, corrected in training mode."""

    def receipt(self) -> dict[str, Any]:
        """Return what actually happened."""

    def state_dict(self) -> dict[str, Any]:
        """Return the corrections' state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def detach(self) -> None:
        """Remove every hook."""


AttachCopy = Callable[[nn.Module, optim.Optimizer, Sequence[Correction]], BatchTrial]
Row = dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """What an attachment would do on one batch.

    Attributes:
        rows: One per correction, stage and tensor: "correction", "stage",
            "tensor", "relative_change" (norm of the change over the norm before),
            "cosine" (before with after).
        seconds: Host time spent in each correction's hooks, by name.
        notes: Other remarks.
    """

    rows: list[Row]
    seconds: dict[str, float]
    notes: list[str]

    def __str__(self) -> str:
        head = HEAD.format(*COLUMNS)
        lines = [LINE.format(*row.values()) for row in self.rows]
        return "\n".join([head, *lines, *self.notes])


def explain(
    attached: BatchTrial, batch: Any, *, attach_copy: AttachCopy, has_criterion: bool
) -> Explanation:
    """Run one batch and every correction on copies of model, optimizer and corrections.

    Args:
        attached: The attachment to explain. Not changed.
        batch: As for `Attachment.explain`.
        attach_copy: Attaches new corrections to a copy of model and optimizer, with the
            criterion of `attached`.
        has_criterion: Whether there is such a criterion.

    Raises:
        TypeError: If the batch fits neither way of computing a loss.
        RegradError: Under FSDP2, whose modules cannot be copied.
    """
    if attached.engine.is_sharded():
        raise RegradError(
            "explain works on a copy, and FSDP2 modules cannot be copied; "
            "explain before fully_shard()"
        )
    model, optimizer = copy.deepcopy((attached.model, attached.optimizer))
    corrections = [type(own)(**vars(own.options)) for own in attached.corrections]
    with random_numbers_kept(model.parameters()):
        trial = attach_copy(model, optimizer, corrections)
        try:
            trial.load_state_dict(copy.deepcopy(attached.state_dict()))
            rows = _rows_of_one_step(trial, batch, has_criterion=has_criterion)
        finally:
            trial.detach()
    learned = [reason for reason in trial.reasons if reason not in attached.reasons]
    notes = [*attached.receipt()["notes"], *learned, *_idle(attached.corrections, rows)]
    return Explanation(rows, dict(trial.engine.seconds), notes)


def _rows_of_one_step(trial: BatchTrial, batch: Any, *, has_criterion: bool) -> list[Row]:
    """Compute the gradients of one batch, correct them, and return what each correction changed.

    The copy of the optimizer takes a step where a correction changes what that does.
    """
    trial.engine.meter.detail = []
    # A model may compute its loss itself here, although it does not in the loop.
    trial.engine.criterion_called = True
    criterion = trial.criterion if has_criterion else None

    def compute() -> Tensor:
        trial.optimizer.zero_grad()
        loss = _loss_of(trial.model.train(), criterion, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if trial.engine.callers["correct_update"]:
        trial.optimizer.step(compute)  # type: ignore[arg-type]
    else:
        compute()
        trial.engine.correct()
    rows: list[Row] = []
    for name, stage, tensors, measured in trial.engine.meter.detail:
        changes, cosines = change_and_cosine(measured)
        of_tensors = zip(tensors, changes.tolist(), cosines.tolist(), strict=True)
        rows += [dict(zip(COLUMNS, (name, stage, *values), strict=True)) for values in of_tensors]
    return rows


def _idle(corrections: Sequence[Correction], rows: Sequence[Row]) -> list[str]:
    """Return a note on each correction that changed nothing."""
    acted = {row["correction"] for row in rows if row["relative_change"]}
    return [
        f"{correction.name!r} has nothing to do at this step (no state yet, or it acts elsewhere)"
        for correction in corrections
        if correction.name not in acted
    ]


def _loss_of(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    """Return the loss of one batch, or raise `TypeError` if it cannot be known.

    A pair goes through model and criterion. A mapping is what the model is called with: it
    returns its loss under the name "loss", or as the only scalar that requires a gradient of
    a tensor or tuple, as `(logits, loss)` is.
    """
    if isinstance(batch, Mapping):
        return _loss_in(model(**batch))
    if isinstance(batch, tuple | list) and len(batch) == 2 and criterion is not None:
        inputs, target = batch
        loss = criterion(model(inputs), target)
        if isinstance(loss, Tensor):
            return loss
        raise TypeError(f"criterion must return a tensor, got {type(loss).__name__}")
    raise TypeError(
        "batch must be (inputs, target) with attach(…, criterion=…), or a mapping for a model "
        f"that returns its loss, got {type(batch).__name__}"
    )


def _loss_in(output: Any) -> Tensor:
    """Return the loss in what a model returned, or raise `TypeError` that says what that was."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return named
    parts = output if isinstance(output, tuple | list) else (output,)
    scalars = [
        part for part in parts if isinstance(part, Tensor) and not part.dim() and part.requires_grad
    ]
    if len(scalars) == 1:
        return scalars[0]
    raise TypeError(
        "model must return its loss when the batch is a mapping: as 'loss', or as "
        f"the only scalar with a gradient in a tuple, got {_described(output)}"
    )


def _described(output: Any) -> str:
    """Return types, names and shapes of what a model returned, in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} of {', '.join(map(_described, output)) or 'nothing'}"
    return type(output).__name__
