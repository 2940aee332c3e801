"""Intervals that assume no distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def median_interval(values: Sequence[float], *, level: float = 0.05) -> tuple[float, float] | None:
    r"""Return an interval that holds the median of what `values` were drawn from, whatever its distribution.

    The k-th smallest and the k-th largest value, with the largest k for which
    :math:`2 P(B < k) \le` level, B binomial over n fair coins.

    Args:
        values: Numbers, n of them; infinity is a miss and larger than every number.
        level: One minus the least coverage of the interval.

    Returns:
        The interval; None where not even the whole range covers the median often enough: fewer than
        6 values at .05.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
        (1.0, 6.0)
        >>> median_interval(range(10))  # of ten the second and the ninth
        (1, 8)

    References:
        Thompson, 1936, "On Confidence Ranges for the Median and Other Expectation Distributions for
        Populations of Unknown Distribution Form".
    """
    ordered = sorted(values)
    rank = int(np.sum(2 * stats.binom.cdf(np.arange(len(ordered)), len(ordered), 0.5) <= level))
    return (ordered[rank - 1], ordered[-rank]) if rank else None
