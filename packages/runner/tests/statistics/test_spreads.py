import numpy as np
import pytest
from regrad_runner.settings.arms import BASELINE
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.spreads import spread_ratios
from regrad_runner.statistics.verdicts import summarize
from scipy import integrate, stats

VALUES = [0.1, -0.4, 0.3, 0.7, -0.2, 0.5]


def rows_of(arm, values):
    return [
        RunRow(arm=arm, seed=seed, value=value, step_seconds=1.0, touched=True)
        for seed, value in enumerate(values)
    ]


def wider(by):
    return [by * value for value in VALUES]


def test_an_arm_that_spreads_more_than_three_times_as_much_is_unsteady():
    found = spread_ratios({BASELINE: VALUES, "a": wider(2.99), "b": wider(3.01)})
    assert found["b"].ratio == pytest.approx(3.01)
    assert found["b"].steadiest == BASELINE
    assert [arm for arm, ratio in found.items() if ratio.is_unsteady] == ["b"]


def test_the_probability_is_that_of_the_ratio_of_two_variances():
    p_value = spread_ratios({BASELINE: VALUES, "a": wider(2.0)})["a"].p_value
    density = stats.f(5, 5).pdf
    assert p_value == pytest.approx(2 * integrate.quad(density, 4, np.inf)[0])
    three = spread_ratios({BASELINE: VALUES, "a": wider(2.0), "b": VALUES})["a"].p_value
    assert three == pytest.approx(min(1, 3 * p_value))


def test_the_probability_is_kept_where_all_arms_spread_alike():
    generator = np.random.default_rng(0)
    for arms in (2, 7):
        tables = generator.normal(size=(1000, arms, 6))
        small = 0
        for table in tables:
            found = spread_ratios(dict(enumerate(table.tolist())))
            small += min(ratio.p_value for ratio in found.values()) <= 0.05
        assert small / 1000 <= 0.07


def test_an_arm_whose_runs_are_all_equal_is_not_the_steadiest():
    found = spread_ratios({BASELINE: VALUES, "a": [1.0] * 6})
    assert (found["a"].ratio, found["a"].is_unsteady) == (0.0, False)
    assert found[BASELINE].steadiest == BASELINE
    assert spread_ratios({"a": [1.0] * 6}) == {}


def test_few_runs_say_nothing_of_a_spread():
    rows = rows_of(BASELINE, VALUES) + rows_of("a", wider(10)[:5])
    baseline, summary = summarize(rows, controls={"a": None})
    assert (summary.spread_ratio, summary.unsteady) == (None, False)
    assert baseline.spread_ratio == 1.0


def test_a_verdict_is_the_same_whether_or_not_an_arm_is_unsteady():
    wide = [value + 2.0 for value in wider(5)]
    rows = rows_of(BASELINE, VALUES) + rows_of("a", wide)
    alone = summarize(rows, controls={"a": None})
    beside = summarize([*rows, *rows_of("n", VALUES)], controls={"a": None, "b": "n"})
    assert [summary.unsteady for summary in alone] == [False, True]
    assert (alone[1].verdict, alone[1].p_value) == (beside[1].verdict, beside[1].p_value)
