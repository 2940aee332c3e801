"""Results for people, for programs and for the page of the documentation."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regrad_bench.measure import HOST_ALONE, Result
from regrad_bench.peers import Finding

BEGIN = "<!-- results: written by regrad-bench --markdown -->"
END = "<!-- end of results -->"
SECTIONS = {
    "step": "The whole step",
    "alone": "The correction alone",
    "update": "A step that is corrected as a whole",
    "growth": "Growth",
    "start": "Start-up",
    "vit": "The whole step of a ViT-tiny",
    "gpt": "The whole step of a small GPT",
    "memory": "Peak memory of training",
    "activations": "Peak memory of one step of a small GPT",
    "together": "Several corrections at once",
    "processes": "Several processes",
}
HEADINGS = (
    "case",
    "ours",
    "against",
    "ours, ms",
    "peer, ms",
    "ratio",
    "quartiles",
    "memory",
    "goal",
    "",
)
NONE = "–"
FILE_WIDTH = 180
WRONG = 1e-6  # relative, in float64


def cells(result: Result) -> list[str]:
    """Return a result as the cells of its line, headings as in `HEADINGS`."""
    if result.ratio is None:
        return [
            result.name,
            result.ours,
            result.peer,
            *[NONE] * 5,
            _goal(result),
            f"not measured: {result.reason}",
        ]
    quartiles = f"{_ratio(result.low)} to {_ratio(result.high)}"
    times = [_milliseconds(result.ours_ms), _milliseconds(result.peer_ms)]
    memory = NONE if result.memory_ratio is None else _ratio(result.memory_ratio)
    told = "" if result.verdict == "no goal" else result.verdict
    return [
        result.name,
        result.ours,
        result.peer,
        *times,
        _ratio(result.ratio),
        quartiles,
        memory,
        _goal(result),
        told,
    ]


def table(results: Sequence[Result]) -> Table:
    """Return the results of one device as a table for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        shown.add_column(
            heading, justify="right" if heading in HEADINGS[3:8] else "left", overflow="fold"
        )
    section = ""
    for result in results:
        if section not in ("", result.name.partition("/")[0]):
            shown.add_section()
        section = result.name.partition("/")[0]
        style = {"missed": "red", "met": "green", "not measured": "dim"}.get(result.verdict)
        shown.add_row(*cells(result), style=style)
    return shown


def show(results: Sequence[Result], found: Sequence[Finding], about: Mapping[str, str]) -> None:
    """Print everything for people."""
    console = Console()
    console = console if console.is_terminal else Console(width=FILE_WIDTH)
    for name, text in about.items():
        console.print(Text(f"{name}: {text}"))
    for device in dict.fromkeys(result.device for result in results):
        of_device = [result for result in results if result.device == device]
        if (why := why_nothing(of_device)) is not None:
            console.print(Text(f"\non {device}: not measured: {why}"))
        else:
            console.print(Text(f"\non {device}"), table(of_device))
    wrong = [f for f in found if f.peer_error > WRONG]
    console.print(
        *(Text(f"{f.peer}: {f.what} is {f.peer_error:.2g} off: {f.why}") for f in wrong), sep="\n"
    )


def to_json(results: Sequence[Result], found: Sequence[Finding], about: Mapping[str, str]) -> str:
    """Return everything as JSON; what was not measured is null."""
    rows = [asdict(result) | {"verdict": result.verdict} for result in results]
    return json.dumps(
        {"about": dict(about), "results": rows, "peers": [asdict(f) for f in found]}, indent=2
    )


def to_csv(results: Sequence[Result]) -> str:
    """Return one line per result, with a heading."""
    text = StringIO()
    columns = [*(field.name for field in fields(Result)), "verdict"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) | {"verdict": result.verdict} for result in results)
    return text.getvalue()


def to_markdown(
    results: Sequence[Result], found: Sequence[Finding], about: Mapping[str, str]
) -> str:
    """Return the generated part of the page: machine, tables, goals, what peers got wrong."""
    lines = [f"- {name}: {text}" for name, text in about.items()]
    for device in dict.fromkeys(result.device for result in results):
        of_device = [result for result in results if result.device == device]
        name = "the CPU" if device == "cpu" else f"a GPU ({device.upper()})"
        lines += ["", f"## On {name}", "", *_summary(of_device)]
        if any(result.ratio is not None for result in of_device):
            for section in SECTIONS:
                lines += _section(section, of_device)
    lines += ["", "## Where peers compute something else", ""]
    lines += _markdown_table(_FOUND, map(_found, found))
    return "\n".join(lines) + "\n"


def why_nothing(results: Sequence[Result]) -> str | None:
    """Return why none of these was measured, or None if one was."""
    if any(result.reason is None for result in results):
        return None
    reasons = dict.fromkeys(result.reason for result in results)
    return next((reason for reason in reasons if reason != HOST_ALONE), HOST_ALONE)


def write_between_marks(path: Path, text: str) -> None:
    """Replace the text between the marks of a page.

    Raises:
        ValueError: If the page does not have both marks, in order.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(
            f"markdown must name a page with the marks {BEGIN!r} and {END!r}, got {str(path)!r}"
        )
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def _summary(results: Sequence[Result]) -> list[str]:
    """Return which goals were met and missed, in a list."""
    if (why := why_nothing(results)) is not None:
        return [f"Not measured: {why}."]
    lines = []
    with_goal = [result for result in results if result.goal is not None]
    for verdict in ("met", "missed"):
        names = [f"`{result.name}`" for result in with_goal if result.verdict == verdict]
        lines.append(f"- Goals {verdict}: {', '.join(names) or 'none'}.")
    return lines


def _section(section: str, results: Sequence[Result]) -> list[str]:
    rows = [result for result in results if result.name.partition("/")[0] == section]
    if not rows:
        return []
    on_device = any(result.ours_launches is not None for result in rows)
    compared = any(result.difference is not None for result in rows)
    headings = [*HEADINGS]
    lines = [cells(result) for result in rows]
    if compared:
        headings.append("difference")
        lines = [[*line, _difference(r)] for line, r in zip(lines, rows, strict=True)]
    if on_device:
        headings.append("launches")
        lines = [[*line, _launches(r)] for line, r in zip(lines, rows, strict=True)]
    return ["", f"### {SECTIONS[section]}", "", *_markdown_table(headings, lines)]


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


_FOUND = ("peer", "what", "its error", "our error", "why")


def _found(finding: Finding) -> list[str]:
    return [
        finding.peer,
        finding.what,
        f"{finding.peer_error:.2g}",
        f"{finding.our_error:.1g}",
        finding.why,
    ]


def _ratio(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _goal(result: Result) -> str:
    if result.goal is None:
        return NONE
    if result.goal_ms is None:
        return f"≤ {result.goal:g}"
    return f"≤ {result.goal:g} and {result.goal_ms:g} ms"


def _difference(result: Result) -> str:
    return NONE if result.difference is None else f"{result.difference:.1g}"


def _launches(result: Result) -> str:
    if result.ours_launches is None:
        return NONE
    return f"{result.ours_launches} / {result.peer_launches}"
