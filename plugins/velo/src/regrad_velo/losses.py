"""What VeLO remembers of the losses: running means of ten spans, and their minima."""

from __future__ import annotations

import math
from typing import Any

SPANS = 10
FIRST_SPAN = 10.0  # steps; the last span is that of the whole training
NO_MINIMUM = 999999999999.0
SMALLEST_RANGE = 1e-8
STEPS_WITHOUT_FEATURES = 2


def new_losses() -> dict[str, Any]:
    """Return the memory before the first step, in plain numbers that any checkpoint can hold."""
    return {"steps": 0, "means": (0.0,) * SPANS, "minima": (NO_MINIMUM,) * SPANS}


def decays_of(num_steps: int) -> list[float]:
    """Return the decay of each running mean, its span spread by ratios from 10 to `num_steps`."""
    ratio = num_steps / FIRST_SPAN
    spans = [FIRST_SPAN * ratio ** (index / (SPANS - 1)) for index in range(SPANS)]
    return [math.exp(-1 / span) for span in spans]


def with_loss(losses: dict[str, Any], loss: float, num_steps: int) -> dict[str, Any]:
    """Return the memory after one more loss, which counts at most twice the largest mean.

    Args:
        losses: From `new_losses` or this function. Not changed.
        loss: Of this step.
        num_steps: Of the whole training.
    """
    decays = decays_of(num_steps)
    steps = losses["steps"] + 1
    debts = [1 - decay**steps for decay in decays]
    if losses["steps"] > 0:
        largest = max(mean / debt for mean, debt in zip(losses["means"], debts, strict=True))
        loss = min(2 * abs(largest), loss)
    else:
        loss = min(2 * abs(loss), loss)
    means = []
    minima = []
    for index, decay in enumerate(decays):
        mean = decay * losses["means"][index] + (1 - decay) * loss
        means.append(mean)
        minima.append(min(losses["minima"][index], mean / debts[index]))
    return {"steps": steps, "means": tuple(means), "minima": tuple(minima)}


def loss_features(losses: dict[str, Any], num_steps: int) -> list[float]:
    """Return, for each span but the last, where its mean is between its minimum and the next mean.

    Args:
        losses: From `with_loss`.
        num_steps: Of the whole training.

    Returns:
        9 numbers in [-1, 1]: -1 at the minimum, 0 at the mean of the next longer span. All 0 in
        the first two steps.
    """
    steps = losses["steps"]
    if steps <= STEPS_WITHOUT_FEATURES:
        return [0.0] * (SPANS - 1)
    decays = decays_of(num_steps)
    means = [mean / (1 - decay**steps) for mean, decay in zip(losses["means"], decays, strict=True)]
    features = []
    for index in range(SPANS - 1):
        minimum = losses["minima"][index]
        spread = max(SMALLEST_RANGE, means[index + 1] - minimum)
        feature = (means[index] - minimum) / spread - 1
        features.append(min(1.0, max(-1.0, feature)))
    return features
