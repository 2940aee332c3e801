"""`regrad plugins check`: the kit's report as a table, as JSON, and its exit codes."""

import json

import pytest
from regrad_runner.cli.main import main
from regrad_runner.plugins import check as checks


def report(*rows, suite="generic"):
    keys = ("suite", "clause", "outcome", "reason", "proves", "details")
    clauses = [dict(zip(keys, row, strict=True)) for row in rows]
    told = {
        "name": "mine",
        "kind": "correction",
        "distribution": "regrad-mine",
        "version": "1.0",
        "suite": suite,
    }
    return {**told, "clauses": clauses}


PROVED = ("TestMine", "effect", "proved", "", "It changes something.", "")
SKIPPED = ("TestMine", "sparse", "skipped", "declares [none]", "Sparse is right.", "")
FAILED = (
    "TestMine",
    "resume",
    "failed",
    "'a' differs by 1e-3",
    "Resumed is the same.",
    "a traceback",
)


def test_people_see_clause_outcome_and_reason_and_the_details_of_failures(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert checks.show_check(report(PROVED, SKIPPED, FAILED), as_json=False) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "effect proved It changes something." in lines
    assert "sparse skipped because declares [none]" in lines
    assert "resume FAILED 'a' differs by 1e-3" in lines
    assert "a traceback" in lines
    generic = "the kit's generic suite, without a reference"
    assert lines[-1] == f"mine (regrad-mine 1.0), {generic}: 1 proved, 1 skipped, 1 failed"


def test_without_a_failure_the_exit_code_is_0_and_several_suites_are_told_apart(capsys):
    other = ("TestOther", *PROVED[1:])
    assert checks.show_check(report(PROVED, other, suite="here.py"), as_json=False) == 0
    out = capsys.readouterr().out
    assert "TestMine" in out
    assert "TestOther" in out
    assert "the suite in here.py: 2 proved, 0 skipped, 0 failed" in out


def test_programs_get_the_report_as_json(monkeypatch, capsys):
    monkeypatch.setattr(checks, "run_check", lambda spec, suite: report(PROVED, FAILED))
    assert main(["plugins", "check", "mine", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == report(PROVED, FAILED)


def test_without_the_kit_there_is_one_line_that_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(checks, "KIT", "no_such_kit")
    assert main(["plugins", "check", "agc"]) == 2
    said = "regrad: regrad-testing must be installed to check a plugin; pip install 'regrad-runner[check]'\n"
    assert capsys.readouterr().err == said


def test_an_unknown_name_and_a_missing_file_are_one_line_each(capsys, tmp_path):
    pytest.importorskip("regrad_testing", reason="the conformance kit is not installed")
    assert main(["plugins", "check", "no-such-correction"]) == 2
    assert "no correction named 'no-such-correction'; installed: " in capsys.readouterr().err
    assert main(["plugins", "check", "agc", "--suite", str(tmp_path / "none.py")]) == 2
    assert "suite must be a file, got" in capsys.readouterr().err
