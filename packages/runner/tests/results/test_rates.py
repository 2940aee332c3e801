import math

import pytest
from regrad_runner.results.cells import Cell, Extension, cells_of
from regrad_runner.results.outcomes import Trial
from regrad_runner.results.rates import (
    RateSearch,
    choices_of,
    choose_rate,
    missing_cells,
    rate_beyond,
    run_of,
    search_of,
)
from regrad_runner.settings.config import FIRST_TUNING_SEED, CompareConfig

NAN = math.nan


def trials_of(values, arm="agc"):
    """Return trials: their values by rate, in the order of the seeds."""
    return [
        Trial(arm=arm, lr=lr, seed=FIRST_TUNING_SEED + number, validation=value)
        for lr, row in values.items()
        for number, value in enumerate(row)
    ]


def chosen(values, *, higher_is_better=True):
    """Return what is chosen among given rates that may not be added to."""
    search = RateSearch(
        tuple(values), len(next(iter(values.values()))), 0, higher_is_better=higher_is_better
    )
    return choose_rate(search, trials_of(values)).best


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({0.1: [0.7, 0.7, 0.7], 0.2: [0.9, 0.9, 0.6], 0.3: [0.1, 0.2, 0.3]}, 0.1),
        ({0.1: [0.7, 0.7, 0.7], 0.2: [0.9, 0.9, NAN], 0.3: [0.6, 0.6, 0.6]}, 0.1),
        ({0.1: [0.7, 0.7, 0.7], 0.2: [0.9, 0.9, math.inf], 0.3: [0.6, 0.6, 0.6]}, 0.1),
        ({0.1: [0.7, 0.7, 0.7], 0.2: [0.7, 0.8, 0.7], 0.3: [0.6, 0.9, 0.9]}, 0.2),
        ({0.3: [0.7, 0.8, 0.7], 0.1: [0.7, 0.7, 0.8], 0.2: [0.8, 0.7, 0.7]}, 0.1),
        ({0.1: [NAN, 0.9, 0.9], 0.2: [NAN, NAN, NAN], 0.3: [0.9, 0.9, -math.inf]}, 0.1),
    ],
    ids=["worst", "diverged", "infinite", "tie of worst", "tie", "all diverged"],
)
def test_the_rate_with_the_best_worst_trial_is_chosen(values, best):
    assert chosen(values) == best
    falling = {lr: [-value for value in row] for lr, row in values.items()}
    assert chosen(falling, higher_is_better=False) == best


def test_an_arm_waits_until_every_trial_of_every_rate_has_ended():
    search = RateSearch((0.1, 0.2, 0.4), trials=2)
    values = {0.1: [0.1, 0.2], 0.2: [0.9, 0.9], 0.4: [0.2]}
    waiting = choose_rate(search, trials_of(values))
    assert (waiting.best, waiting.is_settled, waiting.at_edge) == (None, False, False)
    settled = choose_rate(search, trials_of(values | {0.4: [0.2, 0.1]}))
    assert (settled.best, settled.is_settled, settled.at_edge) == (0.2, True, False)


def searched(score, rates, *, trials=1, extensions=3):
    """Run a search to its end on rates with known values; return the choice and its steps."""
    search = RateSearch(tuple(rates), trials, extensions)
    values = {rate: [score(rate)] * trials for rate in rates}
    choice = choose_rate(search, trials_of(values))
    steps = 0
    while not choice.is_settled:
        steps += 1
        values[choice.added[-1]] = [score(choice.added[-1])] * trials
        choice = choose_rate(search, trials_of(values))
    return choice, steps


@pytest.mark.parametrize(
    ("best_of_all", "added", "best", "at_edge"),
    [
        (0.03, (), 0.03, False),
        (0.1, (0.333,), 0.1, False),
        (0.3, (0.333, 1.11), 0.333, False),
        (1.0, (0.333, 1.11, 3.7), 1.11, False),
        (100.0, (0.333, 1.11, 3.7), 3.7, True),
        (0.01, (0.00333,), 0.01, False),
        (1e-9, (0.00333, 0.00111, 0.00037), 0.00037, True),
    ],
)
def test_rates_are_added_beyond_the_edge_until_one_is_worse_or_three_were_added(
    best_of_all, added, best, at_edge
):
    choice, steps = searched(lambda rate: -abs(math.log(rate / best_of_all)), [0.1, 0.03, 0.01])
    assert choice.added == added
    assert (choice.best, choice.at_edge, steps) == (best, at_edge, len(added))
    assert list(choice.tried) == sorted({0.01, 0.03, 0.1, *added})


