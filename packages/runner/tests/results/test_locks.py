import subprocess
import sys
import threading

import pytest
from regrad_runner.cli.main import main
from regrad_runner.errors import DiskError
from regrad_runner.files import make_folder
from regrad_runner.results.locks import (
    LOCK,
    drawing,
    is_held,
    is_lock,
    running_cell,
    syncing,
    writing,
    writing_run,
)

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
A, B = ("runs", "baseline", "0"), ("runs", "baseline", "1")
BUSY = "must be written by one command at a time, and another is writing it; wait until it ends"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a comparison that ended."""
    folder = tmp_path_factory.mktemp("locks") / "out"
    words = [
        "compare",
        "--corrections",
        "agc",
        "--no-controls",
        "--seeds",
        "1",
        "--out",
        str(folder),
    ]
    assert main([*words, *SMALL]) == 0
    return folder


def test_the_first_holds_a_folder_and_the_second_is_told(tmp_path):
    with writing(tmp_path / "out"):
        for hold in (writing, drawing):
            with pytest.raises(ValueError, match=f"'.*out' {BUSY}"), hold(tmp_path / "out"):
                pass
    with writing(tmp_path / "out"):
        pass


def test_a_folder_in_which_nothing_was_written_is_gone_afterwards(tmp_path):
    with writing(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK]
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with writing(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_cells_run_beside_each_other_each_alone_and_keep_others_away(tmp_path):
    with running_cell(tmp_path, *A), running_cell(tmp_path, *B):
        with pytest.raises(ValueError, match=f"this cell of .* {BUSY}"), running_cell(tmp_path, *A):
            pass
        assert is_held(tmp_path.joinpath(*A))
        with pytest.raises(ValueError, match=BUSY), writing(tmp_path):
            pass
        with drawing(tmp_path):  # a report of what there is
            pass
    with writing(tmp_path), pytest.raises(ValueError, match=BUSY), running_cell(tmp_path, *A):
        pass
    assert not is_held(tmp_path.joinpath(*A))
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == []


def test_a_run_is_held_by_its_writer_and_keeps_commands_away(tmp_path):
    run = make_folder(tmp_path, *A)
    with writing_run(run):
        assert is_held(run)
        with pytest.raises(ValueError, match=f"'{tmp_path}' {BUSY}"), writing(tmp_path):
            pass
    assert not is_held(run)
    with writing(tmp_path), writing_run(run):
        pass
    assert list(run.iterdir()) == []


def test_a_folder_that_is_written_is_not_synced_and_one_sync_is_enough(tmp_path):
    with writing(tmp_path), pytest.raises(ValueError, match=BUSY), syncing(tmp_path):
        pass
    with syncing(tmp_path):
        with pytest.raises(ValueError, match=f"the tracking of .* {BUSY}"), syncing(tmp_path):
            pass
        with running_cell(tmp_path, *A):  # cells begin and run meanwhile
            pass


def test_a_killed_process_bars_nobody(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from regrad_runner.results.locks import running_cell, writing
with writing(Path({str(tmp_path / "out")!r})):
    (Path({str(tmp_path / "out")!r}) / "config.yaml").touch()
with running_cell(Path({str(tmp_path / "out")!r}), "runs", "baseline", "0"):
    pass
held = [
    writing(Path({str(tmp_path / "out")!r})),
    running_cell(Path({str(tmp_path / "cells")!r}), "runs", "baseline", "0"),
]
for lock in held:
    lock.__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "cells").mkdir()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert is_lock(tmp_path / "out" / LOCK)
    with writing(tmp_path / "out"), writing(tmp_path / "cells"):
        pass


def test_who_waits_gets_the_folder_when_the_process_that_held_it_is_killed(tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
from regrad_runner.results.locks import writing, writing_run
out = Path({str(tmp_path / "out")!r})
run = out / "runs" / "baseline" / "0"
with writing(out):
    run.mkdir(parents=True)
    with writing_run(run):
        print("held", flush=True)
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=BUSY), writing(tmp_path / "out"):
            pass
        ends = threading.Timer(0.5, process.stdin.close)
        ends.start()
        with writing(tmp_path / "out", seconds=60):
            assert not is_held(tmp_path.joinpath("out", *A))
        ends.join()
    assert process.returncode == -9


@pytest.mark.parametrize("what", ["link", "dangling", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_not_followed(tmp_path, what):
    (tmp_path / "victim").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    if what == "folder":
        (out / LOCK).mkdir()
    else:
        (out / LOCK).symlink_to(tmp_path / ("victim" if what == "link" else "nowhere"))
    assert not is_lock(out / LOCK)
    with (
        pytest.raises(DiskError, match="must be a lock file, got a link or a folder"),
        writing(out),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_lock_that_holds_something_is_not_ours(tmp_path):
    (tmp_path / LOCK).write_text("mine")
    assert not is_lock(tmp_path / LOCK)


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--resume"],
        ["compare", "--resume", "--cells"],
        ["compare", "--cell", "0"],
        ["report"],
        ["report", "--json"],
    ],
)
def test_every_command_that_writes_a_held_folder_gets_one_line_and_exit_code_2(
    finished, capsys, words
):
    place = [str(finished)] if words[0] == "report" else ["--out", str(finished)]
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with writing(finished):
        assert main([words[0], *place, *words[1:]]) == (0 if "--cell" in words else 2)
    said = capsys.readouterr()
    if "--cell" not in words:  # it ended before, and writes nothing
        assert said.out == ""
        assert said.err.endswith(f"{BUSY}\n")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["compare", "train"])
def test_of_two_that_start_in_one_new_folder_the_second_is_refused(tmp_path, capsys, command):
    with writing(tmp_path / "out"):
        assert main([command, *SMALL, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.endswith(f"{BUSY}\n")) == ("", True)


def test_a_folder_that_was_begun_after_it_was_checked_is_refused(tmp_path, capsys, monkeypatch):
    from regrad_runner import training_command as train

    make_plan = train.make_training_plan

    def slow(*args, **options):
        plan = make_plan(*args, **options)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.yaml").write_text("of another command")
        return plan

    monkeypatch.setattr(train, "make_training_plan", slow)
    assert main(["train", *SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "out must be a new or empty folder, got" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.yaml").read_text() == "of another command"
