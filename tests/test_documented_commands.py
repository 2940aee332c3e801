"""Every block of code on the pages is checked.

- `python`: run, from the page's top to its bottom (`test_documentation.py`).
- shell (`bash`, indented, or fenced without a language): every command is parsed by the program that would run it, with
  that program's own parser. An option, a name, a file or a session that is not there fails; `regrad compare`, `train`
  and `explain` check their settings and create their corrections too. What is quick (`RUN`) is run in an empty folder.
- shell, marked `cluster`: as above, and nothing of it is run.
- `toml`, `yaml`, `json`: read. `text` is no code.
- `diff`, `bibtex`: of the README, see `test_documentation.py`.

All shell blocks go through shellcheck, and `docs/examples/author.sh` is run by `nox -s author`.
"""

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
pages = importlib.import_module("blocks")
sys.path.remove(str(ROOT / "docs"))
SHELL_BLOCKS = [block for block in pages.all_blocks() if block.language == pages.SHELL]
READERS = {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}
# What stands on the pages for something of the reader's own.
PLACEHOLDER = re.compile(r"[A-Z]+(\.\.\.)?|…")
RUN = re.compile(r"regrad (plugins (list|show \S+|new [\w-]+)( --json)?|.*--help)")
MEMBERS = {
    tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"]: path.parent
    for pattern in ("core", "plugins/*", "packages/*")
    for path in ROOT.glob(f"{pattern}/pyproject.toml")
}
GROUPS = set(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
)
# What the distributions in docs/examples and docs/gpu offer; other tests install them.
EXAMPLES = {
    name
    for path in (ROOT / "docs").glob("*/*/pyproject.toml")
    for group in tomllib.loads(path.read_text(encoding="utf-8"))["project"]["entry-points"].values()
    for name in group
}
# Parsing this would write to the home folder; test_completion.py has what comes of it.
ONLY_INSTALLS = (["--install-completion"], ["--show-completion"])
MEND = "correct the page, or, where it is no command, fence it as `text`"


def sessions() -> dict[str, ast.FunctionDef]:
    """The sessions of noxfile.py by name, read and not imported: nox is not among the tests' dependencies."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {
        node.name: node
        for node in functions
        if any("session" in ast.unparse(d) for d in node.decorator_list)
    }


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of every simple command: no comments, variables set in front, or places for output."""
    lines = text.replace("\\\n", " ").splitlines()
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();|&"):
                if words:
                    yield words
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)


