"""The list of plugins, with neighbours that are damaged or say what a terminal would obey."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from regrad_runner.cli.main import main
from regrad_runner.plugins.listing import table_lines

ODD = "\x1b[31mred \u202e\x07"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that writes a distribution's metadata where Python finds them."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(folder, metadata, points):
        info = site / f"{folder}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_bytes(metadata)
        (info / "entry_points.txt").write_bytes(points)
        importlib.invalidate_caches()

    return add


@pytest.fixture
def damaged(install):
    """Install one good plugin among damaged ones."""
    install("good", b"Name: regrad-good\nVersion: 1.0\n", b"[regrad]\ngood = json:loads\n")
    install("half", b"", b"[regrad]\nhalf = json:loads\n")
    install("bytes", b"Name: \xff\n", b"[regrad]\nbytes = json:loads\n")
    install("points", b"Name: regrad-points\nVersion: 1\n", b"[regrad]\nrubbish\n")
    install("up", b"Name: ../../..\nVersion: 1\n", b"[regrad]\nup = json.no.such:Thing\n")


@pytest.mark.usefixtures("damaged")
def test_damaged_neighbours_leave_the_list_whole(capsys):
    assert main(["plugins", "list", "--json"]) == 0
    listed = {row["name"]: row["distribution"] for row in json.loads(capsys.readouterr().out)}
    assert (listed["good"], listed["up"]) == ("regrad-good", "../../..")
    assert not {"half", "bytes", "rubbish"} & listed.keys()


@pytest.mark.long
@pytest.mark.usefixtures("damaged")
def test_every_other_command_survives_them_too(tmp_path):
    """In a process of its own: what is hidden from other libraries stays hidden."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*words):
        command = [sys.executable, "-m", "regrad_runner", *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    assert run("plugins", "show", "digits")[0] == 0
    code, said = run("plugins", "show", "up")
    assert code == 2
    assert "plugin 'up' (../../.. 1) could not be imported: No module named 'json.no'" in said
    code, said = run("explain", "--corrections", "nothing")
    assert code == 2
    assert "no correction named 'nothing'; installed:" in said


def test_metadata_are_shown_and_not_obeyed(install, capsys):
    head = f"Name: {ODD}\nVersion: {ODD}\nSummary: {ODD}\n".encode()
    install("odd", head, f"[regrad]\n{ODD} = json:loads\n".encode())
    assert main(["plugins", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert r"\x1b[31mred" in shown
    assert main(["plugins", "list", "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert ODD in {row["summary"] for row in json.loads(shown)}


ROWS = [("name", "what it is"), ("agc", "clips every unit by the norm of its weights"), ("x", "")]


def test_a_table_wraps_its_last_column_to_the_screen():
    assert list(table_lines(ROWS, width=30)) == [
        "name  what it is",
        "agc   clips every unit by the",
        "      norm of its weights",
        "x",
    ]


def test_a_narrow_screen_leaves_room_for_words():
    assert list(table_lines(ROWS, width=5))[1] == "agc   clips every unit by"


def test_another_program_gets_one_line_per_plugin():
    assert list(table_lines(ROWS, width=None)) == [
        "name  what it is",
        "agc   clips every unit by the norm of its weights",
        "x",
    ]


def test_each_correction_of_one_distribution_has_its_own_line(capsys):
    pytest.importorskip("regrad_clipping", reason="a distribution with several is needed")
    assert main(["plugins", "list", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["kind"] == "correction"]
    about = {row["name"]: row["about"] for row in rows if row["distribution"] == "regrad-clipping"}
    assert set(about) == {"agc", "clip-norm", "clip-update", "clip-value"}
    assert about["clip-value"] == "Clamp every element of every gradient to a bound"
    assert len(set(about.values())) == 4


def test_the_list_imports_neither_torch_nor_a_plugin():
    code = (
        "import sys\n"
        "from regrad_runner.cli.main import main\n"
        "main(['plugins', 'list'])\n"
        "heavy = {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(str(heavy & {'torch', 'numpy', 'regrad_clipping', 'regrad_xgrad'} or ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert "correction" in done.stdout
