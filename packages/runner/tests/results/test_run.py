import errno
import json
import math
import os
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from regrad.errors import RegradError, RegradWarning
from regrad_runner import files
from regrad_runner.errors import DiskError
from regrad_runner.results import run as module
from regrad_runner.results.run import (
    begin_run,
    end_abandoned,
    folder_name,
    read_points,
    read_record,
    run_path,
    run_paths,
    status_of,
)

VALUES = {"name": "baseline, seed 0", "arm": "baseline", "seed": 0, "lr": 0.1}
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")


def steps(path):
    return [line.step for line in read_points(path)]


@pytest.fixture
def ended(tmp_path):
    """The folder of a run that ended after three evaluations."""
    with begin_run(tmp_path, VALUES) as record:
        for step in range(3):
            record.log("evaluation", step, {"loss": 1.0 / (step + 1)})
        record.keep("receipt.json", "{}")
        record.end("finished", result={"value": 0.5})
    return record.path


def test_a_run_comes_back_as_it_was_written(tmp_path):
    with begin_run(tmp_path, {**VALUES, "settings": {"epochs": 3}}) as record:
        numbers = {"loss": 0.1 + 0.2, "worst": math.inf, "odd": math.nan, "seconds": None}
        record.log("evaluation", 7, numbers, {"stage": "weights"})
        record.end("finished", result={"value": math.nan, "steps": 7})
    kept = read_record(record.path)
    assert (kept.status, kept.settings, kept.points.lines) == ("finished", {"epochs": 3}, 1)
    assert math.isnan(kept.result["value"])
    (line,) = read_points(record.path, kept)
    assert (line.kind, line.step, line.labels) == ("evaluation", 7, {"stage": "weights"})
    back = line.numbers()
    assert math.isnan(back.pop("odd"))
    assert back == {"loss": 0.1 + 0.2, "worst": math.inf, "seconds": None}
    text = (record.path / "points.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["values"]["worst"] == "inf"


def test_tensors_and_numpy_scalars_are_numbers_and_are_read_when_they_are_logged(tmp_path):
    loss = torch.tensor(1.0)
    with begin_run(tmp_path, VALUES) as record:
        numbers = {"half": torch.tensor([0.25], dtype=torch.bfloat16), "numpy": numpy.float32(0.5)}
        record.log("metrics", 0, {"loss": loss, "flag": True, **numbers})
        loss.zero_()
        record.end("finished")
    (line,) = read_points(record.path)
    assert line.numbers() == {"loss": 1.0, "flag": 1.0, "half": 0.25, "numpy": 0.5}


def test_a_value_that_is_no_number_is_left_out_with_a_warning(tmp_path):
    message = r"metric 'curve' must be one number, got tensor\(\[0., 0.\]\); left out"
    with begin_run(tmp_path, VALUES) as record, pytest.warns(RegradWarning, match=message):
        record.log("metrics", 0, {"curve": torch.zeros(2), "loss": 1.0})
    assert [line.values for line in read_points(record.path)] == [{"loss": 1.0}]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("lr"), "failed"), (KeyboardInterrupt(), "killed"), (SystemExit(143), "killed")],
)
def test_what_ends_a_run_decides_its_status_and_leaves_its_traceback(tmp_path, error, status):
    with pytest.raises(type(error)), begin_run(tmp_path, VALUES) as record:
        raise error
    kept = read_record(record.path)
    assert kept.status == status
    assert kept.error.startswith(type(error).__name__)
    assert "Traceback" in (record.path / "traceback.txt").read_text()


def test_only_the_first_end_counts_and_nothing_is_logged_after_it(tmp_path):
    with begin_run(tmp_path, VALUES) as record:
        record.end("diverged")
        record.end("finished")
        with pytest.raises(RegradError, match="has ended; begin another one before logging"):
            record.log("evaluation", 1, {})
    assert read_record(record.path).status == "diverged"


def test_another_attempt_replaces_a_run_and_knows_its_ids(tmp_path, ended):
    first = read_record(ended)
    with begin_run(tmp_path, VALUES) as record:
        assert steps(ended) == []
        record.end("failed", error="ValueError: no")
    second = read_record(ended)
    assert (second.earlier, second.id != first.id) == ([first.id], True)
    assert not (ended / "receipt.json").exists()
    with begin_run(tmp_path, VALUES):
        pass
    assert read_record(ended).earlier == [first.id, second.id]
    assert not list(ended.glob(".*"))


