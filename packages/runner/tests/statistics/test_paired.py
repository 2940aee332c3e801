import math

import numpy as np
import pytest
from regrad_runner.statistics.paired import paired_difference
from regrad_runner.statistics.rows import RunRow
from scipy import special


def pairs_of(table):
    return [
        tuple(
            RunRow(arm=arm, seed=seed, value=value, step_seconds=1.0)
            for arm, value in zip(("agc", "baseline"), values, strict=True)
        )
        for seed, values in enumerate(table.tolist())
    ]


@pytest.mark.parametrize("count", [2, 3, 6, 10, 40])
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_the_paired_test_is_that_of_the_formula(count, level):
    table = np.random.default_rng(count).normal(loc=(0.3, 0.0), size=(count, 2))
    differences = table[:, 0] - table[:, 1]
    mean = differences.mean()
    error = differences.std(ddof=1) / math.sqrt(count)
    half = special.stdtrit(count - 1, 1 - level / 2) * error
    test = paired_difference(pairs_of(table), level=level)
    assert test.difference == mean
    assert test.p_value == pytest.approx(
        2 * special.stdtr(count - 1, -abs(mean) / error), rel=1e-12
    )
    # Where an end is near zero, rounding is that of the terms that cancel.
    assert test.interval == pytest.approx(
        (mean - half, mean + half), rel=1e-12, abs=1e-14 * (abs(mean) + half)
    )


@pytest.mark.parametrize(("shift", "p_value"), [(0.5, 2.0**-5), (0.0, 1.0)])
def test_differences_without_a_spread_are_judged_by_their_signs(shift, p_value):
    column = np.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.2])
    test = paired_difference(pairs_of(np.stack([column + shift, column], axis=1)))
    assert test.interval == (test.difference, test.difference)
    assert test.p_value == p_value


def test_a_spread_just_above_rounding_is_tested_without_a_warning():
    wobble = 1e-11 * np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    table = np.stack([1000.0 + wobble * 1000, np.zeros(6)], axis=1)
    assert paired_difference(pairs_of(table)).p_value < 1e-20
