"""Paired tests, and what several of them at once may claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import special, stats

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
        The test, or None where no pair says anything: both of each diverged, or there are none.
    """
    values = [(one.value, other.value) for one, other in pairs if one.usable and other.usable]
    worst = -math.inf if higher_is_better else math.inf
    lost = [
        worst if one.diverged else -worst for one, other in pairs if one.diverged != other.diverged
    ]
    test = _student(values, level=level)
    if not lost:
        return test if values else None
    differences = [*(one - other for one, other in values), *lost]
    side = int(np.sign(_signed_ranks(differences).sum()))
    p_value = sign_flip_p(differences) if len(differences) > 1 else None
    return replace(test, pairs=len(differences), diverged=len(lost), p_value=p_value, side=side)


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Adjust p-values so that the chance of any false rejection among them keeps its level.

    For the k-th smallest of m, :math:`\tilde p_{(k)} = \max_{j \le k} \min(1, (m - j + 1)\, p_{(j)})`.

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
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def sign_flip_p(log_ratios: Sequence[float]) -> float:
    """Return the exact two-sided probability of the sum of signed ranks when every sign is a fair coin.

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
    signed = _signed_ranks(log_ratios)
    if not len(signed):
        return 1.0
    doubled = np.abs(signed)
    total = int(doubled.sum())
    counts = np.zeros(total + 1)
    counts[0] = 1.0
    for rank in doubled:
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
    count, mean = len(differences), float(differences.mean())
    if count == 1:
        return PairedDifference(pairs=1, difference=mean, side=int(np.sign(mean)))
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    rounding = 1e-12 * float(np.abs(table).max())
    test = PairedDifference(
        pairs=count, difference=mean, interval=(mean, mean), side=int(np.sign(mean))
    )
    if error <= rounding:
        return replace(test, p_value=1.0 if abs(mean) <= rounding else 2.0 ** (1 - count))
    half = float(special.stdtrit(count - 1, 1 - level / 2)) * error
    p_value = 2 * float(special.stdtr(count - 1, -abs(mean) / error))
    return replace(test, interval=(mean - half, mean + half), p_value=p_value)


def _signed_ranks(differences: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return the ranks of the sizes of all that are not 0, with their signs; doubled, so that ties are whole too."""
    signed = np.array([value for value in differences if value != 0])
    doubled: npt.NDArray[np.float64] = np.rint(2 * stats.rankdata(np.abs(signed))) * np.sign(signed)
    return doubled.astype(np.int64)
