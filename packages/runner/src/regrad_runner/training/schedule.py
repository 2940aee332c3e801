"""The learning rate over a run."""

from __future__ import annotations

import math


def schedule(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the factor on the learning rate of step `step`, from 0: a line up to 1, then a cosine down to 0.

    Example:
        >>> [round(schedule(step, warmup_steps=2, total_steps=6), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
