"""The kit is tested with what is wrong: each mistake is caught by the clause meant for it."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from regrad_testing import CorrectionSuite, OptimizerSuite, load_beside

SUITES = {
    name: cls
    for name, cls in vars(load_beside(__file__, "broken")).items()
    if name.startswith("Test")
}
WRONG = [name for name, suite in SUITES.items() if suite.caught_by]
RIGHT = [name for name, suite in SUITES.items() if not suite.caught_by]
RUN = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from regrad_testing.checking import run_suites
rows = run_suites(Path(sys.argv[1]), lambda cls, clause: cls.caught_by in (None, clause) or clause == "determinism")
print(json.dumps([asdict(row) for row in rows]))
"""


@pytest.fixture(scope="module")
def rows():
    """Run what is right in full, of what is wrong the clause meant for it and one more; return them by suite."""
    command = [sys.executable, "-c", RUN, str(Path(__file__).with_name("broken.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = defaultdict(dict)
    for row in json.loads(done.stdout):
        found[row["suite"]][row["clause"]] = row
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_caught_by_the_clause_meant_for_it(name, rows):
    meant = SUITES[name].caught_by
    assert rows[name][meant]["outcome"] == "failed"
    assert rows[name][meant]["reason"], "a failure without a reason"
    # what breaks at once would fail every clause, and prove nothing of the one that is meant
    assert meant == "determinism" or rows[name]["determinism"]["outcome"] == "proved"


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_proved_in_every_clause_that_applies(name, rows):
    outcomes = {clause: (row["outcome"], row["reason"]) for clause, row in rows[name].items()}
    assert {clause: said for clause, said in outcomes.items() if said[0] == "failed"} == {}
    skipped = {clause for clause, (outcome, _) in outcomes.items() if outcome == "skipped"}
    options_it_has_not = (
        {"foreach", "maximize", "weight decay"}
        if issubclass(SUITES[name], OptimizerSuite)
        else set()
    )
    assert skipped == options_it_has_not


def test_enough_is_wrong_and_every_clause_but_the_report_of_time_catches_something(rows):
    kinds = {
        kind: [n for n in WRONG if issubclass(SUITES[n], kind)]
        for kind in (CorrectionSuite, OptimizerSuite)
    }
    assert len(kinds[CorrectionSuite]) >= 16
    assert len(kinds[OptimizerSuite]) >= 3
    caught = {SUITES[name].caught_by for name in kinds[CorrectionSuite]}
    assert rows["TestHalved"].keys() - caught == {"overhead"}
