"""Where output goes: folders that cannot be made, disks that are full, and no password in any of it."""

import errno
import os
from pathlib import Path

import pytest
from regrad_runner import files
from regrad_testing.files import load_beside

cases = load_beside(__file__, "cases")
SMALL = ["--train-size", "64", "--batch-size", "32", "--epochs", "1", "--width", "4"]
SMALL += ["--threads", "1"]
COMPARE = ["compare", "--corrections", "agc", "--no-controls", "--seeds", "1", *SMALL]
SECRET = "s3kret-w0rd"


def one_line(words, codes=(2,)):
    code, out, err = cases.command(*words)
    lines = err.strip().splitlines()
    assert code in codes, (code, out, err)
    assert out == ""
    assert lines[-1].startswith("regrad: ")
    assert not any(line.startswith("Traceback") for line in lines)
    return lines


def folders(tmp_path):
    """Names of folders that cannot be made, by what is wrong with them."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link-to-file").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    names = ["x" * 300, "file", "link-to-file", "dangling", "loop", "file/out", "link-to-file/out"]
    names += ["/proc/regrad-out"] if Path("/proc/self").is_dir() else []
    return [*names, "x" * 300 + "/out", "a\0b"]


@pytest.mark.parametrize("command", [["train", *SMALL], COMPARE, [*COMPARE, "--cells"]])
def test_a_folder_that_cannot_be_made_is_one_line_and_changes_nothing(
    tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    for name in folders(tmp_path):
        before = sorted(path.name for path in tmp_path.iterdir())
        lines = one_line([*command, "--tracker", "none", "--out", name])
        assert len(lines) == 1, lines
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [["report"], ["sync"]])
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for name in folders(tmp_path):
        assert len(one_line([*command, name])) == 1


def test_a_plugin_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in folders(tmp_path):
        assert len(one_line(["plugins", "new", "my-method", "--out", name])) == 1


@pytest.fixture
def full_after(monkeypatch):
    """Let the disk take so many files and then no more."""

    def let(count):
        new_file, made = files.new_file, []

        def limited(path, **options):
            made.append(path)
            if len(made) > count:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return new_file(path, **options)

        monkeypatch.setattr(files, "new_file", limited)
        return made

    return let


@pytest.mark.parametrize("count", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("command", [["train", *SMALL], COMPARE])
def test_a_disk_that_is_full_at_any_moment_is_one_line_and_no_traceback(
    tmp_path, full_after, command, count
):
    made = full_after(count)
    lines = one_line([*command, "--tracker", "none", "--out", str(tmp_path / "out")], codes=(1, 2))
    assert len(made) == count + 1
    assert "No space left on device" in lines[-1]
    assert not list(tmp_path.rglob("*.part"))


def test_a_report_on_a_full_or_read_only_disk_is_one_line(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert cases.command(*COMPARE, "--tracker", "none", "--out", str(out))[0] == 0
    for number in (errno.ENOSPC, errno.EROFS):

        def refuses(path, number=number, **options):
            raise OSError(number, os.strerror(number), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(files, "new_file", refuses)
            (line,) = one_line(["report", str(out)])
        assert os.strerror(number) in line


ADDRESSES = [
    f"http://me:{SECRET}@127.0.0.1:9",
    f"http://127.0.0.1:9/?token={SECRET}",
    f"postgresql://me:{SECRET}@127.0.0.1/runs",
    f"ftp://me:{SECRET}@127.0.0.1",
    f"me:{SECRET}@127.0.0.1",
    f"http://me:{SECRET}@127.0.0.1:9/\n",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_password_in_a_flag_or_a_file_is_refused_and_shown_nowhere(
    tmp_path, monkeypatch, address
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"tracking_uri: {address!r}\n")
    for command in ("compare", "train"):
        for words in (["--tracking-uri", address], ["--config", "mine.yaml"]):
            (line,) = one_line([command, *words, "--out", "out"])
            assert SECRET not in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_password_of_the_environment_is_in_no_file_and_not_on_the_screen(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.setattr("regrad_runner.tracking.projector.SECONDS_IN_VAIN", 0.5)
    words = ["--tracking-uri", "http://127.0.0.1:9", "--out", str(tmp_path / "out")]
    said = cases.command("train", *SMALL, *words)
    said += cases.command("report", str(tmp_path / "out"))
    said += cases.command("sync", str(tmp_path / "out"))
    assert (said[0], said[6]) == (0, 1)
    assert "tracking at http://127.0.0.1:9 failed" in said[2]
    assert SECRET not in "".join(map(str, said))
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(everything) > 5
    assert not any(SECRET.encode() in content for content in everything)
