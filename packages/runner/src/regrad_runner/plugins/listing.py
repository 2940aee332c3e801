"""The list of installed plugins, from metadata and files: imports no torch, no plugin.

It draws its table itself: rich takes as long to import as everything else here takes.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import regrad
from regrad.registry import GROUPS, Entry
from regrad.text import printable

from regrad_runner.plugins.sources import line_of

HEADINGS = ("kind", "name", "from", "what it is")
BETWEEN_COLUMNS = "  "
NARROWEST = 20  # columns of the screen for the last column of the table


def show_plugins(*, as_json: bool = False) -> None:
    """Print what is installed.

    Args:
        as_json: For programs; else a table for people. A terminal gets lines of its width, a file
            or another program one line per plugin.
    """
    entries: list[tuple[str, Entry]] = []
    for kind, group in GROUPS.items():
        entries += [(kind, entry) for entry in regrad.available(group).values()]
    if as_json:
        import json  # noqa: PLC0415 - a table needs none

        listed = [
            {"kind": kind, **asdict(entry), "about": line_of(entry.value)}
            for kind, entry in entries
        ]
        sys.stdout.write(f"{json.dumps(listed, indent=2)}\n")
        return
    rows = [HEADINGS, *(_row(kind, entry) for kind, entry in entries)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table_lines(rows, width=width):
        sys.stdout.write(f"{line}\n")
    if not any(kind == "correction" for kind, _ in entries):
        sys.stdout.write("no correction is installed; for example: pip install regrad-xgrad\n")


def _row(kind: str, entry: Entry) -> tuple[str, str, str, str]:
    """Return what the table says of a plugin, fit to be shown."""
    source = f"{entry.distribution} {entry.version}".strip()
    about = line_of(entry.value) or entry.summary
    if entry.refused:
        about = f"refused: {entry.refused}"
    return kind, printable(entry.name), printable(source), printable(about)


def table_lines(rows: Sequence[Sequence[str]], *, width: int | None) -> Iterator[str]:
    """Yield the lines of a table with aligned columns.

    Args:
        rows: Cells of each row, its headings first.
        width: Columns of the screen, to which the last cell is wrapped; None to wrap nothing.

    Example:
        >>> for line in table_lines([("name", "what"), ("agc", "clips gradients")], width=26):
        ...     print(line)
        name  what
        agc   clips gradients
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = sum(widths[:-1]) + len(BETWEEN_COLUMNS) * (len(widths) - 1)
    for *cells, last in rows:
        padded = [cell.ljust(size) for cell, size in zip(cells, widths[:-1], strict=True)]
        beginning = BETWEEN_COLUMNS.join([*padded, ""])
        if width is None:
            yield f"{beginning}{last}".rstrip()
            continue
        parts = textwrap.wrap(last, max(NARROWEST, width - indent)) or [""]
        yield f"{beginning}{parts[0]}".rstrip()
        for part in parts[1:]:
            yield f"{'':{indent}}{part}"