class Commands:
    """Parse a command as the program that it calls does. What is wrong raises."""

    def __init__(self, regrad_commands, monkeypatch):
        self.regrad_commands, self.monkeypatch = regrad_commands, monkeypatch

    def check(self, words: list[str]) -> None:
        name, *rest = words
        if name.endswith(".sh"):
            self.script(name, rest)
        else:
            rule = getattr(self, name.replace("-", "_"), None)
            assert rule, f"no rule for {name!r} in {Path(__file__).name}; {MEND}"
            rule(rest)

    def regrad(self, words: list[str]) -> None:
        if words not in ONLY_INSTALLS:
            self.regrad_commands([word for word in words if word not in {"…", "COMMAND"}])

    def regrad_bench(self, words: list[str]) -> None:
        command = importlib.import_module("regrad_bench.command")
        parser = importlib.import_module("typer.main").get_command(command.app)
        parser.callback = lambda **_: 0
        with (
            self.monkeypatch.context() as patched,
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            patched.setattr(command, "app", parser.main)
            assert command.main(words) == 0, said.getvalue()

    def uv(self, words: list[str]) -> None:
        action, rest = words[0], words[1:]
        assert action in {"run", "sync", "pip"}, f"no rule for uv {action!r}"
        if action == "pip":
            return self.pip(rest)
        while rest and rest[0].startswith("-"):
            flag, *rest = rest
            assert flag in {"--all-packages", "--group"}, (
                f"no rule for the flag {flag!r} of uv {action}"
            )
            if flag == "--group":
                group, *rest = rest
                assert group in GROUPS, f"no dependency group {group!r}"
        assert bool(rest) == (action == "run"), f"uv {action} {shlex.join(rest)}"
        return self.check(rest) if rest else None

    def git(self, words: list[str]) -> None:
        assert words[0] in {"tag", "push"}, f"no rule for git {words[0]!r}"

    def nox(self, words: list[str]) -> None:
        if words == ["-l"]:
            return
        flag, *names = words
        assert flag == "-s", f"no rule for the flag {flag!r} of nox"
        unknown = [
            name
            for name in names[: names.index("--") if "--" in names else None]
            if name not in sessions()
        ]
        assert unknown == [], f"no session {unknown}"

    def pip(self, words: list[str]) -> None:
        assert words[0] == "install", f"no rule for pip {words[0]!r}"
        for word in (word for word in words[1:] if word not in {"--editable", "-e"}):
            name, _, extras = word.partition("[")
            if "/" in word:
                assert (ROOT / word / "pyproject.toml").is_file(), f"no member in {word!r}"
            elif not PLACEHOLDER.fullmatch(name) and name not in {"uv", "regrad-my-method"}:
                project = tomllib.loads(
                    (MEMBERS[name] / "pyproject.toml").read_text(encoding="utf-8")
                )["project"]
                assert not extras or extras.rstrip("]") in project["optional-dependencies"], (
                    f"no extra in {word!r}"
                )

    def python(self, words: list[str]) -> None:
        if words[0] == "-m":
            module, *rest = words[1:]
            rules = {
                "pip": self.pip,
                "regrad_runner": self.regrad,
                "regrad_testing": lambda names: names,
            }
            assert module in rules, f"no rule for python -m {module}"
            rules[module](rest)
        else:
            assert (ROOT / words[0]).is_file(), f"no file {words[0]!r}"

    def pytest(self, words: list[str]) -> None:
        markers = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        if "-m" in words:
            marker = words.pop(words.index("-m") + 1)
            assert f'"{marker}: ' in markers, f"no marker {marker!r}"
        for path in (word.partition("::")[0] for word in words if not word.startswith("-")):
            assert PLACEHOLDER.fullmatch(path) or (ROOT / path).exists(), f"no tests in {path!r}"

    def torchrun(self, words: list[str]) -> None:
        parser = importlib.import_module("torch.distributed.run").get_args_parser()
        self.launched(parser.parse_args(words))

    def accelerate(self, words: list[str]) -> None:
        assert words[0] == "launch", f"no rule for accelerate {words[0]!r}"
        parser = importlib.import_module("accelerate.commands.launch").launch_command_parser()
        self.launched(parser.parse_args(words[1:]))

    def launched(self, launch) -> None:
        assert (launch.module, launch.training_script) == (True, "regrad_runner")
        self.regrad(launch.training_script_args)

    def sbatch(self, words: list[str]) -> None:
        self.script(words[0], words[1:])

    def script(self, path: str, words: list[str]) -> None:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert PLACEHOLDER.fullmatch(words[0]), f"{path} takes the folder first, got {words[0]!r}"
        self.regrad(["compare" if "regrad compare" in text else "train", *words[1:]])

    def eval(self, words: list[str]) -> None:
        assert re.fullmatch(r"\$\(_REGRAD_COMPLETE=source_(bash|zsh) regrad\)", "".join(words)), (
            words
        )


@pytest.fixture
def regrad_commands(monkeypatch):
    """The command `regrad`, really parsed; instead of what it would do its settings are checked."""
    from regrad_runner.cli.app import app
    from regrad_runner.cli.main import main as cli
    from typer.main import get_command

    whole = get_command(app)
    waiting: list[Any] = [whole]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        if not hasattr(command, "commands"):
            command.callback = functools.partial(check_settings, command.name)
    monkeypatch.setattr("regrad_runner.cli.app.app", whole.main)

    def parse(words: list[str]) -> None:
        with (
            contextlib.redirect_stderr(io.StringIO()) as said,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            assert cli(words) == 0, said.getvalue()

    return parse


def check_settings(command: str, /, **values: Any) -> int:
    """Check what a command was given as the command itself does, short of loading data and training."""
    import regrad
    from regrad_runner.cli import completion
    from regrad_runner.cli.settings_flags import given_settings
    from regrad_runner.settings import config, script_config
    from regrad_runner.settings.cluster import cluster_of
    from regrad_runner.settings.loading import load_config
    from regrad_runner.training import optimizers

    if "corrections" not in values:
        names = [values["name"]] if command in {"show", "check"} else []
        known = {*completion.plugins(""), *EXAMPLES}
        assert {
            name.partition(":")[0] for name in names if not PLACEHOLDER.fullmatch(name)
        } <= known
        return 0
    compares = config.CompareConfig
    if values.get("script"):
        compares = script_config.ScriptConfig
        values["better"] = "higher" if values.get("higher_is_better") else "lower"
    kind = compares if command == "compare" else config.TrainConfig
    cluster_of(values.get("on"), values.get("slurm"))
    file = values.get("config")
    flags = given_settings(kind.model_fields, values)
    settings = load_config(
        kind,
        file=None if file is None or PLACEHOLDER.fullmatch(file.name) else ROOT / file,
        flags=flags,
    )
    for name in (name for stack in settings.corrections for name in stack.split("+")):
        assert name == "all" or PLACEHOLDER.fullmatch(name) or regrad.create(name)
    if kind is script_config.ScriptConfig:
        return 0
    workload, model = (
        text and text.partition(":")[0] for text in (settings.workload, settings.model)
    )
    assert workload in EXAMPLES or workload in completion.workloads("")
    assert model is None or workload in EXAMPLES or model in completion.models("")
    assert settings.optimizer is None or optimizers.optimizer_class(
        optimizers.read_spec(settings.optimizer)[0]
    )
    return 0


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.place)
def test_every_command_on_a_page_is_one_that_its_program_takes(
    block, regrad_commands, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    commands = Commands(regrad_commands, monkeypatch)
    try:
        found = list(commands_in(block.text))
        for words in found:
            commands.check(words)
    except (AssertionError, ValueError, LookupError, TypeError, OSError, SystemExit) as problem:
        pytest.fail(f"{block.place}: {problem}; {MEND}:\n{block.text}")
    assert found, f"{block.place}: no command; {MEND}"
    assert list(tmp_path.iterdir()) == []


def quick() -> dict[str, str]:
    """What is run, with the first place where it stands."""
    where: dict[str, str] = {}
    for block in SHELL_BLOCKS:
        for words in commands_in(block.text) if pages.CLUSTER not in block.marks else ():
            line = shlex.join(word for word in words if word != "COMMAND")
            if RUN.fullmatch(line) and words[-1] not in EXAMPLES:
                where.setdefault(line, block.place)
    return where


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("line", "place"), quick().items())
def test_a_quick_command_on_a_page_runs(line, place, tmp_path, monkeypatch, capsys):
    from regrad_runner.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0, f"{place}: {capsys.readouterr().err}"
    assert capsys.readouterr().out


def test_the_quick_commands_are_not_few():
    assert len(quick()) >= 5


@pytest.mark.parametrize(
    "block", [b for b in pages.all_blocks() if b.language in READERS], ids=lambda b: b.place
)
def test_a_file_that_a_page_shows_can_be_read(block):
    assert READERS[block.language](block.text), block.place


def test_every_block_has_a_language_that_is_checked():
    known = {*READERS, "python", "text", "diff", "bibtex", pages.SHELL}
    wrong = [
        f"{b.place}: {b.language}"
        for b in pages.all_blocks()
        if b.language not in known and b.language[0] != "{"
    ]
    assert wrong == [], "give it a language that a test checks, or `text`"
    assert {mark for b in SHELL_BLOCKS for mark in b.marks} <= {pages.CLUSTER}


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="needs shellcheck, of the dependency group lint"
)
def test_shellcheck_has_nothing_to_say_of_the_shell_on_the_pages():
    assert pages.shellcheck(SHELL_BLOCKS) == ""


