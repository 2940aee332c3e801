import errno
import os
import socket
import stat

import pytest
from regrad_runner import files
from regrad_runner.errors import DiskError
from regrad_runner.files import (
    append,
    check_own_folder,
    folder_aside,
    make_folder,
    move_aside,
    read_bytes,
    remove_folder,
    remove_left_over,
    write_whole,
)


@pytest.fixture
def victim(tmp_path):
    """A file that no writer was asked to touch."""
    file = tmp_path / "victim" / "thesis.txt"
    file.parent.mkdir()
    file.write_text("years of work")
    yield file
    assert [path.name for path in file.parent.iterdir()] == ["thesis.txt"]
    assert file.read_text() == "years of work"


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, victim):
    (tmp_path / "results.csv").symlink_to(victim)
    write_whole(tmp_path / "results.csv", "ours")
    assert (tmp_path / "results.csv").read_text() == "ours"
    assert not (tmp_path / "results.csv").is_symlink()


def test_a_link_under_a_name_that_used_to_be_foreseen_is_not_followed(tmp_path, victim):
    (tmp_path / ".config.yaml.part").symlink_to(victim)
    write_whole(tmp_path / "config.yaml", "seeds: 3\n")
    assert (tmp_path / ".config.yaml.part").is_symlink()


def test_names_of_what_is_written_aside_cannot_be_foreseen(tmp_path, monkeypatch):
    seen, replace = [], files.Path.replace

    def watch(aside, path):
        seen.append(aside.name)
        return replace(aside, path)

    monkeypatch.setattr(files.Path, "replace", watch)
    for _ in range(3):
        write_whole(tmp_path / "a.txt", "text")
    assert len(set(seen)) == 3


def test_what_is_written_aside_is_never_opened_through_a_link(tmp_path, victim, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "foreseen")
    (tmp_path / ".a.txt.foreseen.part").symlink_to(victim)
    with pytest.raises(
        DiskError, match=r"'.*a\.txt' must be written, got 'File exists'; free some space"
    ):
        write_whole(tmp_path / "a.txt", "text")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.txt", "old")

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="got 'No space left on device'; free some space"):
        write_whole(tmp_path / "a.txt", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_name_as_long_as_a_file_system_allows_can_be_written(tmp_path):
    write_whole(tmp_path / ("x" * 255), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_a_file_is_as_open_as_the_process_allows_or_for_its_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "open", "text")
        write_whole(tmp_path / "own", "text", mode=files.OWN)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"open": 0o644, "own": 0o600}


def test_text_is_added_to_a_file_and_never_through_a_link(tmp_path, victim):
    append(tmp_path / "failures.txt", "one\n")
    append(tmp_path / "failures.txt", "two\n")
    assert (tmp_path / "failures.txt").read_text() == "one\ntwo\n"
    (tmp_path / "link.txt").symlink_to(victim)
    with pytest.raises(DiskError, match=r"link\.txt' must be written, got"):
        append(tmp_path / "link.txt", "three\n")


def test_a_folder_is_made_but_not_below_a_link_or_a_file(tmp_path, victim):
    assert make_folder(tmp_path / "out", "runs", "none").is_dir()
    (tmp_path / "out" / "figures").symlink_to(victim.parent)
    (tmp_path / "out" / "other").write_text("a file")
    with pytest.raises(
        DiskError, match="figures' must be a folder, got a link; move the link away"
    ):
        make_folder(tmp_path / "out", "figures", "new")
    with pytest.raises(DiskError, match="other' must be a folder, got a file; move the file away"):
        check_own_folder(tmp_path / "out" / "other")


def test_an_output_folder_may_be_a_link_to_a_folder(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    make_folder(tmp_path / "out", "runs")
    assert (tmp_path / "scratch" / "runs").is_dir()


def test_a_folder_gets_its_name_when_it_is_filled_and_an_error_leaves_the_old_one(tmp_path):
    with folder_aside(tmp_path / "step") as aside:
        (aside / "a").write_text("1")
        assert not (tmp_path / "step").exists()
    with pytest.raises(OSError, match="no room"), folder_aside(tmp_path / "step") as aside:
        raise OSError("no room")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert (tmp_path / "step" / "a").read_text() == "1"


def test_a_folder_that_came_meanwhile_stays_where_none_is_to_be_replaced(tmp_path):
    step = tmp_path / "step"
    with pytest.raises(OSError), folder_aside(step, replace=False) as aside:  # noqa: PT011 - the system's words
        (aside / "a").write_text("new")
        step.mkdir()
        (step / "a").write_text("kept")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert (step / "a").read_text() == "kept"


def test_of_a_link_to_a_folder_the_link_is_removed(tmp_path, victim):
    (tmp_path / "step").symlink_to(victim.parent)
    remove_folder(tmp_path / "step")
    assert not (tmp_path / "step").is_symlink()


def test_what_a_kill_left_is_removed_and_a_link_among_it_is_not_followed(tmp_path, victim):
    (tmp_path / ".step-1.0123.part").mkdir()
    (tmp_path / ".step-1.0123.part" / "tensors.pt").write_text("half")
    (tmp_path / ".step-2.0123.old").symlink_to(victim.parent)
    (tmp_path / ".other").write_text("mine")
    remove_left_over(tmp_path, "step-")
    assert [path.name for path in tmp_path.iterdir() if path != victim.parent] == [".other"]


def test_a_folder_is_moved_aside_in_the_place_of_what_had_the_name(tmp_path, victim):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    move_aside(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "content").read_text() == "new"
    (tmp_path / "link").symlink_to(victim.parent)
    move_aside(tmp_path / "old", tmp_path / "link")
    assert (tmp_path / "link" / "content").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "victim"]


def test_a_file_and_a_link_to_it_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"\x00ab")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "file") == read_bytes(tmp_path / "link") == b"\x00ab"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(tmp_path / "pipe")


def test_a_socket_and_a_link_to_a_device_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(OSError, match="not a regular file"):
            read_bytes(tmp_path / "socket")
    (tmp_path / "zero").symlink_to(os.devnull)
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(tmp_path / "zero")


def test_a_folder_and_a_missing_file_are_what_the_system_says(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")
