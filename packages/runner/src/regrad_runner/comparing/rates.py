"""The choice of learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from regrad_runner.comparing.plan import Plan
from regrad_runner.results.outcomes import Trial
from regrad_runner.settings.arms import Arm


def chosen_rates(plan: Plan, trials: Sequence[Trial]) -> dict[str, float]:
    """Return each arm's learning rate: the best mean of its trials, by the validation split at its end."""
    sign = 1 if plan.workload.measure.higher_is_better else -1

    def score(arm: Arm, lr: float) -> float:
        values = [trial.validation for trial in trials if (trial.arm, trial.lr) == (arm.name, lr)]
        return sign * fmean(values) if values and all(map(math.isfinite, values)) else -math.inf

    return {arm.name: max(plan.rates, key=partial(score, arm)) for arm in plan.arms}
