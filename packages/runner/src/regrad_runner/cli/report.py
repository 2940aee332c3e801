"""The command `regrad report`. What is heavy is imported when it is used."""

from __future__ import annotations

from regrad_runner.cli.flags import FolderArgument, UngroupedJson
from regrad_runner.errors import checking_input

REPORT_EXAMPLES = ("regrad report DIR", "regrad report DIR --json")


def report_command(folder: FolderArgument, json: UngroupedJson = False) -> int:
    """Show a comparison or run again and redraw its figures, without training."""
    with checking_input():
        from regrad_runner.reporting.report import show  # noqa: PLC0415

        show(folder, as_json=json)
    return 0
