import math

import numpy as np
import pytest
from regrad_runner.settings.arms import BASELINE
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.steps import (
    first_reaching,
    median_end,
    steps_ratio,
    steps_to_baseline,
)

RISING = [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
WHOLE_RUN = 100


def run(arm, seed, steps, *, status="finished", whole=WHOLE_RUN):
    return RunRow(
        arm=arm,
        seed=seed,
        value=0.5,
        steps_to_target=steps,
        steps=whole,
        step_seconds=1.0,
        status=status,
    )


def ratio_of(counts, **options):
    pairs = [
        (run("a", seed, steps), run(BASELINE, seed, others))
        for seed, (steps, others) in enumerate(counts)
    ]
    return steps_ratio(pairs, **options)


def curve_of(seed_level, slope, noise, generator):
    steps = range(10, 201, 10)
    values = seed_level + slope * np.log(steps) + noise * generator.normal(size=len(steps))
    return list(zip(steps, values.tolist(), strict=True))


def test_a_value_is_reached_by_the_running_median_of_three():
    assert first_reaching([(1, 0.1), (2, 0.9), (3, 0.2), (4, 0.5)], 0.4) == 4  # of .9, .2, .5
    assert first_reaching(RISING, 0.31) is None  # at the end it is .3
    assert first_reaching(RISING[:2], 0.1) is None
    falling = [(step, -value) for step, value in RISING]
    assert first_reaching(falling, -0.2, higher_is_better=False) == 30


def test_the_end_is_a_median_of_medians_by_hand():
    flat = [(10, 0.7), (20, 0.7), (30, 0.7)]
    jump = [(10, 0.0), (20, 0.6), (30, 0.9)]
    assert median_end([RISING, flat, jump]) == 0.6  # of .3, .7 and .6
    assert median_end([RISING, flat]) == pytest.approx(0.5)


def test_a_run_that_diverged_ends_worse_than_any_number():
    assert median_end([[], RISING, RISING]) == 0.3
    assert median_end([[], [], RISING]) is None
    assert median_end([[], RISING], higher_is_better=False) is None


def test_without_three_evaluations_there_is_no_end():
    assert median_end([RISING, RISING[:2]]) is None
    assert median_end([]) is None


def test_at_least_half_of_the_baseline_runs_reach_their_own_end():
    generator = np.random.default_rng(0)
    for count in (1, 2, 5, 6, 9):
        runs = {seed: curve_of(generator.normal(), 1.0, 0.2, generator) for seed in range(count)}
        found = steps_to_baseline({BASELINE: runs}, baseline=BASELINE)
        reached = [steps for steps in found.steps.values() if steps is not None]
        assert 2 * len(reached) >= count


def test_steps_are_counted_to_the_baseline_whatever_the_direction():
    fast = [(10, 0.2), (20, 0.3), (30, 0.4), (40, 0.4)]
    up = {BASELINE: {0: RISING}, "a": {0: fast, 1: []}}
    down = {
        arm: {seed: [(step, -value) for step, value in curve] for seed, curve in runs.items()}
        for arm, runs in up.items()
    }
    rising = steps_to_baseline(up, baseline=BASELINE)
    falling = steps_to_baseline(down, baseline=BASELINE, higher_is_better=False)
    assert (rising.target, falling.target) == (0.3, -0.3)
    assert rising.steps == falling.steps == {(BASELINE, 0): 40, ("a", 0): 30, ("a", 1): None}


def test_a_value_that_is_not_finite_reaches_nothing():
    gap = [(10, 0.1), (20, math.nan), (30, 0.3), (40, math.inf)]
    found = steps_to_baseline({BASELINE: {0: RISING}, "a": {0: gap}}, baseline=BASELINE)
    assert found.steps["a", 0] is None


@pytest.mark.parametrize("steps", [(0, 1, 2), (1, 1, 2), (3, 2, 1), (-3, -2, -1)])
def test_an_axis_that_counts_nothing_gives_no_steps(steps):
    curve = [(step, 0.5) for step in steps]
    found = steps_to_baseline({BASELINE: {0: RISING}, "a": {0: curve}}, baseline=BASELINE)
    assert (found.target, found.steps) == (None, {})


def test_a_comparison_without_the_baseline_counts_no_steps():
    assert steps_to_baseline({"a": {0: RISING}}, baseline=BASELINE).target is None


def test_the_interval_of_six_ratios_runs_from_the_smallest_to_the_largest():
    found = ratio_of([(50, 100), (60, 100), (70, 100), (80, 100), (90, 100), (99, 100)])
    assert found.ratio == pytest.approx(0.75)
    assert found.interval == pytest.approx((0.5, 0.99))
    assert found.p_value == 2 / 2**6
    assert found.pairs == 6


def test_five_pairs_have_a_ratio_without_an_interval():
    found = ratio_of([(50, 100)] * 5)
    assert (found.ratio, found.interval) == (0.5, None)


def test_misses_widen_the_interval_to_what_they_may_hide():
    hits = [(50, 100)] * 5
    assert ratio_of([*hits, (80, None)]).interval == (0.0, 0.8)  # the baseline takes over 100
    low, high = ratio_of([*hits, (None, 40)]).interval  # the arm takes over 100
    assert (low, high) == (0.5, None)
    assert ratio_of([*hits, (None, None)]).interval == (0.0, None)


def test_a_miss_of_the_baseline_alone_counts_by_the_most_that_the_ratio_can_be():
    assert ratio_of([(80, None)] * 6).ratio == 0.8
    assert ratio_of([(None, 80)] * 6).ratio is None
    assert ratio_of([(None, None)] * 6).ratio == 1.0
    assert ratio_of([]).ratio is None


def test_a_run_that_diverged_misses_for_ever():
    diverged = run("a", 0, None, status="diverged")
    other = run(BASELINE, 0, 50)
    pairs = [(diverged, other)] * 6
    assert steps_ratio(pairs).ratio is None
    assert steps_ratio(pairs).p_value == 2 / 2**6
    assert steps_ratio([(other, diverged)] * 6).interval == (0.0, 0.0)
    assert steps_ratio([(diverged, diverged)] * 6).pairs == 0


@pytest.mark.parametrize("seeds", [6, 10])
@pytest.mark.parametrize("end", [10**9, 140])
@pytest.mark.parametrize("truth", [1.0, 0.8])
def test_the_interval_covers_the_true_median_ratio_whatever_is_cut_off(seeds, end, truth):
    generator = np.random.default_rng(seeds)
    covered = 0
    for _ in range(500):
        together = 0.2 * generator.normal(size=seeds)
        others = 120 * np.exp(together + 0.15 * generator.normal(size=seeds))
        own = truth * 120 * np.exp(together + 0.15 * generator.normal(size=seeds))
        pairs = [
            (
                run("a", seed, own[seed] if own[seed] <= end else None, whole=end),
                run(BASELINE, seed, others[seed] if others[seed] <= end else None, whole=end),
            )
            for seed in range(seeds)
        ]
        low, high = steps_ratio(pairs).interval
        covered += low <= truth <= (math.inf if high is None else high)
    # The binomial says .969 for 6 and .979 for 10; its error here is below .009.
    assert covered / 500 >= 0.95


@pytest.mark.parametrize("seeds", [6, 10])
def test_the_interval_of_identical_arms_covers_one_where_the_baseline_sets_the_target(seeds):
    generator = np.random.default_rng(seeds)
    covered = 0
    for _ in range(200):
        together = 0.3 * generator.normal(size=seeds)
        curves = {
            arm: {
                seed: curve_of(together[seed] + 0.3 * generator.normal(), 1.0, 0.3, generator)
                for seed in range(seeds)
            }
            for arm in (BASELINE, "a")
        }
        steps = steps_to_baseline(curves, baseline=BASELINE).steps
        pairs = [
            (
                run("a", seed, steps["a", seed], whole=200),
                run(BASELINE, seed, steps[BASELINE, seed], whole=200),
            )
            for seed in range(seeds)
        ]
        low, high = steps_ratio(pairs).interval
        covered += low <= 1 <= (math.inf if high is None else high)
    assert covered / 200 >= 0.95
