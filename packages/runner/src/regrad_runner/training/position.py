"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field

from regrad_runner.results.points import Point


@dataclass
class Position:
    """How far a run is; with weights and states, what a checkpoint holds.

    Attributes:
        step: Optimizer steps done.
        epoch: The epoch under way, from 0.
        batch: Micro-batches of that epoch done.
        seconds: Time spent in training steps up to the last evaluation or checkpoint that was
            loaded.
        points: The evaluations so far.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    points: list[Point] = field(default_factory=list)
