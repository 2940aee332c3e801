"""What each exit does on the last training batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from regrad.sharding import local
from torch import Tensor


class LastBatch:
    """Keeps what the exits said on the last training batch, and measures it when asked.

    Keeping costs no operation; the logits of one batch stay alive. Of logits that lie in parts on
    several ranks only their number is known.

    Attributes:
        exits: How many exits there were; 0 before the first batch.
    """

    def __init__(self) -> None:
        self.exits = 0
        self._outputs: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._target: Tensor | None = None
        self._ignored = -100

    def keep(
        self,
        outputs: Sequence[Tensor],
        sums: Sequence[Tensor],
        losses: Sequence[Tensor],
        target: Tensor,
        settings: Mapping[str, Any],
    ) -> None:
        """Keep one batch in place of the last one.

        Args:
            outputs: z_n of each exit, [N, C, ...].
            sums: F_n of each, of the same shape.
            losses: Of each exit.
            target: Class indices, or probabilities of the shape of the logits.
            settings: Of the cross entropy.
        """
        self.exits = len(outputs)
        if any(local(output) is not output for output in outputs):
            return  # to measure logits in parts, all ranks would have to come
        self._outputs = [output.detach() for output in outputs]
        self._sums = [each.detach() for each in sums]
        self._losses = [loss.detach() for loss in losses]
        self._target = target
        self._ignored = settings.get("ignore_index", -100)

    def metrics(self) -> dict[str, float]:
        """Return loss, accuracy and share of increment of each exit, numbered from 1."""
        found: dict[str, float] = {}
        rows = zip(self._outputs, self._sums, self._losses, strict=True)
        for number, (output, total, loss) in enumerate(rows, start=1):
            found[f"exit{number}_loss"] = loss.float().mean().item()
            found[f"exit{number}_accuracy"] = self._accuracy(total)
            found[f"exit{number}_increment_share"] = _norm_ratio(output, total)
        return found

    def _accuracy(self, logits: Tensor) -> float:
        """Return the share of the rows that count whose largest logit is the target's."""
        target: Any = self._target
        classes = min(1, logits.dim() - 1)
        if target.is_floating_point():
            target = target.argmax(classes)
        counts = target != self._ignored
        is_right = (logits.argmax(classes) == target) & counts
        return float(is_right.sum() / counts.sum().clamp_min(1))


def _norm_ratio(part: Tensor, whole: Tensor) -> float:
    """Return the norm of a tensor over that of another; 0 where that is 0."""
    norms = torch.stack([part.float().norm(), whole.float().norm()]).tolist()
    return norms[0] / norms[1] if norms[1] else 0.0
