"""The commands `regrad plugins …`. What is heavy is imported when it is used."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from regrad.text import printable

from regrad_runner.cli import completion
from regrad_runner.cli.flags import UngroupedJson
from regrad_runner.cli.help import Plain, PlainGroup, examples
from regrad_runner.errors import checking_input

plugin_commands = typer.Typer(
    help="List, show, check and make plugins.",
    epilog=examples("regrad plugins list", "regrad plugins show xgrad"),
    cls=PlainGroup,
    no_args_is_help=True,
)


@plugin_commands.command(
    "list", cls=Plain, epilog=examples("regrad plugins list", "regrad plugins list --json")
)
def list_command(json: UngroupedJson = False) -> int:
    """List the corrections, optimizers and workloads that are installed."""
    from regrad_runner.plugins.listing import show_plugins  # noqa: PLC0415

    show_plugins(as_json=json)
    return 0


@plugin_commands.command("show", cls=Plain, epilog=examples("regrad plugins show xgrad"))
def show_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Its name in plugins list.",
            show_default=False,
            autocompletion=completion.plugins,
        ),
    ],
    json: UngroupedJson = False,
) -> int:
    """Show what a plugin does, its options, where it acts and what it must beat."""
    with checking_input():
        from regrad_runner.plugins.details import show_plugin  # noqa: PLC0415

        show_plugin(name, as_json=json)
    return 0


@plugin_commands.command(
    "check", cls=Plain, epilog=examples("regrad plugins check agc:max_ratio=0.02")
)
def check_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A correction or optimizer; options are allowed.",
            show_default=False,
            autocompletion=completion.plugins,
        ),
    ],
    suite: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with its suites, if not in its own tests."),
    ] = None,
    json: UngroupedJson = False,
) -> int:
    """Check, clause by clause, that an installed plugin keeps the contract of corrections."""
    from rich.markup import escape  # noqa: PLC0415

    from regrad_runner.plugins.check import run_check, show_check  # noqa: PLC0415
    from regrad_runner.terminal import Terminal  # noqa: PLC0415

    doing = f"checking {escape(name)}: about half a minute"
    with checking_input(), Terminal(stderr=True).status(doing):
        report = run_check(name, suite)
    return show_check(report, as_json=json)


@plugin_commands.command(
    "new",
    cls=Plain,
    epilog=examples(
        "regrad plugins new my-method",
        "regrad plugins new my-method --full",
        "regrad plugins new my-method --like adanorm",
    ),
)
def new_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of your method.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where to create its folder; here by default.",
            show_default=False,
        ),
    ] = Path(),
    like: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Plugin whose code to start from; an example by default.",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also write functions, more tests and a full card."),
    ] = False,
    author: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Author for the licence; git's user name by default."),
    ] = None,
) -> int:
    """Write a distribution with your own correction: an example that already passes the kit."""
    with checking_input():
        from regrad_runner.plugins.new import YOUR_NAME, new_plugin  # noqa: PLC0415

        folder = new_plugin(name, out, like, full=full, author=author)
        is_anonymous = YOUR_NAME in (folder / "LICENSE").read_text(encoding="utf-8")
    place = shlex.quote(printable(folder))
    sys.stdout.write(
        f"{printable(folder)} holds a correction {name!r} that works. Next:\n"
        f"  pip install --editable {place}\n"
        f"  regrad plugins check {name}\n"
        "  write the rule: first tests/reference.py, then the package in src\n"
        f"  grep -rn 'fill in' {place} for what only you know, such as the source\n"
        f"  pytest {place}\n"
        f"  regrad compare --corrections {name}\n"
    )
    if is_anonymous:
        sys.stdout.write(
            "LICENSE and pyproject.toml need your name: git knows none and --author was not "
            "given. Fill it in before you publish.\n"
        )
    return 0


@plugin_commands.command("doctor", cls=Plain, epilog=examples("regrad plugins doctor"))
def doctor_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Where runs are written; here by default.", show_default=False
        ),
    ] = Path(),
    gpu: Annotated[bool, typer.Option("--gpu", help="Expect a GPU.")] = False,
    json: UngroupedJson = False,
) -> int:
    """Find what is wrong with an installation and how to fix it; exit code 1 if anything is."""
    from regrad_runner.plugins.doctor import examine, show_findings  # noqa: PLC0415
    from regrad_runner.terminal import Terminal  # noqa: PLC0415

    with checking_input(), Terminal(stderr=True).status("importing every plugin"):
        if not folder.is_dir():
            raise ValueError(f"folder must be a folder, got '{folder}'")
        findings = examine(folder, gpu=gpu)
    return show_findings(findings, as_json=json)