def test_the_recording_shows_a_command_that_its_program_takes_and_loads_nothing(
    regrad_commands, monkeypatch
):
    picture = (ROOT / "docs" / "_static" / "recording.svg").read_text(encoding="utf-8")
    (command,) = re.findall("<desc>(.*)</desc>", picture)
    script = (ROOT / "docs" / "recording.py").read_text(encoding="utf-8")
    assert f'COMMAND = "{command}"' in script, "run python docs/recording.py"
    Commands(regrad_commands, monkeypatch).check(shlex.split(command))
    assert re.findall(r"href|url\(|<script", picture) == []
    assert len(picture) < 200_000


WRONG = {
    "regrad compare --sedes 3": "No such option",
    "regrad compare --corrections nope": "no correction named 'nope'",
    "regrad compare --corrections xgrad:speed=1": "has no option 'speed'",
    "regrad compare --epochs 0": "epochs must be greater than 0",
    "regrad compare --on slurm --slurm partion=gpu": "did you mean 'partition'?",
    "regrad plugins show nope": "",
    "regrad-bench --fast": "No such option",
    "uv run --all regrad compare": "'--all'",
    "uv sync --group nope": "no dependency group 'nope'",
    "uv run nox -s test": "no session",
    "python -m pip install ./plugins/nope": "no member",
    "pip install 'regrad-runner[nope]'": "no extra",
    "pytest plugins/nope": "no tests",
    "torchrun --nproc-per-node 2 -m regrad_runner train --process 2 --speed 3": "No such option",
    "sbatch docs/cluster/nope.sh OUT": "No such file",
    "e ← γ e": "no rule for 'e'",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items())
def test_a_command_that_is_wrong_is_found(line, message, regrad_commands, monkeypatch):
    (words,) = commands_in(line)
    with pytest.raises((AssertionError, ValueError, LookupError, TypeError, OSError)) as problem:
        Commands(regrad_commands, monkeypatch).check(words)
    assert message in str(problem.value)
