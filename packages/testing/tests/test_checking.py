"""What is installed is found and checked by name, with its own suite or the generic one."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import regrad
import regrad.registry
from regrad_testing import CorrectionSuite, OptimizerSuite, checking
from regrad_testing.__main__ import main

MINE = """
from dataclasses import dataclass
from regrad import Correction
from regrad.correction import Needs

class Halve(Correction):
    name = "mine"
    needs = Needs(stages=("gradient",))

    @dataclass(frozen=True, kw_only=True)
    class Options:
        factor: float = 1.0

    def correct_gradients(self, step):
        for gradient in step.gradients:
            if gradient is not None:
                gradient.mul_(self.options.factor)

    def idle_reason(self):
        return None
"""


@pytest.fixture
def installed(tmp_path):
    """Install a correction into a folder of its own; return what checks it there."""
    (tmp_path / "mine.py").write_text(MINE)
    about = tmp_path / "regrad_mine-1.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: regrad-mine\nVersion: 1.5\n")
    (about / "entry_points.txt").write_text("[regrad]\nmine = mine:Halve\n")

    def check(*words):
        command = [sys.executable, "-m", "regrad_testing", *words]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=250, check=False
        )

    return check


def test_what_is_installed_without_a_suite_is_checked_by_the_generic_one(installed):
    done = installed("mine:factor=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [report[key] for key in ("name", "kind", "distribution", "version", "suite")] == [
        *("mine", "correction", "regrad-mine", "1.5", "generic")
    ]
    outcomes = {row["clause"]: row["outcome"] for row in report["clauses"]}
    assert {clause for clause, outcome in outcomes.items() if outcome == "skipped"} == {
        "reference",
        "no effect",
    }
    assert {*outcomes.values()} == {"proved", "skipped"}
    assert [*outcomes][:2] == ["hooks", "reference"]


def test_a_suite_given_as_a_file_is_preferred_and_its_failures_are_told(installed, tmp_path):
    suite = tmp_path / "test_mine.py"
    suite.write_text(
        "from mine import Halve\nfrom regrad_testing import CorrectionSuite\n"
        "class TestMine(CorrectionSuite):\n    correction, processes = Halve, 1\n"
        "class TestOther(CorrectionSuite):\n    correction = 'other'\n"
    )
    done = installed("mine", str(suite))
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    failed = [
        (row["suite"], row["clause"]) for row in report["clauses"] if row["outcome"] == "failed"
    ]
    assert (report["suite"], failed) == (str(suite), [("TestMine", "effect")])
    assert {row["suite"] for row in report["clauses"]} == {"TestMine"}


def test_what_is_not_there_is_one_line_and_exit_code_2(capsys):
    assert main("no-such-correction") == 2
    assert "no correction named 'no-such-correction'" in capsys.readouterr().err


@pytest.mark.parametrize("editable", [True, False])
def test_an_editable_install_leads_to_the_suite_in_its_source_tree(editable, tmp_path, monkeypatch):
    told = json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": editable}})
    found = SimpleNamespace(read=lambda name: told)
    monkeypatch.setattr(checking.distributions, "find", lambda name, version: found)
    entry = regrad.registry.Entry("mine", "regrad-mine", "1.5", "mine:Halve", "")
    assert checking.own_suite(entry) is None
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_conformance.py").touch()
    assert checking.own_suite(entry) == (
        tmp_path / "tests" / "test_conformance.py" if editable else None
    )


@pytest.mark.parametrize("told", ["", "[]", '{"dir_info": []}', "no JSON", '{"dir_info": {}}'])
def test_an_origin_that_is_damaged_leads_nowhere(told, monkeypatch):
    found = SimpleNamespace(read=lambda name: told)
    monkeypatch.setattr(checking.distributions, "find", lambda name, version: found)
    entry = regrad.registry.Entry("mine", "regrad-mine", "1.5", "mine:Halve", "")
    assert checking.own_suite(entry) is None


def test_a_distribution_of_an_odd_name_is_never_looked_up():
    entry = regrad.registry.Entry("mine", "../../..", "1.5", "mine:Halve", "")
    assert checking.own_suite(entry) is None


def test_a_suite_belongs_to_what_it_names_or_makes():
    mine = type("Mine", (regrad.Correction,), {"name": "mine"})
    made = [mine, "mine:a=1", staticmethod(mine)]
    suites = [type("Suite", (CorrectionSuite,), {"correction": given}) for given in made]
    assert [checking.is_suite_of(suite, "mine", mine) for suite in suites] == [True] * 3
    assert [checking.is_suite_of(suite, "other", None) for suite in suites] == [False] * 3
    optimizer = type("Suite", (OptimizerSuite,), {"optimizer": dict})
    assert checking.is_suite_of(optimizer, "any", dict)
    assert not checking.is_suite_of(optimizer, "any", list)
