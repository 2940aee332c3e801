"""`--resume auto`: one command for the first start and every restart."""

import os
import signal
from pathlib import Path

import pytest
import torch
from regrad_runner.checkpoints.folder import checkpoints
from regrad_runner.cli.main import main
from regrad_runner.cli.resuming import ALONE, read_resume
from regrad_runner.comparing import compare
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.locks import writing
from regrad_runner.training.run import TrainingRun

SHAPE = [
    *["--train-size", "100", "--batch-size", "25", "--width", "4", "--threads", "1"],
    *["--tracker", "none"],
]
TRAIN = ["train", *SHAPE, "--epochs", "2", "--checkpoint-every", "1"]
AUTO = ["--resume", "auto", "--out", "out"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = checkpoints(folder / "checkpoints")[-1] / "tensors.pt"
    return torch.load(file, weights_only=True)["model"]


def ended_in_its_step(monkeypatch, step, words):
    """Run a command that gets a SIGTERM in a training step; return its exit code."""
    original = TrainingRun._micro_batch
    steps = []

    def counted(self, inputs, targets):
        steps.append(self)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, inputs, targets)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "estimate_in_words", lambda *_: None)
        patch.setattr(TrainingRun, "_micro_batch", counted)
        with pytest.raises(SystemExit) as end:
            main(words)
    return end.value.code


def refused(words, capsys) -> str:
    """Return what a command says that is refused."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("there", [True, False])
def test_one_command_starts_a_training_continues_it_and_leaves_it_finished(
    here, monkeypatch, capsys, there
):
    if there:
        (here / "out").mkdir()
    assert main([*TRAIN, "--out", "whole"]) == 0
    assert ended_in_its_step(monkeypatch, 3, [*TRAIN, *AUTO]) == 143
    assert "continuing from step" not in capsys.readouterr().err
    assert main([*TRAIN, *AUTO]) == 0
    assert "continuing from step 3" in capsys.readouterr().err
    ours, theirs = weights(here / "out"), weights(here / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = contents(here / "out")
    assert main([*TRAIN, *AUTO]) == 0
    said = capsys.readouterr()
    assert "the run in out has finished; nothing is left to train" in said.err
    assert "validation accuracy" in said.out
    assert contents(here / "out") == before


def test_tables_that_a_kill_left_out_at_the_very_end_are_written(here):
    assert main([*TRAIN, *AUTO]) == 0
    before = contents(here / "out")
    (here / "out" / "results.csv").unlink()
    assert main([*TRAIN, *AUTO]) == 0
    assert contents(here / "out") == before


def test_other_settings_are_refused_whether_a_flag_was_changed_or_left_out(here, capsys):
    words = ["train", *SHAPE, "--epochs", "1"]
    assert main([*words, *AUTO]) == 0
    before = contents(here / "out")
    said = refused(["train", *SHAPE, "--epochs", "3", *AUTO], capsys)
    assert "got epochs 1 there and 3 here; choose another folder" in said
    assert "out must hold the same configuration, got epochs 1 there" in refused(
        ["train", *SHAPE, *AUTO], capsys
    )
    assert "got seed 0 there and 1 here" in refused([*words, "--seed", "1", *AUTO], capsys)
    assert contents(here / "out") == before
    assert main(["train", "--resume", "--out", "out"]) == 0  # alone it takes the folder's settings


@pytest.mark.parametrize(
    ("name", "why"),
    [("notes.txt", "which holds 'notes.txt'"), ("config.yaml", "no setting named 'mine'")],
)
def test_a_folder_with_something_else_is_refused_and_left_as_it_is(here, capsys, name, why):
    (here / "out").mkdir()
    (here / "out" / name).write_text("mine: 1\n")
    assert why in refused([*TRAIN, *AUTO], capsys)
    assert contents(here / "out") == {name: b"mine: 1\n"}


def test_a_comparison_is_no_run_to_continue_and_a_run_no_comparison(here, capsys):
    few = ["--epochs", "1"]
    assert main(["train", *SHAPE, *few, *AUTO]) == 0
    before = contents(here / "out")
    said = refused(["compare", *SHAPE, *few, "--seeds", "1", *AUTO], capsys)
    assert "out must be the folder of a comparison to continue it, got that of a run" in said
    assert contents(here / "out") == before


@pytest.mark.usefixtures("without_page", "without_timing")
def test_one_command_starts_a_comparison_and_runs_what_is_left_of_it(here, monkeypatch, capsys):
    (here / "none.yaml").write_text("corrections: []\n")
    words = ["compare", *SHAPE, "--epochs", "1", "--config", "none.yaml", "--seeds", "3", *AUTO]
    assert ended_in_its_step(monkeypatch, 6, words) == 143
    assert [result.seed for result in ResultsFolder(here / "out").results] == [0]
    capsys.readouterr()
    assert main(words) == 0
    assert "nothing is left to run" not in capsys.readouterr().err
    results = ResultsFolder(here / "out").results
    assert [(result.seed, result.status) for result in results] == [
        (seed, "finished") for seed in range(3)
    ]
    assert main(words) == 0
    assert "every run has ended; nothing is left to run" in capsys.readouterr().err
    assert ResultsFolder(here / "out").results == results
    said = refused([*words, "--epochs", "2"], capsys)
    assert "got epochs 1 there and 2 here" in said


def test_what_it_needs_is_said(here, capsys):
    said = refused(["train", "--resume", "auto"], capsys)
    assert "out must be given with --resume auto: the folder to begin or to continue" in said
    assert "resume must be 'auto' or have no value, got 'always'" in refused(
        ["train", "--resume=always", "--out", "out"], capsys
    )
    assert "'--resume'" not in refused(["train", "--resume", "--epochs", "0", "--out", "o"], capsys)
    assert list(here.iterdir()) == []


def test_alone_it_is_what_it_was(tmp_path):
    alone = read_resume(ALONE, out=tmp_path)
    assert (alone.continues, alone.takes_settings) == (True, True)
    auto = read_resume("auto", out=tmp_path)
    assert (auto.continues, auto.takes_settings) == (False, False)
    (tmp_path / "config.yaml").touch()
    auto = read_resume("auto", out=tmp_path)
    assert (auto.continues, auto.takes_settings) == (True, False)


def test_it_waits_for_a_process_that_is_ending_and_not_for_ever(here, capsys, monkeypatch):
    monkeypatch.setattr("regrad_runner.results.locks.SECONDS_FOR_ORPHANS", 0.5)
    with writing(here / "out"):
        said = refused([*TRAIN, *AUTO], capsys)
    assert "'out' must be written by one command at a time, and another is writing it" in said
