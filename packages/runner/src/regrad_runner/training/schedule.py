"""The learning rate over a run."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def schedule(step: int, *, warmup_steps: int, total_steps: int, parts: int = 1) -> float:
    """Return the factor on the learning rate of a step: a line up to 1, then a cosine down to 0.

    Args:
        step: Its number, from 0.
        warmup_steps: Steps of the line, at least 0.
        total_steps: Steps of the run.
        parts: Equal parts of the run, each with a line and a cosine of its own.

    Example:
        >>> [round(schedule(step, warmup_steps=2, total_steps=6), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [schedule(step, warmup_steps=0, total_steps=4, parts=2) for step in range(5)]
        [1.0, 0.5, 1.0, 0.5, 0.0]
    """
    part = part_of(step, total_steps=total_steps, parts=parts)
    begin = part_begin(part, total_steps=total_steps, parts=parts)
    total_steps = part_begin(part + 1, total_steps=total_steps, parts=parts) - begin
    step -= begin
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def part_of(step: int, *, total_steps: int, parts: int) -> int:
    """Return in which part of a run a step is, from 0; after the run it is the last one.

    Example:
        >>> [part_of(step, total_steps=5, parts=2) for step in range(6)]
        [0, 0, 1, 1, 1, 1]
    """
    begun = [
        part
        for part in range(parts)
        if part_begin(part, total_steps=total_steps, parts=parts) <= step
    ]
    return begun[-1]


def part_begin(part: int, *, total_steps: int, parts: int) -> int:
    """Return the first step of a part; for `parts` itself the number of steps."""
    return total_steps * part // parts


def build_scheduler(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, parts: int = 1
) -> LambdaLR:
    """Return torch's scheduler that follows `schedule`."""

    # A plain function: of any other callable LambdaLR puts the attributes into its state.
    def factor(step: int) -> float:
        return schedule(step, warmup_steps=warmup_steps, total_steps=total_steps, parts=parts)

    return LambdaLR(optimizer, factor)
