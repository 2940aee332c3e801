"""`regrad plugins check`: run the conformance kit in its own process and show what it proved."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from regrad.text import printable
from rich.table import Table
from rich.text import Text

from regrad_runner.terminal import Terminal, plain_table

KIT = "regrad_testing"
START = (  # pytest and torch end with the first distribution that they cannot read
    "from regrad.distributions import hide_broken; hide_broken(); import sys; "
    f"from {KIT}.__main__ import main; sys.exit(main(*sys.argv[1:]))"
)
MISSING = "regrad-testing must be installed to check a plugin; pip install 'regrad-runner[check]'"
OUTCOMES = {"proved": "proved", "skipped": "skipped because", "failed": "FAILED"}
OUTCOME_STYLES = {"proved": "", "skipped": "dim", "failed": "bold red"}


def run_check(spec: str, suite: Path | None) -> dict[str, Any]:
    """Return the kit's report on an installed correction or optimizer.

    Args:
        spec: Its name, with options or without.
        suite: A file with suites to use instead of its own.

    Raises:
        ValueError: If the kit is not installed, or finds nothing to check.
    """
    if importlib.util.find_spec(KIT) is None:
        raise ValueError(MISSING)
    if suite is not None and not suite.is_file():
        raise ValueError(f"suite must be a file, got '{suite}'")
    command = [sys.executable, "-c", START, spec]
    if suite is not None:
        command.append(str(suite))
    done = subprocess.run(  # noqa: S603 - our own module
        command, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout.startswith("{"):
        raise ValueError(
            done.stderr.strip() or f"the check of {spec!r} ended with exit code {done.returncode}"
        )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def show_check(report: dict[str, Any], *, as_json: bool) -> int:
    """Print a report; return 1 if a clause failed.

    Args:
        report: As `run_check` returned it.
        as_json: For programs; else a table for people, followed by the details of failures.
    """
    rows = report["clauses"]
    console = Terminal(soft_wrap=as_json)
    failed = [row for row in rows if row["outcome"] == "failed"]
    if as_json:
        console.out(json.dumps(report, indent=2), highlight=False)
        return int(bool(failed))
    suites = sorted({row["suite"] for row in rows})
    console.print(_clause_table(rows, with_suite=len(suites) > 1))
    for row in failed:
        console.print(
            f"\n{row['suite']}, {row['clause']}: {row['proves']}\n{row['details']}", markup=False
        )
    console.print(_summary(report, len(failed)), markup=False, highlight=False, soft_wrap=True)
    return int(bool(failed))


def _clause_table(rows: list[dict[str, Any]], *, with_suite: bool) -> Table:
    """Return a row per clause; a reason may have several lines."""
    headings = ["clause", "", "what"]
    if with_suite:
        headings.insert(0, "suite")
    cells = []
    for row in rows:
        shown = [row["clause"], OUTCOMES[row["outcome"]], row["reason"] or row["proves"]]
        if with_suite:
            shown.insert(0, row["suite"])
        style = OUTCOME_STYLES[row["outcome"]]
        cells.append([Text(printable(text, keep="\n"), style=style) for text in shown])
    return plain_table(headings, cells)


def _summary(report: dict[str, Any], failed: int) -> str:
    rows = report["clauses"]
    if report["suite"] == "generic":
        against = "the kit's generic suite, without a reference"
    else:
        against = f"the suite in {report['suite']}"
    proved = sum(row["outcome"] == "proved" for row in rows)
    skipped = len(rows) - proved - failed
    checked = f"{report['name']} ({report['distribution']} {report['version']})"
    return f"{checked}, {against}: {proved} proved, {skipped} skipped, {failed} failed"
