import json
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from regrad_runner.cli.main import main
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.training.run import TrainingRun

SMALL = ["--train-size", "100", "--batch-size", "25", "--width", "4", "--epochs", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(
        "corrections: []\nlr: [0.02, 0.1]\ntuning_seeds: 1\nseeds: 2\n"
    )
    return tmp_path


TWO = [*SMALL, "--config", "two.yaml"]


def prepared(capsys, *words) -> dict:
    assert main(["compare", "--cells", "--json", *TWO, *words, "--out", "out"]) == 0
    return json.loads(capsys.readouterr().out)


def run_cell(number, *words) -> int:
    return main(["compare", "--out", "out", "--cell", str(number), *words])


@pytest.mark.long
def test_cells_run_in_any_order_give_the_tables_of_one_comparison(here, capsys, tables):
    assert main(["compare", *TWO, "--tracker", "none", "--out", "serial"]) == 0
    capsys.readouterr()
    assert prepared(capsys, "--tracker", "none") == {
        "out": "out",
        "trials": "0-1",
        "extensions-1": "2",
        "extensions-2": "3",
        "extensions-3": "4",
        "runs": "5-6",
    }
    assert [run_cell(number) for number in (1, 0, 2, 3, 4, 6)] == [0] * 6
    assert main(["report", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_cells"] == [5]
    assert main(["report", "out"]) == 0
    assert (
        "1 of 7 cells are missing: 5; regrad compare --resume --out out runs them"
        in capsys.readouterr().out
    )
    assert run_cell(5) == 0
    assert "[1/1] cell 5: baseline, seed 0: test accuracy" in capsys.readouterr().err
    assert main(["report", "out", "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert tables(here / "out") == tables(here / "serial")
    rates = ResultsFolder(here / "out").choices["baseline"]
    assert len(rates.added) >= 1  # of two rates one is at an edge
    assert merged["learning_rates"]["baseline"] == {
        "tried": list(rates.tried),
        "added": list(rates.added),
        "chosen": rates.best,
        "at_edge": rates.at_edge,
    }
    assert main(["report", "serial", "--json"]) == 0
    assert merged["missing_cells"] == []
    shown = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in merged["arms"][0].items() if "time" not in k} == {
        k: v for k, v in shown["arms"][0].items() if "time" not in k
    }
    assert (here / "out" / "curves.png").is_file()


def test_a_run_before_the_trials_of_its_arm_is_refused_and_writes_nothing(here, capsys):
    prepared(capsys, "--tracker", "none")
    run_cell(0)
    capsys.readouterr()
    for number, missing in {5: "1-4", 4: "1-3", 3: "1-2", 2: "1"}.items():
        assert run_cell(number) == 2
        assert (
            "cell must come after the trials of its arm 'baseline', got none of the cells "
            f"{missing}; run them first" in capsys.readouterr().err
        )
    assert len(list((here / "out" / "runs").glob("*/*"))) == 1


# The validation accuracy that a trial is made to end with, by rate: the best one is at an edge
# once, and then inside.
ACCURACY = {0.02: 0.5, 0.1: 0.6, 0.5: 0.7, 2.5: 0.4}


def test_a_rate_that_its_arm_chose_without_ends_at_once_with_a_word(here, capsys, monkeypatch):
    original = TrainingRun.train

    def train(self, *, on_point, on_step):
        original(self, on_point=on_point, on_step=on_step)
        value = ACCURACY[self.lr]
        self.position.points[-1] = replace(self.position.points[-1], value=value)

    monkeypatch.setattr(TrainingRun, "train", train)
    prepared(capsys, "--tracker", "none")
    assert [run_cell(number) for number in (0, 1, 2)] == [0, 0, 0]
    said = capsys.readouterr().err
    assert "cell 2: baseline, lr 0.5, trial 1: validation accuracy 0.7000" in said
    assert ResultsFolder(here / "out").missing == [3, 4, 5, 6]
    assert run_cell(5) == 2
    assert "got none of the cells 3-4; run them first" in capsys.readouterr().err
    assert run_cell(4) == 2
    assert "got none of the cells 3; run them first" in capsys.readouterr().err
    assert run_cell(3) == 0
    assert ResultsFolder(here / "out").missing == [5, 6]
    capsys.readouterr()
    assert run_cell(4) == 0
    assert (
        "cell 4: baseline, extension 3, trial 1: its arm chose a learning rate without it"
        in capsys.readouterr().err
    )
    assert [run_cell(number) for number in (3, 5, 6)] == [0, 0, 0]
    assert "cell 3: baseline, lr 2.5, trial 1: it has already ended" in capsys.readouterr().err
    assert {result.lr for result in ResultsFolder(here / "out").results} == {0.5}


def test_a_cell_that_is_none_or_of_another_comparison_is_refused(here, capsys):
    prepared(capsys, "--tracker", "none")
    assert run_cell(7) == 2
    assert "cell must be from 0 to 6, got 7" in capsys.readouterr().err
    assert run_cell(0, "--epochs", "2") == 2
    assert (
        "cell must have the settings of 'out', got epochs 1 there and 2 here"
        in capsys.readouterr().err
    )
    assert main(["compare", "--cell", "0"]) == 2
    assert "out must be given" in capsys.readouterr().err
    assert main(["compare", "--cell", "0", "--jobs", "2", "--out", "out"]) == 2
    assert "--jobs must be given without --cell" in capsys.readouterr().err
    assert not (here / "out" / "runs").exists()


def test_a_cell_that_ended_is_not_run_again_and_one_that_failed_is(here, capsys, monkeypatch):
    prepared(capsys, "--tracker", "none", "--lr", "0.05")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_micro_batch", lambda *_: 1 / 0)
        assert run_cell(0) == 1
    said = capsys.readouterr().err
    assert "baseline, seed 0 failed: ZeroDivisionError: division by zero" in said
    assert "cell 0: baseline, seed 0: failed" in said
    assert "ZeroDivisionError" in (here / "out" / "failures.txt").read_text()
    assert [r.status for r in ResultsFolder(here / "out").results] == ["failed"]
    assert run_cell(0) == 0
    assert [r.status for r in ResultsFolder(here / "out").results] == ["finished"]
    monkeypatch.setattr(TrainingRun, "_micro_batch", lambda *_: 1 / 0)
    assert run_cell(0) == 0
    assert "cell 0: baseline, seed 0: it has already ended" in capsys.readouterr().err


def test_a_comparison_goes_on_from_what_cells_left(here, capsys):
    prepared(capsys, "--tracker", "none", "--lr", "0.05")
    assert run_cell(1) == 0
    capsys.readouterr()
    assert main(["compare", "--resume", "--out", "out"]) == 0
    said = capsys.readouterr().err
    assert "[2/2] baseline, seed 0" in said
    assert "baseline, seed 1" not in said
    assert [result.seed for result in ResultsFolder(here / "out").results] == [0, 1]


def test_a_record_that_no_run_left_is_one_clear_line(here, capsys):
    prepared(capsys, "--tracker", "none")
    (here / "out" / "runs" / "baseline" / "0").mkdir(parents=True)
    (here / "out" / "runs" / "baseline" / "0" / "run.json").write_text('{"result": 3}')
    assert main(["report", "out"]) == 2
    said = capsys.readouterr().err
    assert "run.json' must be the record of a run, got id: Field required" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("ready_schema")
def test_what_cells_track_is_shown_under_the_comparison_by_sync(here, capsys):
    prepared(capsys, "--lr", "0.05")
    assert run_cell(0) == 0
    assert not (here / "out" / "mlflow.db").exists()  # nodes share a database's file badly
    assert main(["sync", "out"]) == 0
    with closing(sqlite3.connect(here / "out" / "mlflow.db")) as database:
        runs = dict(
            database.execute("select name, run_uuid from runs where status = 'FINISHED'").fetchall()
        )
        (comparison,) = database.execute(
            "select run_uuid from runs where name = 'out' and status = 'RUNNING'"
        ).fetchone()
        parents = database.execute(
            "select run_uuid, value from tags where key = 'mlflow.parentRunId'"
        ).fetchall()
    assert set(runs) == {"baseline, seed 0"}
    assert parents == [(runs["baseline, seed 0"], comparison)]
    assert run_cell(1) == 0
    assert main(["sync", "out"]) == 0
    with closing(sqlite3.connect(here / "out" / "mlflow.db")) as database:
        assert database.execute("select distinct status from runs").fetchall() == [("FINISHED",)]


def test_the_cells_of_a_folder_can_be_asked_for_again_and_more_seeds_come_last(here, capsys):
    assert main(["compare", "--cells", *TWO, "--tracker", "none", "--out", "out"]) == 0
    rounds = "extensions-1 2\nextensions-2 3\nextensions-3 4\n"
    assert capsys.readouterr().out == f"trials 0-1\n{rounds}runs 5-6\nout out\n"
    assert main(["compare", "--cells", "--resume", "--out", "out", "--seeds", "4"]) == 0
    assert capsys.readouterr().out == f"trials 0-1\n{rounds}runs 5-8\nout out\n"
