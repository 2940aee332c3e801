"""Write docs/reference.md: every command with its flags, every name with its options.

Usage: python docs/reference.py [--check]
With --check nothing is written, and a stale page is an error.
"""

import dataclasses
import inspect
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import regrad
import typer
from regrad_bench.command import app as bench
from regrad_runner.cli.app import app as runner
from regrad_runner.models.building import MODELS
from regrad_runner.workloads.loading import OF_DATA, OF_MODELS
from regrad_runner.workloads.text import MODEL, TextWorkload
from typer.main import get_command

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference.md"
HEAD = (
    "# Reference\n\nEvery command with its flags, and every name with its options. "
    "Written by `docs/reference.py` from the code; [The command](command.md) says the same in "
    "sentences.\n\n"
)


def cards() -> dict[str, str]:
    """Return the page of each plugin by the name of its distribution."""
    projects = {
        path.parent.name: path.read_text(encoding="utf-8")
        for path in ROOT.glob("plugins/*/pyproject.toml")
    }
    return {
        tomllib.loads(text)["project"]["name"]: f"methods/{name}.md"
        for name, text in projects.items()
    }


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    lines = [[*head], *([*row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it, with the words that lead there."""
    yield name, command
    for word, child in getattr(command, "commands", {}).items():
        yield from walk(f"{name} {word}", child)


def usage(parameter: Any) -> str:
    """Return what is typed for an argument or option."""
    value = (parameter.metavar or "").strip()
    if not parameter.opts[0].startswith("-"):
        return f"`{value if parameter.required else f'[{value}]'}`"
    return f"`{parameter.opts[0]} {value}`" if value else f"`{parameter.opts[0]}`"


def panel_of(parameter: Any) -> str:
    """Return the heading under which the help shows it."""
    return getattr(parameter, "rich_help_panel", None) or "Options and arguments"


def as_prose(text: str) -> str:
    """Return a help text as a line of a page: flags keep their two hyphens."""
    return re.sub(r"(?<!\S)(--[a-z-]+)", r"`\1`", " ".join(text.split()))


def meaning(parameter: Any) -> str:
    """Return the help text with the default that the help shows beside it."""
    default = parameter.default if parameter.show_default and parameter.default else ""
    return as_prose(parameter.help) + (f" `{default}` by default." if default else "")


def section(name: str, command: Any) -> str:
    """Return what one command is, takes and is called like."""
    context = typer.Context(command, info_name=name)
    parameters = [
        parameter for parameter in command.get_params(context) if parameter.name != "help"
    ]
    panels = {
        panel: [p for p in parameters if panel_of(p) == panel]
        for panel in map(panel_of, parameters)
    }
    tables = [
        table((panel, "meaning"), ([usage(p), meaning(p)] for p in members)) + "\n"
        for panel, members in panels.items()
    ]
    text = "\n\n".join(as_prose(part) for part in inspect.cleandoc(command.help).split("\n\n"))
    examples = "```bash\n" + "\n".join(command.epilog.split("\n\n")[1:]) + "\n```\n"
    return f"### `{name}`\n\n{text}\n\n" + "".join(tables) + examples


def commands() -> str:
    """Return every command of both programs."""
    programs = {"regrad": get_command(runner), "regrad-bench": get_command(bench)}
    sections = []
    for program_name, program in programs.items():
        sections += [section(name, command) for name, command in walk(program_name, program)]
    return "## Commands\n\n" + "\n".join(sections)


def options(kind: Any, *others: str) -> str:
    """Return the options of a correction, optimizer, workload or model with their defaults.

    Args:
        kind: What takes them.
        *others: Parameters that are no options.
    """
    if hasattr(kind, "Options"):
        found = [(field.name, field.default) for field in dataclasses.fields(kind.Options)]
    else:
        found = [
            (p.name, p.default)
            for p in inspect.signature(kind).parameters.values()
            if p.name not in others
        ]
    return ", ".join(f"`{name}={default!r}`" for name, default in found) or "none"


def of_correction(name: str) -> str:
    """Return a correction's options, or whose it has."""
    loaded = regrad.load(name)
    if isinstance(loaded, regrad.Composition):
        return "those of " + " and ".join(f"`{part}`, as `{part}.NAME`" for part in loaded.parts)
    return options(loaded)


def names() -> str:
    """Return what can be asked for by name: the members of this repository."""
    pages = cards()
    shipped = [entry for entry in regrad.available().values() if entry.distribution in pages]
    corrections = (
        [f"[`{e.name}`]({pages[e.distribution]})", of_correction(e.name)] for e in shipped
    )
    plugins = [
        entry
        for entry in regrad.available("regrad.optimizers").values()
        if entry.distribution in pages
    ]
    optimizers = (
        [
            f"[`{e.name}`]({pages[e.distribution]})",
            options(regrad.load(e.name, "regrad.optimizers"), "params"),
        ]
        for e in plugins
    )
    entries = regrad.available("regrad.workloads").values()
    names = [entry.name for entry in entries if entry.distribution == "regrad-runner"]
    workloads = (
        [f"[`{name}`](workloads.md)", options(regrad.load(name, "regrad.workloads"), *OF_DATA)]
        for name in names
    )
    models = [
        *([f"`{name}`", "none"] for name in MODELS),
        [f"`{MODEL}`", options(TextWorkload.build_model, "self", *OF_MODELS)],
    ]
    head = ("name", "options")
    return (
        f"## Corrections\n\n{table(head, corrections)}\n"
        f"## Optimizers\n\n{table(head, optimizers)}\n"
        "And torch's own, in lower case: `sgd:momentum=0.9`, `adamw`.\n\n"
        f"## Workloads\n\n{table(head, workloads)}\n## Models\n\n{table(head, models)}\n"
        f"`{MODEL}` is that of `text`; images have the others and the classifiers of torchvision.\n"
    )


def main(arguments: list[str]) -> int:
    """Write the page anew, or say that it should be."""
    new = HEAD + commands() + "\n" + names()
    if "--check" not in arguments:
        PAGE.write_text(new, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != new:
        sys.stderr.write("docs/reference.md is stale; run python docs/reference.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
