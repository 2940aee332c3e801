"""One batch through a copy of the user's model: what each correction would change, before training."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regrad.errors import refuse_if
from regrad.meter import change_and_cosine

if TYPE_CHECKING:
    from regrad.attachment import Attachment

COLUMNS = ("correction", "stage", "tensor", "relative_change", "cosine")


@dataclass(frozen=True)
class Explanation:
    """What an attachment would do on one batch.

    Attributes:
        rows: One per correction, stage and tensor: "correction", "stage",
            "tensor", "relative_change" (norm of the change over the norm before),
            "cosine" (before with after).
        seconds: Host time spent in each correction's hooks, by name.
        notes: What else is worth knowing.
    """

    rows: list[dict[str, Any]]
    seconds: dict[str, float]
    notes: list[str]

    def __str__(self) -> str:
        form, head = (
            "{:<16} {:<10} {:<40} {:>15.4} {:>8.4}",
            "{:<16} {:<10} {:<40} {:>15} {:>8}".format(*COLUMNS),
        )
        return "\n".join([head, *(form.format(*row.values()) for row in self.rows), *self.notes])


def explain(attachment: "Attachment", criterion: Any, batch: Any) -> Explanation:
    """Run one batch and every correction on copies of model, optimizer and corrections."""
    rows, live, sharded = (
        list[dict[str, Any]](),
        attachment.corrections,
        attachment.engine.is_sharded(),
    )
    refuse_if(
        sharded,
        "explain works on a copy, and FSDP2 modules cannot be copied; explain before fully_shard()",
    )
    model, optimizer = copy.deepcopy((attachment.model, attachment.optimizer))
    twins = [type(c)(**vars(c.options)) for c in live]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with (
        torch.random.fork_rng(devices),
        type(attachment)(model, optimizer, twins, criterion) as trial,
    ):
        trial.load_state_dict(copy.deepcopy(attachment.state_dict()))
        trial.engine.meter.detail = []
        trial.engine.criterion_called = True  # a model may compute its loss itself here
        _loss_of(model.train(), trial.criterion if criterion else None, batch).backward()  # type: ignore[no-untyped-call]
        trial.engine.correct()
        for name, stage, names, table in trial.engine.meter.detail:
            measures = (column.tolist() for column in change_and_cosine(table))
            rows += [
                dict(zip(COLUMNS, (name, stage, *row), strict=True))
                for row in zip(names, *measures, strict=True)
            ]
    quiet = [
        c.name
        for c in live
        if not any(row["correction"] == c.name and row["relative_change"] for row in rows)
    ]
    notes = [
        f"{name!r} has nothing to do at this step (no state yet, or it acts elsewhere)"
        for name in quiet
    ]
    learned = [reason for reason in trial.reasons if reason not in attachment.reasons]
    return Explanation(
        rows, dict(trial.engine.seconds), [*attachment.receipt()["notes"], *learned, *notes]
    )


def _loss_of(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    """Return the loss of one batch, or raise `TypeError` where it cannot be known.

    A pair goes through model and criterion. A mapping is what the model is called with: it
    returns its loss under the name "loss", or as the only scalar that requires a gradient of
    a tensor or tuple, as `(logits, loss)` is.
    """
    if isinstance(batch, Mapping):
        return _loss_in(model(**batch))
    if isinstance(batch, tuple | list) and len(batch) == 2 and criterion is not None:
        loss = criterion(model(batch[0]), batch[1])
        if isinstance(loss, Tensor):
            return loss
        raise TypeError(f"criterion must return a tensor, got {type(loss).__name__}")
    rule = "(inputs, target) with attach(…, criterion=…), or a mapping for a model that returns its loss"
    raise TypeError(f"batch must be {rule}, got {type(batch).__name__}")


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
        "model must return its loss for a batch that is a mapping: under the name 'loss', or as the only "
        f"scalar with a gradient in a tuple, got {_described(output)}"
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
