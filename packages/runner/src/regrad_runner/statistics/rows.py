"""What the statistics need to know about one run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """What the statistics need to know about one run.

    Attributes:
        arm: Name of the arm.
        seed: Runs of two arms with one seed are a pair: same first weights, same batches.
        value: The workload's primary measure; ignored where the run failed.
        steps_to_target: Optimizer steps until the target was reached first, at least 1; None if it
            never was.
        steps: Steps of the whole run, in the unit of `steps_to_target`; 0 where that is not known.
        step_seconds: Time of one training step, in seconds, positive.
        touched: Whether the arm's corrections changed any tensor.
        status: "finished"; "diverged", which is an outcome, the worst of all; or "failed" for any
            other reason, which says nothing about the arm.
    """

    arm: str
    seed: int
    value: float
    steps_to_target: int | None = None
    steps: int = 0
    step_seconds: float
    touched: bool = False
    status: Literal["finished", "diverged", "failed"] = "finished"

    @property
    def usable(self) -> bool:
        """Whether the run ended with a number."""
        return self.status == "finished" and math.isfinite(self.value)

    @property
    def diverged(self) -> bool:
        """Whether the run ended because its numbers were not finite."""
        return self.status == "diverged"
