"""The learning rate over a run."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def schedule(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the factor on the learning rate of a step: a line up to 1, then a cosine down to 0.

    Args:
        step: Its number, from 0.
        warmup_steps: Steps of the line, at least 0.
        total_steps: Steps of the run.

    Example:
        >>> [round(schedule(step, warmup_steps=2, total_steps=6), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def build_scheduler(optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Return torch's scheduler that follows `schedule`."""

    # A plain function: of any other callable LambdaLR puts the attributes into its state.
    def factor(step: int) -> float:
        return schedule(step, warmup_steps=warmup_steps, total_steps=total_steps)

    return LambdaLR(optimizer, factor)
