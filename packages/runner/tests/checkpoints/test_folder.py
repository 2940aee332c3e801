import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from regrad.errors import RegradError
from regrad_runner.checkpoints import folder as storage
from regrad_runner.checkpoints.folder import (
    Content,
    checkpoints,
    checksum,
    damage_of,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)

FILES = ["checksums.json", "receipt.json", "state.json", "tensors.pt"]


def content(number=0):
    return Content(
        {"w": torch.full((50,), float(number)), "of": [1, ("a", 2)]},
        {"step": number},
        {"order": []},
    )


def write(folder, step, **options):
    return write_checkpoint(folder, step, content(step), **{"keep": 2, **options})


def with_valid_checksums(path):
    sums = {name: checksum(path / name) for name in FILES if name != "checksums.json"}
    (path / "checksums.json").write_text(json.dumps(sums))


def test_what_was_written_is_read(tmp_path):
    path = write(tmp_path / "new", 7)
    read = read_checkpoint(path)
    assert (path.name, sorted(file.name for file in path.iterdir())) == ("step-00000007", FILES)
    assert torch.equal(read.tensors["w"], torch.full((50,), 7.0))
    assert (read.tensors["of"], read.state["step"], read.receipt) == (
        [1, ("a", 2)],
        7,
        {"order": []},
    )


def test_the_latest_is_the_one_with_the_most_steps(tmp_path):
    assert read_latest(tmp_path) is None
    for step in (9, 10, 100):
        write(tmp_path, step, keep=3)
    path, read, lines = read_latest(tmp_path)
    assert (path.name, read.state["step"], lines) == ("step-00000100", 100, [])


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 3)
    write_checkpoint(tmp_path, 3, content(33), keep=2)
    assert read_checkpoint(*checkpoints(tmp_path)).state["step"] == 33
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", FILES)
def test_a_byte_that_changed_anywhere_is_found(tmp_path, name):
    path = write(tmp_path, 1)
    original = (path / name).read_bytes()
    for place in range(0, len(original), max(1, len(original) // 40)):
        changed = bytes([*original[:place], original[place] ^ 1, *original[place + 1 :]])
        (path / name).write_bytes(changed)
        assert damage_of(path) is not None
    (path / name).write_bytes(original)
    assert damage_of(path) is None


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_empty_or_missing_is_found(tmp_path, name):
    path = write(tmp_path, 1)
    original = (path / name).read_bytes()
    for length in (0, 1, len(original) // 2, len(original) - 1):
        (path / name).write_bytes(original[:length])
        assert damage_of(path) is not None
    (path / name).unlink()
    assert damage_of(path) == f"{name} is missing"
    with pytest.raises(
        RegradError,
        match=f"must be undamaged, got '.*step-00000001': {name} is missing",
    ):
        read_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path, name):
    path = write(tmp_path, 1)
    (path / name).unlink()
    os.mkfifo(path / name)
    fault = f"{name} cannot be read (not a regular file)"
    assert damage_of(path) == fault
    with pytest.raises(RegradError) as refusal:
        read_checkpoint(path)
    assert str(refusal.value) == f"checkpoint must be undamaged, got '{path}': {fault}"


@pytest.mark.parametrize("text", ["[]", "{}", "7", "null", '{"tensors.pt": 3}'])
def test_checksums_of_another_shape_are_damage(tmp_path, text):
    path = write(tmp_path, 1)
    (path / "checksums.json").write_text(text)
    assert damage_of(path) is not None


def test_damaged_ones_are_passed_over_renamed_and_named(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "tensors.pt").write_bytes(b"")
    shutil.rmtree(tmp_path / "step-00000002")
    (tmp_path / "step-00000002").mkdir()
    path, read, lines = read_latest(tmp_path)
    assert (path.name, read.state["step"]) == ("step-00000001", 1)
    assert [line.partition(";")[0] for line in lines] == [
        "checkpoint step-00000003 is damaged: tensors.pt has changed since it was written",
        "checkpoint step-00000002 is damaged: checksums.json is missing",
    ]
    assert checkpoints(tmp_path) == [path]
    assert {old.name for old in tmp_path.iterdir()} - {path.name} == {
        "damaged-step-00000002",
        "damaged-step-00000003",
    }


def test_where_only_damaged_ones_are_left_nothing_starts_anew_in_silence(tmp_path):
    (write(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(
        RegradError,
        match=r"must be undamaged to resume, got only damaged ones in .*step-00000001: state",
    ):
        read_latest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, save):
    path = write(tmp_path, 1)
    write(tmp_path, 2)
    newest = checkpoints(tmp_path)[-1]
    save({"w": Trap(tmp_path / "it-ran")}, newest / "tensors.pt")
    with_valid_checksums(newest)
    for read in (lambda: read_checkpoint(newest), lambda: read_latest(tmp_path)):
        with pytest.raises(
            RegradError,
            match=r"must hold tensors and plain values only, got .*, which would run code",
        ):
            read()
    assert not (tmp_path / "it-ran").exists()
    assert checkpoints(tmp_path) == [path, newest]


def test_another_format_is_refused(tmp_path):
    path = write(tmp_path, 1)
    (path / "state.json").write_text(json.dumps({"format": 99}))
    with_valid_checksums(path)
    with pytest.raises(RegradError, match="checkpoint must be of format 3, got 99"):
        read_checkpoint(path)


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    path = write(tmp_path, 1)

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.torch, "save", full)
        with pytest.raises(
            RegradError,
            match=r"checkpoint must be written, got .*No space left.*free some space and use --resume",
        ):
            write(tmp_path, 2)
    assert [left.name for left in tmp_path.iterdir()] == ["step-00000001"]
    assert read_checkpoint(path).state["step"] == 1


def test_a_checkpoint_has_its_name_only_once_all_its_files_are_on_the_disk(tmp_path, monkeypatch):
    forced, original = [], os.fsync

    def watch(number):
        forced.append((Path(f"/proc/self/fd/{number}").readlink().name, len(checkpoints(tmp_path))))
        original(number)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("without /proc nobody says which file a number is")
    monkeypatch.setattr(os, "fsync", watch)
    write(tmp_path, 1)
    *files, aside, holder = forced
    names = ["tensors.pt", "state.json", "receipt.json", "checksums.json"]
    assert files == [(name, 0) for name in names]
    assert re.fullmatch(r"\.step-00000001\.[0-9a-f]{16}\.part", aside[0])
    assert (aside[1], holder) == (0, (tmp_path.name, 1))
