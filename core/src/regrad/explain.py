"""One batch through the user's model: what each correction would change, before training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrad.engine import Engine
from regrad.meter import Meter, cosine


@dataclass(frozen=True)
class Explanation:
    """What an attachment would do on one batch.

    Attributes:
        rows: One per correction, stage and tensor: "correction", "stage",
            "tensor", "relative_change" (norm of the change over the norm before),
            "cosine" (before with after).
        seconds: Time of each correction's hooks, by name.
        notes: What else is worth knowing.
    """

    rows: list[dict[str, Any]]
    seconds: dict[str, float]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {"rows": self.rows, "seconds": self.seconds, "notes": self.notes}

    def __str__(self) -> str:
        lines = [f"{'correction':<16} {'stage':<10} {'tensor':<40} {'change':>9} {'cosine':>8}"]
        for row in self.rows:
            lines.append(
                f"{row['correction']:<16} {row['stage']:<10} {row['tensor']:<40} "
                f"{row['relative_change']:>9.2e} {row['cosine']:>8.4f}"
            )
        return "\n".join([*lines, *self.notes])


def explain(model: nn.Module, engine: Engine, criterion: Callable[..., Tensor] | None, batch: Any) -> Explanation:
    """Run one batch forward and backward and every correction on it, then put everything back."""
    seconds: dict[str, float] = {}
    with _untouched(model, engine) as meter:
        meter.detail = []
        model.train()
        loss_of(model, criterion, batch).backward()
        engine.close_window()
        step = engine.step()
        for hook in ("predict_weights", "correct_gradients", "correct_moments"):
            for correction, call in engine.callers[hook]:
                step.correction = correction
                start = time.perf_counter()
                with torch.no_grad():
                    call(step=step)
                seconds[correction.name] = seconds.get(correction.name, 0.0) + time.perf_counter() - start
        rows = []
        for name, stage, names, table in meter.detail:
            changes = (table[:, 1] / table[:, 2].clamp_min(torch.finfo(torch.float32).tiny)).sqrt().tolist()
            for tensor, change, angle in zip(names, changes, cosine(table).tolist(), strict=True):
                rows.append(
                    {"correction": name, "stage": stage, "tensor": tensor, "relative_change": change, "cosine": angle}
                )
    unique = {(r["correction"], r["stage"], r["tensor"]): r for r in rows}
    quiet = [c.name for c in engine.corrections if c.name not in {r["correction"] for r in rows}]
    notes = [f"{name!r} has nothing to do at this step (no state yet, or it acts elsewhere)" for name in quiet]
    return Explanation(list(unique.values()), seconds, notes)


def loss_of(model: nn.Module, criterion: Callable[..., Tensor] | None, batch: Any) -> Tensor:
    """Return the loss of one batch.

    Raises:
        TypeError: If the batch is neither (inputs, target) with a criterion nor keyword arguments of a model that returns a loss.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
    elif isinstance(batch, tuple | list) and len(batch) == 2 and criterion is not None:
        return criterion(model(batch[0]), batch[1])
    raise TypeError(
        "batch must be (inputs, target) with attach(…, criterion=…), or a mapping for a model that returns its loss"
    )


@contextmanager
def _untouched(model: nn.Module, engine: Engine) -> Iterator[Meter]:
    """Give a fresh meter; afterwards put back weights, buffers, gradients, state, mode and random numbers."""
    engine.close_window()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for state in engine.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    values = [t.detach().clone() for t in tensors]
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    states = [copy.deepcopy(c.state_dict()) for c in engine.corrections]
    meter, engine.meter._sums, engine.meter._counts = engine.meter, {}, {}
    sums, counts, forwards = meter._sums, meter._counts, engine._forwards
    for p, _ in gradients:
        p.grad = None
    with torch.random.fork_rng():
        try:
            yield meter
        finally:
            engine.close_window()
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            for p, gradient in gradients:
                p.grad = gradient
            for module, mode in modes:
                module.training = mode
            for correction, state in zip(engine.corrections, states, strict=True):
                correction.load_state_dict(state)
            meter.detail, meter._sums, meter._counts, engine._forwards = None, sums, counts, forwards
