"""Intervals that assume no distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import stats


def median_interval(values: Sequence[float], *, level: float = 0.05) -> tuple[float, float] | None:
    r"""Return an interval for the median of the distribution that `values` were drawn from.

    It runs from the k-th smallest to the k-th largest value, with the largest k for which
    :math:`2 P(B < k) \le` level, B binomial over n fair coins.

    Args:
        values: Numbers, n of them. Infinity stands for a miss, which is larger than every number.
        level: One minus the least coverage of the interval.

    Returns:
        The interval; None if not even the whole range covers the median often enough, as with
        fewer than 6 values at .05.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
        (1.0, 6.0)
        >>> median_interval(range(10))  # of ten the second and the ninth
        (1.0, 8.0)

    References:
        Thompson, 1936, "On Confidence Ranges for the Median and Other Expectation Distributions for
        Populations of Unknown Distribution Form".
    """
    ranks = _ranks(len(values), level)
    if ranks is None:
        return None
    smallest, largest = ranks
    ordered = np.sort(np.asarray(values, dtype=float))
    return float(ordered[smallest]), float(ordered[largest])


@cache
def _ranks(count: int, level: float) -> tuple[int, int] | None:
    """Return where the interval's ends stand among so many values in order, from 0."""
    if count == 0:
        return None
    test = stats.quantile_test(np.arange(count, dtype=float), p=0.5)
    interval: Any = test.confidence_interval(1 - level)  # scipy-stubs takes it for a float
    if math.isnan(interval.low) or math.isnan(interval.high):
        return None
    return int(interval.low), int(interval.high)
