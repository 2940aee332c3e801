"""Nothing that exists is missing from the pages: the lists come from the code, never from here."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import regrad

ROOT = Path(__file__).parent.parent
GROUPS = ("regrad", "regrad.optimizers", "regrad.workloads")
NAMED = [(group, name) for group in GROUPS for name in regrad.available(group)]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def card_of(distribution: str) -> str:
    """The text of the card of the plugin that this distribution is."""
    return page(f"plugins/{distribution.removeprefix('regrad-')}/README.md")


def commands(app) -> dict[str, list[str]]:
    """The options of every command that does something, by its words."""
    command = importlib.import_module("typer.main").get_command(app)
    waiting, found = [("", command)], {}
    while waiting:
        words, command = waiting.pop()
        children = getattr(command, "commands", {})
        waiting += [(f"{words} {name}", child) for name, child in children.items()]
        found[words] = [p.opts[0] for p in command.params if p.opts[0].startswith("--")]
    return found


def test_every_hook_is_in_the_table_of_concepts():
    from regrad.hookspecs import HOOKS

    assert [hook for hook in HOOKS if f"| `{hook}(" not in page("docs/concepts.md")] == []


def test_one_training_step_shows_every_hook_in_time_order():
    from regrad.hookspecs import HOOKS

    (step,) = re.findall(
        r"```text\n(attachment = .*?)```", page("docs/concepts.md"), flags=re.DOTALL
    )
    assert re.findall(r"─▶ (\w+)\(", step) == list(HOOKS)


def test_every_command_and_option_is_in_the_page_of_the_command_and_in_the_reference():
    from regrad_runner.cli.app import app

    for words, options in commands(app).items():
        reference = (
            page("docs/reference.md")
            .partition(f"\n### `regrad{words}`\n")[2]
            .partition("\n### ")[0]
        )
        assert reference, f"docs/reference.md has no `regrad{words}`; run python docs/reference.py"
        for option in options:
            where = f"of `regrad{words}`; write it there"
            assert f"| `{option}" in reference, f"docs/reference.md lacks `{option}` {where}"
            assert re.search(f"`(regrad )?{option}[` ]", page("docs/command.md")), (
                f"docs/command.md lacks `{option}` {where}"
            )
        if words not in {"", " plugins"}:
            assert f"`regrad{words}" in page("docs/command.md"), (
                f"docs/command.md lacks `regrad{words}`"
            )


def test_every_option_of_the_benchmark_is_in_its_readme_and_in_the_reference():
    from regrad_bench.command import app

    for option in commands(app)[""]:
        assert f"`{option}" in page("packages/bench/README.md")
        assert f"| `{option}" in page("docs/reference.md").partition("### `regrad-bench`")[2]


@pytest.mark.parametrize(("group", "name"), NAMED, ids=lambda value: value)
def test_every_correction_optimizer_and_workload_is_in_the_documentation(group, name):
    entry = regrad.available(group)[name]
    assert f"`{name}`" in page("docs/reference.md")
    if group == "regrad.workloads":
        assert f"`{name}`" in page("docs/workloads.md"), f"docs/workloads.md lacks `{name}`"
    else:
        assert f"`{name}`" in card_of(entry.distribution)


@pytest.mark.parametrize(
    ("group", "name"), [n for n in NAMED if n[0] != "regrad.workloads"], ids=lambda value: value
)
def test_every_option_of_a_correction_or_optimizer_is_in_its_card_and_in_the_reference(group, name):
    loaded = regrad.load(name, group)
    if isinstance(loaded, regrad.Composition):
        parts = set(loaded.parts)
        assert [
            part
            for part in parts
            if f"`{part}." not in card_of(regrad.available(group)[name].distribution)
        ] == []
        return
    if group == "regrad":
        options = [field.name for field in dataclasses.fields(loaded.Options)]
    else:
        options = list(inspect.signature(loaded).parameters)[1:]
    card = card_of(regrad.available(group)[name].distribution)
    (line,) = re.findall(rf"^\| \[`{name}`\].*$", page("docs/reference.md"), flags=re.MULTILINE)
    for option in options:
        assert f"`{option}`" in card, f"the card of {name} lacks `{option}`"
        assert f"`{option}=" in line, (
            f"docs/reference.md lacks `{option}` of {name}; run python docs/reference.py"
        )


def test_every_model_is_in_the_documentation():
    from regrad_runner.models.building import MODELS

    assert [name for name in MODELS if f"`{name}`" not in page("docs/reference.md")] == []


def test_every_session_is_in_the_contributors_page():
    tree = ast.parse(page("noxfile.py"))
    sessions = [
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) if node.decorator_list
    ]
    assert len(sessions) > 5
    table = [
        line.split("|")[1]
        for line in page("CONTRIBUTING.md").splitlines()
        if line.startswith("| `")
    ]
    assert [name for name in sessions if not re.search(rf"`{name}[`(]", "".join(table))] == []


def test_every_variable_that_the_registry_reads_is_in_the_documentation():
    from regrad import registry

    for variable in (registry.ALLOWED, registry.DISABLED):
        assert f"`{variable}=" in page("docs/authors.md")


def test_every_page_is_in_a_table_of_contents():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    listed = re.findall(
        r"^[\w/]+$", page("docs/index.md").partition("{toctree}")[2], flags=re.MULTILINE
    )
    assert pages == {name for name in listed if "/" not in name}
