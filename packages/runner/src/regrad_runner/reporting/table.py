"""The result of a comparison: a table and a sentence per arm for people, JSON for programs."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regrad_runner.diagnostics.gradient_quality import QUALITY_MEASURES, Quality, mean_qualities
from regrad_runner.reporting.numbers import (
    difference_in_brackets,
    ratio_interval,
    short_number,
    short_target,
)
from regrad_runner.reporting.sentences import sentence
from regrad_runner.reporting.summaries import target_of, verdict_in_words
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.terminal import plain_table
from regrad_runner.workloads.workload import Measure

WIDEST_TABLE = 1000  # characters
WIDE_TERMINAL = 100  # characters, in which every cell has one line
LONGEST_ARM_NAME = 17  # what the other columns leave of 100 characters
NARROW_NAME = 14  # what they leave of 80
VERDICT_COLOURS = {
    "better": "green",
    "better than nothing": "yellow",
    "worse": "red",
    "inert": "red",
}
UNKNOWN = "–"


def print_comparison(console: Console, summaries: Sequence[ArmSummary], measure: Measure) -> None:
    """Print the table and under it one sentence per arm.

    Args:
        console: Where to print. If it is not a terminal, nothing is broken into lines.
        summaries: From `regrad_runner.statistics.verdicts.summarize`.
        measure: What was compared.
    """
    narrow = console.is_terminal and console.width < WIDE_TERMINAL
    _print_whole(console, comparison_table(summaries, measure, narrow=narrow))
    for summary in summaries:
        console.print(Text(sentence(summary, measure)), soft_wrap=not console.is_terminal)


def _print_whole(console: Console, table: Table) -> None:
    """Print a table and an empty line; outside a terminal as wide as the table wants to be."""
    width = console.width
    if not console.is_terminal:
        options = console.options.update_width(WIDEST_TABLE)
        console.width = max(width, console.measure(table, options=options).maximum)
    console.print(table, "", crop=False, sep="\n")
    console.width = width


def comparison_table(
    summaries: Sequence[ArmSummary], measure: Measure, *, narrow: bool = False
) -> Table:
    """Return the table: one row per arm, in the order given.

    Args:
        summaries: From `regrad_runner.statistics.verdicts.summarize`.
        measure: What was compared; where no target is known there is no column for the steps to
            it.
        narrow: Whether a cell may have several lines, for terminals of fewer than 100 characters.
            At 80 no number is broken.
    """
    rows = [_row(summary, measure, narrow=narrow) for summary in summaries]
    table = plain_table(_headings(summaries, measure), rows, ruled=True)
    longest_name = max((len(summary.arm) for summary in summaries), default=0)
    name, *numbers, _verdict = table.columns
    name.no_wrap = not narrow and longest_name <= LONGEST_ARM_NAME
    for column in numbers:
        column.no_wrap = not narrow
    if narrow:
        table.padding = (0, 0, 0, 0)
    return table


def print_qualities(console: Console, rows: Sequence[Quality]) -> None:
    """Print the means of the probes of gradient quality per arm, if there are any."""
    if not rows:
        return
    headings = (
        "arm",
        "probes",
        "cosine\nraw",
        "cosine\ncorrected",
        "norm ratio\nraw",
        "norm ratio\ncorrected",
    )
    cells = [_quality_row(mean) for mean in mean_qualities(rows)]
    title = (
        "\ngradients against that of a large batch at the same weights (a diagnostic: no verdict "
        "rests on it)"
    )
    console.print(title, highlight=False, soft_wrap=True)
    console.print(plain_table(headings, cells, ruled=True))


def to_json(summaries: Sequence[ArmSummary], measure: Measure, **more: Any) -> str:
    """Return the measure and every summary with its sentence as JSON; what is unknown is null.

    Args:
        summaries: From `regrad_runner.statistics.verdicts.summarize`.
        measure: What was compared.
        **more: What else the object holds, by key.

    Returns:
        An object with the keys `measure` and `arms`; an arm has the fields of `ArmSummary` and
        `sentence`.
    """
    arms = [asdict(summary) | {"sentence": sentence(summary, measure)} for summary in summaries]
    return json.dumps({"measure": asdict(measure), "arms": arms, **more}, indent=2, allow_nan=False)


def _headings(summaries: Sequence[ArmSummary], measure: Measure) -> list[str]:
    headings = ["arm", f"{measure.name}\nmean ± sd"]
    target = target_of(summaries)
    if target is not None:
        whose = "" if measure.fixed_target is not None else "baseline "
        headings.append(f"steps to\n{whose}{short_target(target, measure)}\n(misses)")
    direction = "" if measure.higher_is_better else f"\n{measure.direction}"
    headings += [
        f"difference\nfrom baseline\n95 % interval{direction}",
        "step\ntime",
        "effect\nin runs",
        "verdict",
    ]
    return headings


def _row(summary: ArmSummary, measure: Measure, *, narrow: bool) -> list[Text]:
    name = summary.arm
    difference = difference_in_brackets(summary, measure)
    steps = _steps(summary)
    if narrow:
        name = _in_lines(name, NARROW_NAME)
        difference = difference.replace(" [", "\n[")
        steps = steps.replace("not resolved", "not\nresolved")
    cells = [name, _mean(summary, measure)]
    if summary.target is not None:
        cells.append(steps)
    cells += [difference, _time(summary), _effect(summary)]
    verdict = Text(verdict_in_words(summary), style=VERDICT_COLOURS.get(summary.verdict, ""))
    return [*map(Text, cells), verdict]


def _in_lines(name: str, width: int) -> str:
    """Break an arm's name into lines, between its parts and options as far as that is enough."""
    lines = [""]
    for piece in re.split(r"(?<=[:,( ])(?=.)|(?=\+)", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in lines)


def _mean(summary: ArmSummary, measure: Measure) -> str:
    if summary.mean is None:
        return UNKNOWN
    mean = short_number(summary.mean, measure)
    if summary.sd is None:
        return mean
    return f"{mean} ± {short_number(summary.sd, measure)}"


def _steps(summary: ArmSummary) -> str:
    """Return the ratio to the baseline's steps, the misses, and below the interval."""
    if not summary.seeds:
        return UNKNOWN
    ratio = UNKNOWN if summary.steps_ratio is None else f"{summary.steps_ratio:.2f}×"
    if summary.verdict == "baseline":
        ratio = "1.00×"
    misses = f" ({summary.misses})" if summary.misses else ""
    return f"{ratio}{misses}\n{ratio_interval(summary.steps_interval)}".rstrip()


def _time(summary: ArmSummary) -> str:
    if summary.verdict == "baseline":
        return "1.00×"
    return UNKNOWN if summary.time_ratio is None else f"{summary.time_ratio:.2f}×"


def _effect(summary: ArmSummary) -> str:
    if summary.verdict in ("baseline", "control"):
        return ""
    return f"{summary.touched}/{summary.seeds}"


def _quality_row(mean: dict[str, Any]) -> list[str]:
    numbers = [mean[name] for name in QUALITY_MEASURES]
    shown = [UNKNOWN if number is None else f"{number:.3f}" for number in numbers]
    return [mean["arm"], str(mean["probes"]), *shown]
