"""A distribution made by `plugins new`, installed as its metadata say, and judged by the kit unedited."""

import importlib
import os
import subprocess
import sys
import tomllib

import pytest
import regrad
from regrad_runner.checks import run_check
from regrad_runner.cli import main
from regrad_runner.new_plugin import COPIED, NAME, new_plugin

pytest.importorskip("regrad_centralization", reason="a plugin is needed to be copied")


@pytest.fixture
def made(tmp_path):
    return new_plugin("my-method", tmp_path)[0]


@pytest.fixture
def installed(made, tmp_path, monkeypatch):
    """Install what was made, as an editable installation would: its metadata and a path."""
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / "regrad_my_method-0.1.0.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head + needs)
    points = project["entry-points"]["regrad"]
    (info / "entry_points.txt").write_text(
        "[regrad]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
    )
    folders = [str(made / "src"), str(info.parent)]
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    importlib.invalidate_caches()
    yield made
    for module in [name for name in sys.modules if name.startswith("regrad_my_method")]:
        del sys.modules[module]


def test_it_is_a_plugin_of_the_new_name_that_passes_the_kit_unedited(installed):
    assert regrad.available()["my-method"].distribution == "regrad-my-method"
    assert type(regrad.create("my-method")).__name__ == "MyMethod"
    report = run_check("my-method", installed / "tests" / "test_conformance.py")
    assert {row["outcome"] for row in report["clauses"]} <= {"proved", "skipped"}
    assert sum(row["outcome"] == "proved" for row in report["clauses"]) > 15


@pytest.mark.timeout(900)
def test_its_own_tests_pass_unedited(installed):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    chosen = ["-k", "not conformance and not layouts"]  # the kit has judged them above
    done = subprocess.run(
        [*command, *chosen], cwd=installed, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_nothing_of_the_original_is_left_but_where_it_comes_from(made):
    files = [path for path in made.rglob("*") if path.is_file()]
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= {
        path.name for path in files
    }
    named = [path.name for path in files if "centralization" in path.read_text().lower()]
    assert sorted(named) == ["CHANGELOG.md", "README.md"]
    assert not [path for path in files if "__pycache__" in path.parts]
    project = tomllib.loads((made / "pyproject.toml").read_text())
    assert "uv" not in project["tool"]
    assert "The regrad founders" in (made / "LICENSE").read_text()  # the licence of what was copied


def test_the_card_keeps_its_headings_and_claims_nothing(made):
    card = (made / "README.md").read_text()
    assert card.startswith("# regrad-my-method: ")
    assert card.count("\n## ") == 8
    assert card.count("Yours to write.") == 6
    assert '["my-method:placement=decayed"]' in card
    assert "CIFAR" not in card


@pytest.mark.parametrize(
    "name", ["My", "my_method", "", "1st", "a--b", "-a", "a/b", "../a", "a b", "ä"]
)
def test_a_name_that_cannot_be_one_is_refused_before_anything_is_written(tmp_path, name):
    assert not NAME.fullmatch(name)
    with pytest.raises(ValueError, match="name must be lower-case words with hyphens between them"):
        new_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_and_folders_that_are_taken_are_refused(made, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError,
        match="name must be a new one, got 'centralization', which regrad-centralization offers",
    ):
        new_plugin("centralization", tmp_path)
    with pytest.raises(ValueError, match="out must not have a folder 'regrad-my-method' yet"):
        new_plugin("my-method", tmp_path)
    with pytest.raises(
        ValueError, match="like must be an installed correction, got 'centralisation'; did you mean"
    ):
        new_plugin("other", tmp_path, like="centralisation")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plugin_that_lies_here_without_its_tests_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("regrad_runner.new_plugin._editable", lambda distribution: None)
    monkeypatch.setattr("regrad_runner.new_plugin.CARRIED", "nowhere")
    with pytest.raises(
        ValueError,
        match="the smallest shipped plugin must be installed with its tests to be copied",
    ):
        new_plugin("other", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_of_the_shipped_plugin_carries_all_that_is_copied():
    """The files that a wheel carries are named in its pyproject: every one that `new` asks for must be there."""
    source = new_plugin.__globals__["_choose"](None)
    pyproject = tomllib.loads((source.rest / "pyproject.toml").read_text())
    carried = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(carried) == set(COPIED)
    assert all(
        target == f"{source.package.name}/distribution/{item}" for item, target in carried.items()
    )


def test_the_command_says_what_to_do_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "my-method"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "regrad-my-method holds 'centralization' under the name 'my-method'. Next:\n"
    )
    assert "pip install --editable regrad-my-method\n" in said
    assert main(["plugins", "new", "my-method"]) == 2
    assert "regrad: out must not have a folder" in capsys.readouterr().err
