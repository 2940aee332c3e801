"""A distribution made by `plugins new`, installed as its metadata say, and judged by the kit unedited."""

import ast
import builtins
import importlib
import keyword
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import regrad
import yaml
from regrad_runner.cli.main import main
from regrad_runner.plugins.check import run_check
from regrad_runner.plugins.names import NAME_PATTERN
from regrad_runner.plugins.new import COPIED, new_plugin

ROOT = Path(__file__).parents[4]
# What a plugin's author may have written in the place of a citation.
CITED = re.compile(r"\b(19|20)\d\d\b.*,|arxiv|doi|et al|\bthe regrad founders\b", re.IGNORECASE)


@pytest.fixture(params=["minimal", "full"])
def made(tmp_path, request):
    return new_plugin("my-method", tmp_path, full=request.param == "full")


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
def test_its_own_tests_and_examples_pass_unedited(installed):
    command = [sys.executable, "-m", "pytest", "-q", "--doctest-modules", "tests", "src"]
    quiet = ["--import-mode=importlib", "-p", "no:cacheprovider", "-W", "error"]
    chosen = ["-k", "not conformance"]  # the kit has judged it above
    if not (installed / "tests" / "test_functional.py").is_file():
        # The kit's suite is all the tests that a minimal plugin has: one clause stands for it.
        chosen = ["-k", "TestRule and reference"]
    done = subprocess.run(
        [*command, *quiet, *chosen],
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def texts_of(made):
    return {
        str(path.relative_to(made)): path.read_text(encoding="utf-8")
        for path in made.rglob("*")
        if path.is_file()
    }


SHARED_FILES = {
    *("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", ".gitignore"),
    *(str(Path(".github", "workflows", file)) for file in ("ci.yml", "publish.yml")),
    *(str(Path("src", "regrad_my_method", file)) for file in ("__init__.py", "py.typed")),
    *(str(Path("tests", file)) for file in ("reference.py", "test_conformance.py")),
}
FULL_FILES = {
    *(str(Path("src", "regrad_my_method", file)) for file in ("correction.py", "functional.py")),
    *(str(Path("tests", file)) for file in ("test_correction.py", "test_functional.py")),
}


def test_a_minimal_plugin_has_few_files_and_a_full_one_those_of_every_plugin(tmp_path):
    minimal = new_plugin("my-method", tmp_path / "minimal")
    full = new_plugin("my-method", tmp_path / "full", full=True)
    assert set(texts_of(minimal)) == SHARED_FILES
    assert set(texts_of(full)) == SHARED_FILES | FULL_FILES


def test_the_rule_of_a_minimal_plugin_is_one_class_of_about_twenty_lines(tmp_path):
    made = new_plugin("my-method", tmp_path)
    code = (made / "src" / "regrad_my_method" / "__init__.py").read_text()
    (rule,) = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    assert rule.end_lineno - rule.lineno < 22


def test_every_blank_is_marked(made):
    texts = texts_of(made)
    workflows = {file for file in texts if file.endswith(".yml")}
    assert [file for file, text in texts.items() if "$" in text and file not in workflows] == []
    for file in ("README.md", "pyproject.toml", "tests/reference.py"):
        assert "(fill in" in texts[file]
    assert "Source: (fill in)" in texts["README.md"]
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    assert project["entry-points"] == {"regrad": {"my-method": "regrad_my_method:MyMethod"}}


def test_its_workflows_are_those_of_github_and_hold_no_blank(made):
    for path in sorted((made / ".github" / "workflows").iterdir()):
        text = path.read_text()
        assert "$$" not in text
        assert "(fill in" not in text
        assert yaml.safe_load(text)["permissions"] == {}
    published = yaml.safe_load((made / ".github" / "workflows" / "publish.yml").read_text())
    assert 'test "v$(uv version --short)" = "$GITHUB_REF_NAME"' in str(published)
    jobs = published["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["build"]["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("full", [False, True])
def test_nothing_is_cited_and_no_prose_is_of_another_plugin(tmp_path, full):
    made = new_plugin("signed-noise", tmp_path, full=full)
    shipped = {"centraliz", "centring", "yong", "powergrad", "agc", "brock"}
    for file, text in texts_of(made).items():
        if file != "LICENSE":
            assert not CITED.search(text), file
        assert not [word for word in shipped if word in text.lower()], file


def test_it_needs_what_a_shipped_plugin_needs(made):
    shipped = ROOT / "plugins" / "centralization" / "pyproject.toml"
    if not shipped.is_file():
        pytest.skip("the shipped plugins' sources are not here")
    ours, theirs = (
        tomllib.loads(path.read_text())["project"] for path in (made / "pyproject.toml", shipped)
    )
    for key in ("dependencies", "requires-python", "license", "version"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("Ada Lovelace\n", "Ada Lovelace"),
        ('O\'Neil "Quote" \\ $name\n', 'O\'Neil "Quote" \\ $name'),
        ("Zoë 梯度 🙂\n", "Zoë 梯度 🙂"),
        ("odd\x1b[31m\u202e name\n", "odd [31m name"),
        ("", None),
    ],
)
def test_licence_and_project_name_the_author_that_git_knows_or_leave_a_blank(
    tmp_path, monkeypatch, told, shown
):
    def git(command, **options):
        assert command[1:] == ["config", "user.name"]
        return subprocess.CompletedProcess(command, 0 if told else 1, told.encode(), b"")

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", git)
    made = new_plugin("my-method", tmp_path)
    line = (made / "LICENSE").read_text(encoding="utf-8").splitlines()[2]
    assert re.fullmatch(
        rf"Copyright \(c\) \d{{4}} {re.escape(shown or '(fill in your name)')}", line
    )
    project = tomllib.loads((made / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": shown or "(fill in your name)"}]


def test_without_git_the_author_is_a_blank_and_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["plugins", "new", "my-method", "--out", str(tmp_path)]) == 0
    assert "(fill in your name)" in (tmp_path / "regrad-my-method" / "LICENSE").read_text()
    said = capsys.readouterr().out
    assert "need your name: git knows none and --author was not given. Fill it in" in said


def test_an_author_who_is_named_stands_in_the_licence_whatever_git_knows(tmp_path, capsys):
    command = ["plugins", "new", "my-method", "--out", str(tmp_path)]
    assert main([*command, "--author", "Ada\n\x1b[31mLovelace"]) == 0
    made = tmp_path / "regrad-my-method"
    assert " Ada [31mLovelace\n" in (made / "LICENSE").read_text()
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    assert project["authors"] == [{"name": "Ada [31mLovelace"}]
    assert "need your name" not in capsys.readouterr().out


def test_a_full_card_has_the_headings_of_every_card_and_claims_nothing(tmp_path):
    made = new_plugin("my-method", tmp_path, full=True)
    card = (made / "README.md").read_text()
    assert card.startswith("# regrad-my-method: (fill in")
    assert card.count("\n## ") == 8
    assert '["my-method"]' in card
    assert "not measured" in card
    if (ROOT / "plugins").is_dir():
        shipped = (ROOT / "plugins" / "centralization" / "README.md").read_text()
        assert re.findall("^## .*", card, re.MULTILINE) == re.findall(
            "^## .*", shipped, re.MULTILINE
        )


# names


@pytest.mark.parametrize(
    "name",
    [
        "My",
        "my_method",
        "",
        "1st",
        "a--b",
        "-a",
        "a/b",
        "../a",
        "a b",
        "ä",
        "a\n",
        "a.b",
        "\x1b[1m",
    ],
)
def test_a_name_that_cannot_be_one_is_refused_before_anything_is_written(tmp_path, name):
    assert not NAME_PATTERN.fullmatch(name)
    with pytest.raises(ValueError, match="name must be lower-case words with hyphens between them"):
        new_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


BAD_NAMES = [
    "none",
    "baseline",
    "all",
    "true",
    "false",
    "yes",
    "no",
    "on",
    "ddp",
    "plain",
    "regrad-x",
]
BAD_NAMES += ["con", "nul", "com1", "lpt9", "test", "test-it", "testosterone", "x" * 51]
BAD_NAMES += ["correction", "step", "tensor", "options", "needs", "control", "optimizer"]
BAD_NAMES += ["runner", "testing", "transformers", "lightning", "bench", "deepspeed", "core"]
BAD_NAMES += ["xgrad", "agc", "clipping", "tom", "adam3", "digits", "text", "sgd", "adamw", "lbfgs"]
BAD_NAMES += [word.lower() for word in (*keyword.kwlist, *keyword.softkwlist) if word != "_"]
BAD_NAMES += [word.lower() for word in ("print", "type", "Exception", "Warning", "max", "map")]


@pytest.mark.parametrize("name", sorted(set(BAD_NAMES)))
def test_a_name_that_would_break_something_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(
        ValueError, match=r"name must (be a new one|not have another meaning|have at most)"
    ):
        new_plugin(name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_member_of_this_repository_is_a_name_that_is_taken(tmp_path, monkeypatch):
    folders = [*ROOT.glob("plugins/*/"), *ROOT.glob("packages/*/")]
    names = [path.name for path in folders if (path / "pyproject.toml").is_file()]
    if not names:
        pytest.skip("the repository is not here")
    monkeypatch.setattr(regrad, "available", lambda group="regrad": {})
    monkeypatch.setattr("regrad.distributions.every", list)
    for name in names:
        with pytest.raises(ValueError, match="which is a part of regrad"):
            new_plugin(name, tmp_path)


def test_a_name_that_an_installed_distribution_has_is_refused(tmp_path, monkeypatch):
    (tmp_path / "site" / "Regrad_Mine-2.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ValueError, match="'mine', which the installed distribution regrad-mine"):
        new_plugin("mine", tmp_path)  # broken, and there all the same
    (tmp_path / "site" / "regrad_other.py").touch()
    with pytest.raises(ValueError, match="'other', which the installed package regrad_other has"):
        new_plugin("other", tmp_path)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["a", "self", "dataclass", "x-2d", "json", "os", "numpy", "nan-2"])
def test_any_other_name_gives_code_that_compiles_and_shadows_nothing(tmp_path, name, full):
    made = new_plugin(name, tmp_path, full=full)
    for path in made.rglob("*.py"):
        tree = ast.parse(path.read_text())
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        assert not defined & set(dir(builtins))


# folders


def test_what_stands_in_the_place_of_the_folder_is_left_as_it_is(tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    (out / "regrad-folder").mkdir()
    (out / "regrad-file").write_text("kept")
    (out / "regrad-link").symlink_to(victim)
    (out / "regrad-dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("folder", "file", "link", "dangling"):
        assert main(["plugins", "new", name, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"regrad: out must not have a folder 'regrad-{name}' yet, got")
        assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (out / "regrad-file").read_text() == (victim / "file").read_text() == "kept"


def test_an_out_that_cannot_be_a_folder_is_one_line_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for out in ("file", "file/below", "dangling", "x" * 300, "new/" + "x" * 300):
        assert main(["plugins", "new", "my-method", "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("regrad: out must be a folder")
        assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fails_halfway_leaves_nothing(tmp_path, monkeypatch, capsys):
    written = []

    def fails(path, *arguments, **options):
        written.append(path)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", fails)
    assert main(["plugins", "new", "my-method", "--out", str(tmp_path / "a" / "b")]) == 2
    assert "out must be a folder that can be written, got" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["plugins", "new", "my-method", "--out", str(tmp_path)]) == 2
    assert "out must be a folder that can be written" in capsys.readouterr().err


# from another's code


def test_another_plugins_code_comes_without_its_words_and_with_its_licence(tmp_path):
    pytest.importorskip("regrad_centralization", reason="a plugin is needed to be copied")
    made = new_plugin("signed-noise", tmp_path, like="centralization")
    texts = texts_of(made)
    licences = {"LICENSE", "LICENSE.regrad-centralization"}
    for file, text in texts.items():
        if file not in licences:
            assert not CITED.search(text), file
            assert "yong" not in text.lower(), file
    named = {file for file, text in texts.items() if "centralization" in text.lower()}
    assert named == {"README.md", "CHANGELOG.md"}
    assert "The regrad founders" not in texts["LICENSE"]
    assert "The regrad founders" in texts["LICENSE.regrad-centralization"]
    code = texts[str(Path("src/regrad_signed_noise/correction.py"))]
    assert "class SignedNoise(Correction):" in code
    assert ast.get_docstring(ast.parse(code)) == "(fill in)"
    assert "| `placement` | (fill in) | gradient | (fill in) |" in texts["README.md"]


@pytest.mark.timeout(900)
def test_another_plugins_code_passes_its_tests_under_the_new_name(tmp_path, monkeypatch):
    pytest.importorskip("regrad_centralization", reason="a plugin is needed to be copied")
    made = new_plugin("my-method", tmp_path, like="centralization")
    info = tmp_path / "site" / "regrad_my_method-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: regrad-my-method\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[regrad]\nmy-method = regrad_my_method:MyMethod\n")
    path = os.pathsep.join([str(made / "src"), str(info.parent)])
    files = ["tests/test_functional.py", "tests/test_correction.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files, "--import-mode=importlib"],
        cwd=made,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_names_and_folders_that_are_taken_are_refused(made, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="out must not have a folder 'regrad-my-method' yet"):
        new_plugin("my-method", tmp_path)
    with pytest.raises(ValueError, match="like must be an installed correction, got 'centrali"):
        new_plugin("other", tmp_path, like="centralisation-of-nothing")
    if "agc" in regrad.available():  # three corrections in one distribution
        with pytest.raises(ValueError, match="like must be alone in a distribution that is here"):
            new_plugin("other", tmp_path, like="agc")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_or_odd_neighbour_stops_nothing(tmp_path, monkeypatch):
    site = tmp_path / "site"
    for folder, metadata, value in (
        ("half", "", "half:Half"),
        ("up", "Name: ../../..\nVersion: 1\n", "json.broken.dotted:Thing"),
        ("form", "Name: form\nVersion: 1\n", "[not a place]"),
    ):
        info = site / f"{folder}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(f"[regrad]\n{folder} = {value}\n")
        (info / "direct_url.json").write_text("[]")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    assert new_plugin("my-method", tmp_path / "out").is_dir()
    for like in ("up", "form"):
        with pytest.raises(ValueError, match="like must be alone in a distribution"):
            new_plugin("other", tmp_path / "out", like=like)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Return a function that installs a whole plugin of somebody, whose metadata may say anything."""

    def install(name="foreign", code="class Thing: pass\n", pyproject="[project]\n"):
        package = tmp_path / "site" / "foreign_package"
        (package / "distribution" / "tests").mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        for file in ("LICENSE", "README.md"):
            (package / "distribution" / file).write_text("of somebody")
        (package / "distribution" / "pyproject.toml").write_text(pyproject)
        info = tmp_path / "site" / "foreign-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[regrad]\nforeign = foreign_package:Thing\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        importlib.invalidate_caches()

    yield install
    sys.modules.pop("foreign_package", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "/../../victim/x"},
        {"name": "../../.."},
        {"name": "a/b"},
        {"code": "class Thing(:\n"},
        {"code": 'x = """\n'},
        {"code": "import regrad\nThing = regrad.Composition(parts=())\n"},
        {"code": "class Thing: pass\n"},
        {"pyproject": "no TOML"},
    ],
)
def test_a_foreign_plugin_that_cannot_be_copied_is_one_line_and_nothing_is_written(
    foreign, tmp_path, capsys, changes
):
    def whole():
        return {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}

    foreign(**changes)
    (tmp_path / "victim").mkdir()
    before = whole()
    out = str(tmp_path / "out")
    assert main(["plugins", "new", "my-method", "--like", "foreign", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("regrad: ")
    assert said.count("\n") == 1
    assert whole() == before


def test_a_wheel_of_the_shipped_plugin_carries_all_that_is_copied():
    """The files that a wheel carries are named in its pyproject: every one that `--like` asks for must be there."""
    path = ROOT / "plugins" / "centralization" / "pyproject.toml"
    if not path.is_file():
        pytest.skip("the shipped plugins' sources are not here")
    pyproject = tomllib.loads(path.read_text())
    carried = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(carried) == set(COPIED)
    assert all(
        target == f"regrad_centralization/distribution/{item}" for item, target in carried.items()
    )


def test_the_command_says_what_to_do_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "my-method"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("regrad-my-method holds a correction 'my-method' that works. Next:\n")
    assert "pip install --editable regrad-my-method\n" in said
    assert main(["plugins", "new", "my-method"]) == 2
    assert "regrad: out must not have a folder" in capsys.readouterr().err
