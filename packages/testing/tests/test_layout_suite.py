"""The suite for layouts, on one that neither core nor kit knows, on shards, and on a broken one."""

import sys
from pathlib import Path

import pytest
from regrad.registry import available
from regrad_testing.files import load_file


def loaded():
    """Return the suites; where Python looks for distributions is left as it was."""
    before = list(sys.path)
    try:
        return load_file(Path(__file__).parent / "own_engine" / "suites.py", "own_engine_suites")
    finally:
        sys.path[:] = before


SUITES = loaded()
TestLate = SUITES.TestLate
TestSharded = SUITES.TestSharded


def test_an_engine_that_forgets_to_write_back_is_caught():
    suite = SUITES.WithoutCommit()
    suite.test_it_is_chosen_at_attach()
    with pytest.raises(AssertionError, match=r"reads-elements, rank 0: '.*' ends .* more than"):
        suite.test_what_it_offers_trains_as_one_process()


def test_the_engine_is_installed_in_the_processes_alone():
    assert "late" not in available("regrad.layouts")
