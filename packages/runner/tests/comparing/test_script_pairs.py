"""Runs of a script that should be alike, and those that should differ."""

import math

import pytest
from regrad import RegradError
from regrad_runner.comparing.script_pairs import Pairs
from regrad_runner.results.cells import Cell

BASELINE, XGRAD, AGC = "baseline", "xgrad", "agc"


def test_runs_of_one_seed_that_begin_alike_are_no_news():
    pairs = Pairs()
    assert pairs.add(Cell(BASELINE, 0), "a", [2.0, 1.0]) is None
    assert pairs.add(Cell(XGRAD, 0), "a", [2.0, 0.9]) is None
    assert pairs.add(Cell(BASELINE, 1), "b", [2.1, 1.0]) is None


@pytest.mark.parametrize("arms", [(BASELINE, XGRAD), (XGRAD, BASELINE)])
def test_the_first_pair_that_begins_differently_is_one_warning(arms):
    pairs = Pairs()
    assert pairs.add(Cell(arms[0], 3), "a", [1.0]) is None
    warning = pairs.add(Cell(arms[1], 3), "b", [1.0])
    assert warning.startswith("warning: with seed 3, 'xgrad' started from other weights or inputs")
    assert warning.endswith("or give --seed-by-run")
    assert pairs.add(Cell(AGC, 3), "c", [1.0]) is None


def test_corrections_are_compared_with_the_baseline_not_with_each_other():
    pairs = Pairs()
    assert pairs.add(Cell(XGRAD, 0), "a", [1.0]) is None
    assert pairs.add(Cell(AGC, 0), "b", [1.0]) is None


def test_equal_runs_from_different_seeds_are_an_error():
    pairs = Pairs()
    pairs.add(Cell(XGRAD, 0), "a", [2.0, 1.0])
    with pytest.raises(
        RegradError, match=r"the same run of 'xgrad' from seeds 0 and 1: .*\{seed\}"
    ):
        pairs.add(Cell(XGRAD, 1), "a", [2.0, 1.0])


@pytest.mark.parametrize(
    ("start", "curve", "cell"),
    [
        ("a", [2.0, 1.5], Cell(XGRAD, 1)),  # as after a dropout with a seed of its own
        ("b", [2.0, 1.0], Cell(XGRAD, 1)),  # two runs may end alike
        ("a", [2.0, 1.0], Cell(XGRAD, 1, 0.1)),  # a trial, with another learning rate
    ],
)
def test_runs_that_differ_in_anything_are_no_error(start, curve, cell):
    pairs = Pairs()
    pairs.add(Cell(XGRAD, 0), "a", [2.0, 1.0])
    assert pairs.add(cell, start, curve) is None


def test_runs_of_which_nobody_saw_the_beginning_say_nothing():
    pairs = Pairs()
    assert pairs.add(Cell(BASELINE, 0), None, [math.inf]) is None
    assert pairs.add(Cell(BASELINE, 1), None, [math.inf]) is None
    assert pairs.add(Cell(XGRAD, 0), "a", [1.0]) is None
