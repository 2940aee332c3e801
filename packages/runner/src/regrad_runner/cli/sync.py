"""The command `regrad sync`. What is heavy is imported when it is used."""

from __future__ import annotations

from typing import Annotated

import typer

from regrad_runner.cli.flags import FolderArgument, flag
from regrad_runner.errors import checking_input

SYNC_EXAMPLES = ("regrad sync DIR",)


def sync_command(
    folder: FolderArgument,
    tracking_uri: Annotated[
        str | None, flag("Another MLflow server or database to show runs in.", None, metavar="URI")
    ] = None,
) -> int:
    """Send a folder's tracker what is missing there, as after the MLflow server was down."""
    with checking_input():
        from regrad_runner.reporting.verdict_numbers import verdict_numbers  # noqa: PLC0415
        from regrad_runner.results.sync import sync  # noqa: PLC0415

        done = sync(folder, tracking_uri, verdicts=verdict_numbers)
        for line in done.in_words(folder):
            typer.echo(line)
    return int(not done.is_complete)
