"""The flags that several commands share and that are not settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_runner.settings.flag import HOW_IT_IS_TRAINED, WHERE_IT_GOES

JSON_MEANING = "Print JSON for programs instead of a table."
NO_VALUE = " "  # what the help shows in place of the type of a flag that takes none


def flag(
    meaning: str,
    group: str | None,
    *names: str,
    metavar: str | None = None,
    completion: Callable[[str], list[str]] | None = None,
) -> Any:
    """Return an option whose default is not shown separately: `meaning` names it.

    Args:
        meaning: A sentence.
        group: Heading under which the help lists it; None for the general one.
        *names: How it is typed; derived from the parameter's name by default.
        metavar: What stands for its value.
        completion: Returns completions for half a word.
    """
    return typer.Option(
        *names,
        help=meaning,
        rich_help_panel=group,
        metavar=metavar,
        show_default=False,
        autocompletion=completion,
    )


def switch(meaning: str, group: str | None, name: str) -> Any:
    """Return an option that takes no value, typed as `name`."""
    return flag(meaning, group, name, metavar=NO_VALUE)


ConfigFile = Annotated[
    Path | None,
    flag("YAML file with these settings; flags override it.", WHERE_IT_GOES, metavar="FILE"),
]
Out = Annotated[
    Path | None,
    flag("Folder to write to; a new one here by default.", WHERE_IT_GOES, metavar="DIR"),
]
On = Annotated[
    str | None,
    flag(
        "Where runs take place: here (the default), local (each a job) or slurm.",
        HOW_IT_IS_TRAINED,
        metavar="PLACE",
    ),
]
Slurm = Annotated[
    str | None,
    flag(
        "What to ask SLURM for, such as partition=gpu,time=04:00:00.",
        HOW_IT_IS_TRAINED,
        metavar="NAME=X,...",
    ),
]
Json = Annotated[bool, switch(JSON_MEANING, WHERE_IT_GOES, "--json")]
UngroupedJson = Annotated[bool, switch(JSON_MEANING, None, "--json")]
FolderArgument = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder that compare or train wrote.", show_default=False),
]
