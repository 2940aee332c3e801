import csv
import io
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st
from regrad_runner.reporting.figures.png import write_pngs
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.reporting.table import print_comparison
from regrad_runner.results.outcomes import CurvePoint, Result
from regrad_runner.results.run import folder_name, run_path
from regrad_runner.results.tables import COMPUTED, read_rows, write_rows
from regrad_runner.statistics.verdicts import summarize
from regrad_runner.tracking.mlflow import MetricPoint, TrackedRun, project
from regrad_runner.tracking.stores import Store
from regrad_runner.workloads.workload import Measure
from regrad_testing.files import load_beside
from rich.console import Console

cases = load_beside(__file__, "cases")
HOSTILE = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "'=1",
    "''",
    "../../x",
    "/etc/passwd",
    "..",
    "a/b",
    "a\\b",
    "C:\\x",
    "~",
]
HOSTILE += [
    "[/bold]",
    "[red]",
    "$\\frac$",
    "$x",
    "_hidden",
    "<script>alert(1)</script>",
    '"a","b"',
    "a;b",
    "%s{}",
    "x" * 400,
]

plain = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Co", "Cn")), min_size=1, max_size=30
)
names = (
    st.sampled_from(HOSTILE)
    | plain
    | st.builds("".join, st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3))
)


@cases.hostile(130, names, st.integers(0, 9))
def test_any_name_stays_in_its_folder_and_in_its_cell_and_comes_back(tmp_path, name, seed):
    path = run_path(tmp_path, name, seed)
    assert path.resolve() == path
    assert path.parent.parent == tmp_path / "runs"
    assert re.fullmatch(r"[a-z0-9_][a-z0-9._=+-]{0,110}", path.parent.name)
    row = Result(arm=name, seed=seed, value=-0.5, must_beat=name)
    write_rows(tmp_path / "results.csv", [row], Result)
    assert read_rows(tmp_path / "results.csv", Result) == [row]
    text = (tmp_path / "results.csv").read_text(encoding="utf-8")
    (cells,) = csv.DictReader(io.StringIO(text))
    assert not cells["arm"].startswith(COMPUTED[:-1])
    assert not cells["must_beat"].startswith(COMPUTED[:-1])
    assert cells["value"] == "-0.5"


def test_two_names_never_share_a_folder():
    folders = [
        folder_name(name)
        for name in ["a/b", "a b", "a_b", "a\\b", "a//b", *("y" * 300 + end for end in "12")]
    ]
    assert len(set(folders)) == len(folders)
    assert folders[2] == "a_b"


def results_of(arms):
    return [
        Result(
            arm=arm,
            seed=seed,
            value=0.5 + 0.01 * seed,
            steps_to_target=3,
            step_seconds=0.1,
            touched=True,
            status="finished",
        )
        for arm in arms
        for seed in range(2)
    ]


def test_names_are_shown_as_they_are_in_figures_tables_and_progress(tmp_path):
    arms, measure = ["baseline", *filter(str.isprintable, HOSTILE[:-1])], Measure(target=0.5)
    results = results_of(arms)
    rows = [result.as_run_row() for result in results]
    summaries = summarize(
        rows, controls=dict.fromkeys(arms[1:]), higher_is_better=True, target=measure.fixed_target
    )
    curves = [
        CurvePoint(arm=r.arm, seed=r.seed, step=s, epoch=s, loss=1.0, value=0.1 * s, lr=0.1)
        for r in rows
        for s in (1, 2)
    ]
    data = ReportData(
        folder=SimpleNamespace(results=results, curves=curves),
        measure=measure,
        summaries=summaries,
        effects=[],
        qualities=[],
        about={},
        settings={},
        receipts={},
    )
    assert len(write_pngs(data, tmp_path)) == 3
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=3000)
        print_comparison(console, summaries, measure)
        with Display(console, runs=1) as display:
            for name in HOSTILE:
                display.begin(name, steps=1)
                display.note(name)
                display.end(name)
        shown = console.file.getvalue()
        assert all(name in shown for name in HOSTILE if name.isprintable())


@pytest.mark.usefixtures("ready_schema")
def test_any_name_reaches_the_tracker_and_is_found_there(tmp_path):
    odd = [
        *HOSTILE[::3],
        "../../x",
        "/etc/passwd",
        ".",
        "a/../b",
        "a//b/",
        os.fsdecode(b"\xff\xfe"),
        "\x00",
        "\x1b[31m",
        "two\nlines",
    ]
    store = Store(tmp_path)
    for number, name in enumerate(odd):
        point = MetricPoint(name, 0.5, 1_700_000_000_000, 1)
        run = TrackedRun(
            id=f"{number:032x}",
            experiment="regrad digits",
            name=name,
            status="FINISHED",
            started=1_700_000_000_000 + number,
            ended=1_700_000_000_000 + number,
            parameters={name: name},
            points=[point],
            folder=tmp_path,
        )
        assert project(store, run)
        assert not project(store, run)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        told = [name for (name,) in database.execute("select name from runs order by start_time")]
        count = database.execute("select count(*) from metrics").fetchone()[0]
    assert len(told) == count == len(odd)
    assert {name for name in odd if name.isprintable()} <= set(told)
    assert all(name.isprintable() for name in told)


def test_html_is_written_in_one_place_that_escapes():
    source = Path(cases.__file__).parents[2] / "src"
    found = [
        path
        for path in source.rglob("*.py")
        if "<html" in path.read_text() or "jinja" in path.read_text()
    ]
    assert [path.name for path in found] == ["write.py"]
    assert "autoescape=True" in found[0].read_text()
    assert [
        path for path in source.rglob("*.html") if "|safe" in path.read_text().replace(" ", "")
    ] == []


@pytest.mark.parametrize("name", ["[/x]", "=out", "$o$"])
def test_a_folder_of_any_name_is_written_and_shown(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    small = [
        "--train-size",
        "100",
        "--batch-size",
        "50",
        "--width",
        "4",
        "--epochs",
        "1",
        "--tracker",
        "none",
    ]
    code, out, _ = cases.command("train", *small, "--threads", "1", "--out", name)
    assert code == 0
    assert f"everything is in {name}; regrad report {name} shows this again" in out
    assert cases.command("report", name)[:2] == (0, out)