def test_a_trial_lies_beside_the_run_of_its_seed(tmp_path, ended):
    with begin_run(tmp_path, {**VALUES, "trial": True}) as record:
        pass
    assert record.path.name == "lr0.1-seed0"
    assert run_paths(tmp_path) == [ended, record.path]


@pytest.mark.parametrize(
    "torn", [b'{"kind": "eval', b"\xff\xfe", b'{"kind":"evaluation","step":9,']
)
def test_a_torn_last_line_is_ignored_and_cut_before_the_next_one(tmp_path, torn):
    with begin_run(tmp_path, VALUES) as record:
        record.log("evaluation", 1, {"loss": 1.0})
        with (record.path / "points.jsonl").open("ab") as file:
            file.write(torn)
        assert steps(record.path) == [1]
        record.log("evaluation", 2, {"loss": 1.0})
        assert steps(record.path) == [1, 2]
        record.end("finished")
    assert len(read_points(record.path, read_record(record.path))) == 2


def test_a_kill_loses_no_line_and_the_run_counts_as_killed(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from regrad_runner.results.run import begin_run
record = begin_run(Path({str(tmp_path)!r}), {VALUES!r})
for step in range(100):
    record.log("evaluation", step, {{"loss": 0.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    path = run_path(tmp_path, "baseline", 0)
    record = read_record(path)
    assert (record.status, status_of(path, record)) == ("running", "killed")
    assert steps(path) == list(range(100))
    with begin_run(tmp_path, VALUES) as again:
        assert status_of(path, read_record(path)) == "running"
        again.end("finished")


@pytest.mark.parametrize("moment", range(8))
def test_a_kill_between_any_two_files_leaves_a_run_that_can_be_read_and_begun_again(
    tmp_path, monkeypatch, moment
):
    class Killed(BaseException):
        pass

    made = []

    def counted(path, **options):
        made.append(path)
        if len(made) == moment + 1:
            raise Killed
        return new_file(path, **options)

    def run():
        record = begin_run(tmp_path, VALUES)
        record.log("evaluation", 1, {"loss": 1.0})
        record.keep("receipt.json", "{}")
        record.end("finished", result={"value": 0.5})
        return record

    new_file = files.new_file
    with monkeypatch.context() as patch:
        patch.setattr(files, "new_file", counted)
        try:
            for _ in range(2):
                run()._held.close()
        except Killed:
            pass
    for path in run_paths(tmp_path):
        record = read_record(path)
        points = read_points(path, record)
        assert len(points) in ((1,) if record.status == "finished" else (0, 1))
    monkeypatch.setattr(
        module, "writing_run", files.disk_errors
    )  # the process is gone, and its lock
    assert read_record(run().path).status == "finished"


def test_on_a_full_disk_points_wait_in_memory_and_half_a_line_is_taken_back(tmp_path, monkeypatch):
    real, full = os.write, []

    def write(file, data):
        if not full:
            return real(file, data)
        if len(data) > 3:
            return real(file, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    record = begin_run(tmp_path, VALUES)
    monkeypatch.setattr(os, "write", write)
    record.log("evaluation", 0, {"loss": 1.0})
    full.append(True)
    for step in (1, 2):
        record.log("evaluation", step, {"loss": 1.0})
    assert steps(record.path) == [0]
    assert (record.path / "points.jsonl").read_bytes().endswith(b"}\n")
    full.clear()
    record.log("evaluation", 3, {"loss": 1.0})
    assert steps(record.path) == [0, 1, 2, 3]
    full.append(True)
    record.log("evaluation", 4, {"loss": 1.0})
    with pytest.raises(DiskError, match="No space left on device"):
        record.end("finished")
    assert status_of(record.path, read_record(record.path)) == "killed"
    assert steps(record.path) == [0, 1, 2, 3]


def test_the_points_of_a_run_that_ended_are_whole_or_refused(ended):
    content = (ended / "points.jsonl").read_bytes()
    record = read_record(ended)
    for length in range(len(content)):
        (ended / "points.jsonl").write_bytes(content[:length])
        with pytest.raises(
            ValueError, match="must be unchanged since it was written, got a changed or incomplete"
        ):
            read_points(ended, record)
    (ended / "points.jsonl").write_bytes(content + b"torn")
    assert len(read_points(ended, record)) == 3


def test_a_record_that_is_cut_anywhere_is_whole_or_refused(ended):
    content = (ended / "run.json").read_bytes()
    whole = read_record(ended)
    for length in range(len(content)):
        (ended / "run.json").write_bytes(content[:length])
        if length == len(content) - 1:  # without its last line break
            assert read_record(ended) == whole
            continue
        with pytest.raises(ValueError, match="must be the record of a run, got"):
            read_record(ended)


def test_a_worker_that_is_gone_leaves_a_failed_run_with_its_points(tmp_path):
    record = begin_run(tmp_path, VALUES)
    record.log("evaluation", 1, {"loss": 1.0})
    record._held.close()  # as the system does
    end_abandoned(tmp_path, VALUES, status="failed", error="exit code -9")
    kept = read_record(record.path)
    assert (kept.id, kept.status, kept.error) == (record.record.id, "failed", "exit code -9")
    assert len(read_points(record.path, kept)) == 1
    end_abandoned(tmp_path, VALUES, status="failed", error="again, before it began")
    assert read_record(record.path).earlier == [kept.id]
    end_abandoned(tmp_path, {**VALUES, "seed": 1}, status="failed", error="exit code -9")
    assert read_record(run_path(tmp_path, "baseline", 1)).status == "failed"


NAMES = ["..", ".", "", "AGC", "agc", "Agc", "a/b", "a_b", "a b", "a\\b", "con", "con.txt", "lpt1"]
NAMES += ["x" * 300, "x" * 301, "é", "e", "a.", "a", "-a", folder_name("a/b")]


def test_two_arms_never_share_a_folder_and_none_leads_elsewhere(tmp_path):
    folders = [folder_name(name) for name in NAMES]
    assert len({folder.lower() for folder in folders}) == len(NAMES)
    for name in NAMES:
        path = run_path(tmp_path, name, 0)
        assert path.resolve() == path
        with begin_run(tmp_path, {**VALUES, "arm": name}) as record:
            record.end("finished")
        assert record.path == path
        assert read_record(path).arm == name
    assert folder_name("xgrad+agc") == "xgrad+agc"


def folder(path):
    path.mkdir()


def to_nothing(path):
    path.symlink_to("nowhere")


def to_a_file(path):
    (path.parents[3] / "victim").write_text("mine")
    path.symlink_to(path.parents[3] / "victim")


def pipe(path):
    os.mkfifo(path)


def huge(path):
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room


INSTEAD = [folder, to_nothing, to_a_file, huge, pytest.param(pipe, marks=needs_pipes)]


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("name", ["run.json", "points.jsonl"])
def test_another_thing_in_the_place_of_a_file_is_refused_at_once(ended, name, instead):
    record = read_record(ended)
    (ended / name).unlink()
    instead(ended / name)
    with pytest.raises(ValueError, match=f"{name}' must be"):
        read_points(ended, record) if name == "points.jsonl" else read_record(ended)
    if instead is to_a_file:
        assert (ended.parents[2] / "victim").read_text() == "mine"


@pytest.mark.parametrize("instead", INSTEAD)
def test_points_are_never_written_through_another_thing(tmp_path, instead):
    record = begin_run(tmp_path / "out", VALUES)
    (record.path / "points.jsonl").unlink()
    instead(record.path / "points.jsonl")
    record.log("evaluation", 1, {"loss": 1.0})
    if instead is huge:  # what is longer than what was written was broken off
        assert steps(record.path) == [1]
        return
    with pytest.raises(DiskError, match=r"points\.jsonl' must be written"):
        record.end("finished")
    if instead is to_a_file:
        assert (tmp_path / "out" / "victim").read_text() == "mine"


@pytest.mark.parametrize("where", ["runs", "baseline", "0"])
def test_a_folder_that_is_a_link_is_neither_read_nor_written(tmp_path, where):
    victim = tmp_path / "victim"
    with begin_run(victim, VALUES) as record:
        record.end("finished")
    before = {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    link = {
        "runs": out / "runs",
        "baseline": out / "runs" / "baseline",
        "0": out / "runs" / "baseline" / "0",
    }
    end = {"runs": victim / "runs", "baseline": victim / "runs" / "baseline", "0": record.path}
    link[where].parent.mkdir(parents=True)
    link[where].symlink_to(end[where])
    assert run_paths(out) == []
    with pytest.raises(DiskError, match="must be a folder, got a link"):
        begin_run(out, VALUES)
    assert {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()} == before


def test_a_record_of_another_run_is_refused(tmp_path, ended):
    other = tmp_path / "runs" / "baseline" / "7"
    ended.rename(other)
    with pytest.raises(ValueError, match=r"got that of 'runs/baseline/0'; move it back"):
        read_record(other)


def test_only_files_of_the_list_are_kept(tmp_path):
    with begin_run(tmp_path, VALUES) as record:
        for name in ("../x", "run.json", "other.txt"):
            with pytest.raises(ValueError, match=r"name must be one of receipt\.json"):
                record.keep(name, "")