def test_an_arm_of_which_every_rate_diverged_tries_smaller_ones():
    assert searched(lambda _: NAN, [0.1, 0.3])[0].added == (0.0333, 0.0111, 0.0037)


def test_without_extensions_the_rates_given_are_all():
    choice, _ = searched(lambda rate: rate, [0.1, 0.3], extensions=0)
    assert (choice.best, choice.tried, choice.at_edge) == (0.3, (0.1, 0.3), True)


def test_one_rate_is_no_choice():
    choice = choose_rate(RateSearch((0.1,)), [])
    assert (choice.best, choice.is_settled, choice.at_edge) == (0.1, True, False)


@pytest.mark.parametrize(
    ("tried", "best", "beyond"),
    [
        ([0.1, 0.3], 0.3, 0.9),
        ([0.1, 0.3], 0.1, 0.0333),
        ([0.1, 0.2, 0.8], 0.8, 3.2),
        ([0.1, 0.2, 0.8], 0.1, 0.05),
        ([0.1, 0.2, 0.8], 0.2, None),
        ([1e200, 1e300], 1e300, None),
        ([1e-300, 1e-200], 1e-300, None),
        ([0.1, 0.1001], 0.1001, 0.1001 * (0.1001 / 0.1)),
        ([1.0, math.nextafter(1, 2)], 1.0, 1 / math.nextafter(1, 2)),
    ],
)
def test_the_rate_beyond_is_as_far_as_the_neighbour_and_a_positive_number(tried, best, beyond):
    assert rate_beyond(tried, best) == beyond


SETTINGS = CompareConfig(seeds=1, lr=[0.1, 0.3], tuning_seeds=1, tuning_extensions=2)
ARMS = ("baseline", "agc")
CELLS = cells_of(ARMS, SETTINGS)


def lacking(values):
    """Return the names of the cells that are missing after trials: their values by arm and rate."""
    trials = [trial for arm, rates in values.items() for trial in trials_of(rates, arm)]
    ended = {(trial.arm, trial.lr) for trial in trials}
    choices = choices_of(CELLS, search_of(SETTINGS, higher_is_better=True), trials)
    missing = missing_cells(CELLS, choices, lambda cell: (cell.arm, cell.lr) in ended)
    return [CELLS[number].name for number in missing]


def test_rates_that_may_still_be_asked_for_are_missing_and_those_chosen_without_are_not():
    runs = ["baseline, seed 0", "agc, seed 0"]
    assert lacking({}) == [cell.name for cell in CELLS]
    of_baseline = [
        "baseline, extension 1, trial 1",
        "baseline, extension 2, trial 1",
    ]
    agc = {0.1: [0.9], 0.3: [0.8], 0.0333: [0.7]}
    assert lacking({"agc": agc, "baseline": {0.1: [0.8]}}) == [
        "baseline, lr 0.3, trial 1",
        *of_baseline,
        *runs,
    ]
    assert lacking({"agc": agc, "baseline": {0.1: [0.8], 0.3: [0.9]}}) == [*of_baseline, *runs]
    settled = {0.1: [0.8], 0.3: [0.9], 0.9: [0.95], 2.7: [0.99]}
    assert lacking({"agc": agc, "baseline": settled}) == runs


def test_an_extension_stands_for_the_trial_that_its_arm_asked_for():
    search = search_of(SETTINGS, higher_is_better=True)
    choice = choices_of(CELLS, search, trials_of({0.1: [0.8], 0.3: [0.9]}))["agc"]
    extension = Extension("agc", FIRST_TUNING_SEED, 1)
    assert run_of(extension, choice) == Cell("agc", FIRST_TUNING_SEED, 0.9)
    assert run_of(Extension("agc", FIRST_TUNING_SEED, 2), choice) is None
    assert run_of(Cell("agc", 0), choice) == Cell("agc", 0)
