import math

import numpy as np
import pytest
from regrad_runner.statistics.intervals import median_interval


def interval_by_ranks(values, level):
    """Return the interval from the definition: whole numbers and a sorted list."""
    count = len(values)
    ordered = sorted(values)
    rank = 0
    below = 0
    while rank < count:
        below += math.comb(count, rank)
        if 2 * below / 2**count > level:
            break
        rank += 1
    return (ordered[rank - 1], ordered[-rank]) if rank else None


@pytest.mark.parametrize(
    ("count", "rank"), [(5, None), (6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (20, 6)]
)  # the table in Conover, "Practical Nonparametric Statistics": 2 P(B < k) <= .05
def test_the_interval_of_a_median_takes_the_ranks_of_the_binomial_table(count, rank):
    values = [float(v) for v in range(1, count + 1)][::-1]
    assert median_interval(values) == (None if rank is None else (rank, count + 1 - rank))


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    generator = np.random.default_rng(0)
    draws = generator.exponential(size=(4000, 10))  # far from normal; its median is log 2
    hits = [low <= math.log(2) <= high for low, high in map(median_interval, draws.tolist())]
    assert np.mean(hits) == pytest.approx(
        1 - 2 * 11 / 1024, abs=0.006
    )  # of ten the second to the ninth: .979


def test_a_miss_leaves_the_interval_of_a_median_open():
    assert median_interval([3.0, math.inf, 1.0, 2.0, math.inf, 4.0]) == (1.0, math.inf)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.3])
def test_the_interval_of_a_median_is_that_of_the_definition(level):
    generator = np.random.default_rng(0)
    for count in range(1, 61):
        plain = generator.normal(size=count)
        with_ties = np.round(plain)
        with_misses = np.where(generator.random(count) < 0.3, math.inf, plain)
        only_misses = np.full(count, math.inf)
        for values in (plain, with_ties, with_misses, only_misses):
            wanted = interval_by_ranks(values.tolist(), level)
            assert median_interval(values.tolist(), level=level) == wanted


def test_nothing_has_no_interval():
    assert median_interval([]) is None
