"""Paired tests, and how to adjust several of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from regrad_runner.statistics.rows import RunRow


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A two-sided paired test: Student's t, or the signed ranks where one run of a pair diverged.

    Attributes:
        pairs: Number n of seeds that say something: both runs have a number, or one alone diverged.
        diverged: Those in which one alone diverged.
        difference: Mean of this arm minus the other, in units of the measure, over the seeds in
            which both have a number; None without one.
        interval: Student-t interval of that mean at 1 - level; None for fewer than two such seeds.
        p_value: Probability of what was found, or of more, without a cause; None for one pair.
        side: Sign of what was found: 1 where this arm's numbers are larger, -1 where they are
            smaller, 0 for neither.
    """

    pairs: int
    diverged: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    side: int = 0


def paired_difference(
    pairs: Sequence[tuple[RunRow, RunRow]], *, higher_is_better: bool = True, level: float = 0.05
) -> PairedDifference | None:
    """Test whether paired runs differ.

    Args:
        pairs: Runs (this arm, the other arm) with equal seeds, each with a number or diverged.
        higher_is_better: On which side of every number a run that diverged stands: the worse one.
        level: One minus the coverage of the interval.

    Returns:
        The test, or None if no pair says anything: both of each diverged, or there are none.
    """
    values = [(one.value, other.value) for one, other in pairs if one.usable and other.usable]
    one_diverged = [one.diverged for one, other in pairs if one.diverged != other.diverged]
    if not values and not one_diverged:
        return None
    test = _student(values, level=level)
    if not one_diverged:
        return test
    worst = -math.inf if higher_is_better else math.inf
    lost = [worst if is_this_arm else -worst for is_this_arm in one_diverged]
    differences = [*(one - other for one, other in values), *lost]
    side = int(np.sign(_signed_ranks(differences).sum()))
    p_value = sign_flip_p(differences) if len(differences) > 1 else None
    return replace(test, pairs=len(differences), diverged=len(lost), p_value=p_value, side=side)


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Adjust p-values so that the chance of any false rejection among them keeps its level.

    For the k-th smallest of m,
    :math:`\tilde p_{(k)} = \max_{j \le k} \min(1, (m - j + 1)\, p_{(j)})`.

    Args:
        p_values: Any number of them, each in [0, 1].

    Returns:
        The adjusted ones, in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    References:
        Holm, 1979, "A Simple Sequentially Rejective Multiple Test Procedure", section 3.
    """
    # By hand: scipy has no Holm, and six lines do not justify statsmodels.
    count = len(p_values)
    rising = sorted(range(count), key=p_values.__getitem__)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(rising):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def sign_flip_p(log_ratios: Sequence[float]) -> float:
    """Return the exact two-sided p-value of the sum of signed ranks under random signs.

    Zeros say nothing and are left out; ties share their mean rank; infinities rank behind
    everything else, equal among themselves. The distribution over all 2ⁿ signs is counted by adding
    one rank after the other.

    Args:
        log_ratios: Logarithms of paired ratios, `inf` where only this arm missed the target, `-inf`
            where only the other did, 0 where both did.

    Returns:
        The probability, in (0, 1]; 1 where nothing is left.

    Example:
        >>> sign_flip_p([-0.1, -0.2, -0.3, -0.2, -0.5, -0.1])  # all six one way: 2 of 2⁶ signs
        0.03125

    References:
        Wilcoxon, 1945, "Individual Comparisons by Ranking Methods"; Fisher, 1935, "The Design of
        Experiments", section 21, for the sign flips.
    """
    # By hand: the exact distribution of scipy's `wilcoxon` is that of ranks without ties.
    signed = _signed_ranks(log_ratios)
    if not len(signed):
        return 1.0
    ranks = np.abs(signed)
    total = int(ranks.sum())
    counts = np.zeros(total + 1)  # of the sign patterns whose positive ranks come to each sum
    counts[0] = 1.0
    for rank in ranks:
        counts[rank:] = counts[rank:] + counts[: total + 1 - rank]
    positive = int(signed[signed > 0].sum())
    tail = float(counts[: min(positive, total - positive) + 1].sum())
    return min(1.0, 2 * tail / 2.0 ** len(signed))


def _student(values: Sequence[tuple[float, float]], *, level: float) -> PairedDifference:
    """Return Student's paired test of the numbers of this arm and of the other."""
    if not values:
        return PairedDifference(pairs=0)
    table = np.array(values)
    differences = table[:, 0] - table[:, 1]
    count = len(differences)
    mean = float(differences.mean())
    test = PairedDifference(pairs=count, difference=mean, side=int(np.sign(mean)))
    if count == 1:
        return test
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    rounding = 1e-12 * float(np.abs(table).max())
    if error <= rounding:  # without a spread t has no denominator; the signs still count
        p_value = 1.0 if abs(mean) <= rounding else 2.0 ** (1 - count)
        return replace(test, interval=(mean, mean), p_value=p_value)
    student = stats.ttest_rel(table[:, 0], table[:, 1])
    low, high = student.confidence_interval(1 - level)
    return replace(test, interval=(float(low), float(high)), p_value=float(student.pvalue))


def _signed_ranks(differences: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return, of all that are not 0, twice the rank by size, with the sign of the difference.

    Twice, so that the mean rank of ties is a whole number too.
    """
    nonzero = np.array([value for value in differences if value != 0])
    doubled: npt.NDArray[np.float64] = np.rint(2 * stats.rankdata(np.abs(nonzero)))
    signed: npt.NDArray[np.float64] = doubled * np.sign(nonzero)
    return signed.astype(np.int64)
