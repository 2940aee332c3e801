"""Every command on every kind of damage: a right result, or one line and exit code 2."""

import functools
import os
import shutil

import pytest
from regrad_runner import training_command as train
from regrad_runner.cli import app as commands
from regrad_runner.comparing import compare as comparing
from regrad_runner.comparing import plan as planning
from regrad_runner.diagnostics.effects import Effect
from regrad_runner.diagnostics.gradient_quality import Quality
from regrad_runner.results.folder import ResultsFolder, start_folder
from regrad_runner.results.outcomes import CurvePoint, Result, Trial
from regrad_runner.results.tables import read_rows
from regrad_runner.settings.config import CompareConfig
from regrad_runner.tracking import projector
from regrad_runner.tracking.mlflow import Sent
from regrad_runner.training.resolving import resolved
from regrad_runner.workloads.loading import load_workload
from regrad_testing.files import load_beside

cases = load_beside(__file__, "cases")
SMALL = [
    "--train-size",
    "64",
    "--batch-size",
    "32",
    "--epochs",
    "1",
    "--width",
    "4",
    "--threads",
    "1",
    "--tracker",
    "none",
]


def in_half(content):
    return content[: len(content) // 2]


def without_last_line(content):
    return b"".join(content.splitlines(keepends=True)[:-1])


def with_zeros(content):
    return content[:10] + bytes(8) + content[18:]


def in_utf_16(content):
    return content.decode().encode("utf-16")


CONTENTS = {
    "cut in half": in_half,
    "without its last line": without_last_line,
    "without its end": lambda content: content[: len(content) * 9 // 10],
    "emptied": lambda content: b"",
    "with NUL bytes": with_zeros,
    "only NUL bytes": lambda content: bytes(len(content)),
    "in UTF-16": in_utf_16,
    "in no encoding": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[]\n",
    "an empty object": lambda content: b"{}\n",
    "a number": lambda content: b"7\n",
    "null": lambda content: b"null\n",
    "nested too deep": lambda content: b"[" * 5000,
}


def folder_instead(path):
    path.unlink()
    path.mkdir()


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def link_to_a_folder(path):
    path.unlink()
    path.symlink_to("..")


def pipe_instead(path):
    path.unlink()
    os.mkfifo(path)


KINDS = [folder_instead, link_to_nothing, link_to_itself, link_to_a_folder]
KINDS += [pipe_instead] if hasattr(os, "mkfifo") else []


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison that ended, with everything that one can hold."""
    out = tmp_path_factory.mktemp("compared") / "out"
    words = ["compare", "--corrections", "agc", "--no-controls", "--seeds", "1"]
    words += [
        "--lr",
        "0.02,0.05",
        "--tuning-seeds",
        "1",
        "--probe-every",
        "1",
        "--probe-size",
        "32",
    ]
    assert cases.command(*words, *SMALL, "--out", str(out))[0] == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that ended."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert cases.command("train", *SMALL, "--out", str(out))[0] == 0
    return out


@pytest.fixture
def quick(monkeypatch, ready_schema):
    """Let nothing be drawn and nothing be trained: what a command reads first decides here."""

    def accept(*arguments):
        raise cases.Accepted

    workload = digits()
    for module in (planning, train):
        monkeypatch.setattr(
            module, "load_data", lambda config: (workload, resolved(config, workload))
        )
        monkeypatch.setattr(module, "try_on", lambda *a, **b: None)
    monkeypatch.setattr("regrad_runner.reporting.figures.png.write_pngs", lambda *a: [])
    monkeypatch.setattr("regrad_runner.reporting.page.write.write_page", lambda *a: [])
    monkeypatch.setattr(comparing, "compare", accept)
    monkeypatch.setattr(train, "train", accept)
    return commands


@pytest.fixture
def unsent(monkeypatch):
    """Let `sync` read all runs and send none: what their files hold is not looked at on the way."""
    monkeypatch.setattr(projector, "project", lambda store, run: Sent())


COMPARED = [
    "config.yaml",
    "about.json",
    "results.csv",
    "curves.csv",
    "runs/agc/0/run.json",
    "runs/agc/0/points.jsonl",
    "runs/agc/0/receipt.json",
    "runs/agc/lr0.02-seed1000000/run.json",
]
TRAINED = [
    "config.yaml",
    "about.json",
    "results.csv",
    "runs/baseline/0/run.json",
    "runs/baseline/0/points.jsonl",
    "runs/baseline/0/receipt.json",
]
OF_COMPARED = [["report", "out"], ["compare", "--resume", "--out", "out"], ["sync", "out"]]
OF_TRAINED = [["report", "out"], ["train", "--resume", "--out", "out"], ["sync", "out"]]


@functools.cache
def digits():
    return load_workload("digits", train_size=64)


def check(words):
    """Run a command in a damaged folder: it says one line and ends with exit code 2, or its result is right."""
    code, out, err = cases.command(*words)
    if (
        words[0] == "sync" and code == 1
    ):  # the runs that are whole are shown, and the other is named
        assert out.splitlines()[-1].startswith("not everything in out is at ")
        return code, out
    assert code in (None, 0, 2), (words, out, err)
    if code == 2:
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("regrad: ")
        assert cases.is_clear(lines[0])
    return code, out


@functools.cache
def told(folder):
    """What a report says of a folder that is whole, of which a copy is here."""
    return check(["report", "out"])[1]


def copy_of(folder, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


@pytest.mark.long
@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("damage", CONTENTS)
def test_a_damaged_file_of_a_comparison_is_one_line_or_a_right_result(
    compared, tmp_path, monkeypatch, quick, unsent, damage, name
):
    out = copy_of(compared, tmp_path, monkeypatch)
    whole = told(compared)
    (out / name).write_bytes(CONTENTS[damage]((out / name).read_bytes()))
    for words in OF_COMPARED:
        code, said = check(words)
        assert words[0] != "report" or code == 2 or said == whole


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("damage", CONTENTS)
def test_a_damaged_file_of_a_run_is_one_line_or_a_right_result(
    trained, tmp_path, monkeypatch, quick, unsent, damage, name
):
    out = copy_of(trained, tmp_path, monkeypatch)
    whole = told(trained)
    (out / name).write_bytes(CONTENTS[damage]((out / name).read_bytes()))
    for words in OF_TRAINED:
        code, said = check(words)
        assert words[0] != "report" or code == 2 or said == whole


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", sorted({*COMPARED, *TRAINED}))
def test_another_thing_in_the_place_of_a_file_is_one_line_or_a_right_result(
    compared, trained, tmp_path, monkeypatch, quick, kind, name
):
    for folder, names, commands_ in (
        (compared, COMPARED, OF_COMPARED),
        (trained, TRAINED, OF_TRAINED),
    ):
        if name in names:
            out = copy_of(folder, tmp_path, monkeypatch)
            kind(out / name)
            for words in commands_:
                check(words)


TABLES = {
    "results.csv": Result,
    "curves.csv": CurvePoint,
    "tuning.csv": Trial,
    "effects.csv": Effect,
    "gradient_quality.csv": Quality,
}


def test_tables_that_are_cut_damaged_or_gone_are_made_again_from_the_runs(
    compared, tmp_path, monkeypatch, quick
):
    out = copy_of(compared, tmp_path, monkeypatch)
    whole = {name: (out / name).read_bytes() for name in TABLES}
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"\xff\xfe,\0\n7")):
        for name, kind in TABLES.items():
            assert read_rows(out / name, kind)
            damage(out / name)
        assert check(["report", "out"])[0] == 0
        assert {name: (out / name).read_bytes() for name in TABLES} == whole


def test_a_run_that_is_cut_anywhere_is_refused(compared, tmp_path, monkeypatch):
    out = copy_of(compared, tmp_path, monkeypatch)
    whole = ResultsFolder(out).results
    for name in ("run.json", "points.jsonl"):
        path = out / "runs" / "agc" / "0" / name
        content = path.read_bytes()
        for length in range(0, len(content) - 1, 7):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match="run it again"):
                ResultsFolder(out)
        path.write_bytes(content)
    assert ResultsFolder(out).results == whole


def test_settings_that_are_cut_anywhere_are_refused_or_whole(tmp_path):
    config = CompareConfig(seeds=12, lr=(0.25, 0.5), probe_size=1234)
    start_folder(tmp_path, config, {})
    file = tmp_path / "config.yaml"
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        read, refused = cases.outcome(lambda: CompareConfig(**cases.settings_in(file)))
        assert read == config if refused is None else cases.is_clear(refused)
        assert length < len(content) - 1 or refused is None
