"""The choice of each arm's learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from regrad_runner.comparing.plan import Planned
from regrad_runner.results.outcomes import Trial
from regrad_runner.settings.arms import Arm


def chosen_rates(plan: Planned[Any], trials: Sequence[Trial]) -> dict[str, float]:
    """Return each arm's learning rate: that of the best mean, at the end, on the validation split.

    Args:
        plan: Has the arms and the rates to choose from.
        trials: What came of each rate. A rate of which a trial diverged is the worst.
    """
    if not plan.rates:  # a script that takes none
        return dict.fromkeys((arm.name for arm in plan.arms), 0.0)
    sign = 1 if plan.measure.higher_is_better else -1

    def score(arm: Arm, lr: float) -> float:
        tried = [trial for trial in trials if trial.arm == arm.name and trial.lr == lr]
        values = [trial.validation for trial in tried]
        if not values or not all(map(math.isfinite, values)):
            return -math.inf
        return sign * fmean(values)

    return {arm.name: max(plan.rates, key=partial(score, arm)) for arm in plan.arms}
