"""What is refused of an engine's part of a checkpoint; DeepSpeed itself is in its own member's tests."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from regrad.errors import RegradError
from regrad_runner.checkpoints.engine import (
    check_engine,
    check_engine_files,
    check_engine_path,
    engine_identity,
)
from regrad_runner.checkpoints.folder import (
    Content,
    damage_of,
    make_engine_folder,
    write_checkpoint,
)

TWO = {"layout": "zero-2", "processes": 2}


def run_of(engine="DeepSpeed", layout="zero-2", processes=2):
    """Return what is asked of a run."""
    named = SimpleNamespace(engine=SimpleNamespace(layout=SimpleNamespace(name=layout)))
    accelerator = SimpleNamespace(num_processes=processes)
    return SimpleNamespace(engine=engine, attachment=named, accelerator=accelerator)


def test_a_checkpoint_of_the_same_engine_fits_and_so_does_one_of_none():
    assert engine_identity(run_of()) == TWO
    check_engine(run_of(), {"engine": TWO})
    assert engine_identity(run_of(engine=None)) is None
    check_engine(run_of(engine=None), {})


@pytest.mark.parametrize(
    ("run", "then", "message"),
    [
        (run_of(processes=4), TWO, "got 'zero-2' on 2 processes there and 'zero-2' on 4 processes"),
        (run_of(layout="zero-3"), TWO, "got 'zero-2' on 2 processes there and 'zero-3' on 2"),
        (run_of(), None, "got no engine there and 'zero-2' on 2 processes here"),
        (run_of(engine=None), TWO, "got 'zero-2' on 2 processes there and no engine here"),
        (run_of(), "zero-2", "got 'zero-2' there and 'zero-2' on 2 processes here"),
    ],
)
def test_another_engine_is_refused_with_the_difference(run, then, message):
    with pytest.raises(RegradError, match=re.escape(message)):
        check_engine(run, {"engine": then})


@pytest.mark.parametrize("name", ["a*", "a?", "[a]"])
def test_a_folder_that_deepspeed_would_not_find_again_is_refused(name):
    with pytest.raises(ValueError, match=re.escape("out must have no *, ? or [ with DeepSpeed")):
        check_engine_path(Path(name))


@pytest.fixture
def checkpoint(tmp_path):
    """Return a checkpoint with two files of an engine."""
    aside = make_engine_folder(tmp_path, 3)
    (aside / "engine").mkdir()
    torch.save({"weight": torch.ones(2)}, aside / "engine" / "a.pt")
    torch.save({"weight": torch.ones(2)}, aside / "engine" / "b.pt")
    (aside / "script.py").write_text("")
    return write_checkpoint(tmp_path, 3, Content({}, {}, {}), keep=1, engine=aside)


def test_what_an_engine_wrote_is_moved_and_nothing_else_stays(checkpoint):
    assert damage_of(checkpoint) is None
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-00000003"]
    assert sorted(path.name for path in (checkpoint / "engine").iterdir()) == ["a.pt", "b.pt"]


def test_damage_of_an_engines_files_is_found(checkpoint):
    file = checkpoint / "engine" / "a.pt"
    content = file.read_bytes()
    file.write_bytes(content + b" ")
    assert damage_of(checkpoint) == "engine/a.pt has changed since it was written"
    file.unlink()
    assert damage_of(checkpoint) == "a.pt is missing"
    file.write_bytes(content)
    (checkpoint / "engine" / "c.pt").write_bytes(content)
    assert damage_of(checkpoint) == "engine/c.pt has changed since it was written"


class RunsCode:
    """Runs code when it is read."""

    def __reduce__(self):
        return os.system, ("true",)


def test_a_file_that_would_run_code_is_refused_unread(checkpoint):
    check_engine_files(checkpoint)
    torch.save({"module": RunsCode()}, checkpoint / "engine" / "b.pt")
    with pytest.raises(RegradError, match=r"objects only, got '(posix|nt)\.system' in .*run code"):
        check_engine_files(checkpoint)


def test_a_file_that_torch_did_not_write_is_refused(checkpoint):
    (checkpoint / "engine" / "b.pt").write_text("text")
    with pytest.raises(RegradError, match=r"must be a file written by torch\.save, got something"):
        check_engine_files(checkpoint)
