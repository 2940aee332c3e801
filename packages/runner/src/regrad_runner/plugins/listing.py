"""The list of installed plugins, from metadata and files: imports no torch, no plugin."""

from __future__ import annotations

import json
from dataclasses import asdict

import regrad
from regrad.registry import GROUPS

from regrad_runner.plugins.sources import line_of
from regrad_runner.terminal import Terminal, plain_table


def show_plugins(*, as_json: bool = False) -> None:
    """Print what is installed.

    Args:
        as_json: For programs; else a table for people.
    """
    entries = []
    for kind, group in GROUPS.items():
        entries += [(kind, entry) for entry in regrad.available(group).values()]
    console = Terminal(soft_wrap=as_json)
    if as_json:
        listed = [
            {"kind": kind, **asdict(entry), "about": line_of(entry.value)}
            for kind, entry in entries
        ]
        console.out(json.dumps(listed, indent=2), highlight=False)
        return
    rows = []
    for kind, entry in entries:
        source = f"{entry.distribution} {entry.version}".strip()
        about = line_of(entry.value) or entry.summary
        if entry.refused:
            about = f"refused: {entry.refused}"
        rows.append((kind, entry.name, source, about))
    console.print(plain_table(("kind", "name", "from", "what it is"), rows))
    if not any(kind == "correction" for kind, _ in entries):
        console.print("no correction is installed; for example: pip install regrad-xgrad")
