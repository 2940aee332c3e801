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
        str | None, flag("Deliver what was logged for this server too.", None, metavar="URI")
    ] = None,
) -> int:
    """Deliver what tracking could not send while the server was down; mark killed runs."""
    with checking_input():
        from regrad_runner.tracking.sync import sync  # noqa: PLC0415

        done = sync(folder, tracking_uri)
        for line in done.in_words(folder):
            typer.echo(line)
    return int(not done.is_complete)
