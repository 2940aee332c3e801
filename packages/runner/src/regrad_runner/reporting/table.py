"""The result of a comparison in words: a table and a sentence per arm for people, JSON for programs."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regrad_runner.statistics.paired import PairedDifference
from regrad_runner.statistics.verdicts import FEWEST_SEEDS, ArmSummary
from regrad_runner.workloads.workload import Measure

WIDEST = 1000
WIDTH = 100
LONGEST_NAME = 20  # what the other columns leave of 100 characters
NARROW_NAME = 14  # what they leave of 80
COLOURS = {"better": "green", "better than nothing": "yellow", "worse": "red", "inert": "red"}


def print_comparison(console: Console, summaries: Sequence[ArmSummary], measure: Measure) -> None:
    """Print the table and under it one sentence per arm.

    Args:
        console: Where to. Where that is no terminal, nothing is broken into lines.
        summaries: From `regrad_runner.statistics.verdicts.summarize`.
        measure: What was compared.
    """
    narrow = console.is_terminal and console.width < WIDTH
    table = comparison_table(summaries, measure, narrow=narrow)
    width = console.width
    if not console.is_terminal:
        console.width = max(
            width, console.measure(table, options=console.options.update_width(WIDEST)).maximum
        )
    console.print(table, "", crop=False, sep="\n")
    console.width = width
    for summary in summaries:
        text = Text(sentence(summary, measure, baseline=_baseline(summaries)))
        console.print(text, soft_wrap=not console.is_terminal)


def comparison_table(
    summaries: Sequence[ArmSummary], measure: Measure, *, narrow: bool = False
) -> Table:
    """Return the table: one row per arm, in the order given.

    Args:
        summaries: From `regrad_runner.statistics.verdicts.summarize`.
        measure: What was compared; without a target there is no column for the steps to it.
        narrow: Whether a cell may have several lines, for fewer than 100 characters; 80 break no number.
    """
    padding = (0, 0 if narrow else 1, 0, 0)
    table = Table(
        box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False, header_style="bold"
    )
    longest = max((len(summary.arm) for summary in summaries), default=0)
    table.add_column("arm", overflow="fold", no_wrap=not narrow and longest <= LONGEST_NAME)
    table.add_column(f"{measure.name}\nmean ± sd", overflow="fold", no_wrap=not narrow)
    if measure.target is not None:
        table.add_column(
            f"steps to\n{_short(f'{measure.target:g}')}\n(misses)",
            overflow="fold",
            no_wrap=not narrow,
        )
    difference = "difference" if narrow else f"difference to {_baseline(summaries)}"
    direction = "" if measure.higher_is_better else f"\n{measure.direction}"
    table.add_column(f"{difference}\n95 % interval{direction}", overflow="fold", no_wrap=not narrow)
    table.add_column("step\ntime", overflow="fold", no_wrap=not narrow)
    table.add_column("effect\nin runs", overflow="fold", no_wrap=not narrow)
    table.add_column("verdict", overflow="fold")
    for summary in summaries:
        cells = [
            summary.arm,
            _mean(summary, measure),
            _difference(summary, measure),
            _time(summary),
            _effect(summary),
        ]
        if narrow:
            cells[0], cells[2] = _in_lines(summary.arm, NARROW_NAME), cells[2].replace(" [", "\n[")
        if measure.target is not None:
            cells.insert(2, _steps(summary))
        verdict = Text(summary.verdict, style=COLOURS.get(summary.verdict, ""))
        table.add_row(*map(Text, cells), verdict)
    return table


def sentence(summary: ArmSummary, measure: Measure, *, baseline: str = "none") -> str:
    """Say in one line what became of an arm, and why its verdict is what it is.

    Args:
        summary: The arm.
        measure: What was compared.
        baseline: Name of the arm that it was compared with.

    Example:
        >>> few = ArmSummary(arm="xgrad", seeds=3, failed=0, mean=0.98, sd=0.01, verdict="too few seeds", pairs=3)
        >>> sentence(few, Measure())
        'xgrad: 3 seeds in common with none cannot decide; 6 are the fewest that can.'
    """
    text = _why(summary, measure, baseline)
    if summary.verdict not in ("baseline", "inert", "too few seeds") and measure.target is not None:
        text += _pace(summary, measure, baseline)
    if summary.failed:
        text += f"; {_count(summary.failed, 'run')} failed and {'is' if summary.failed == 1 else 'are'} left out"
    if summary.diverged:
        text += f"; {_count(summary.diverged, 'run')} diverged, worse than any number"
    return f"{summary.arm}: {text}."


def to_json(summaries: Sequence[ArmSummary], measure: Measure, **more: Any) -> str:
    """Return the measure and every summary with its sentence as JSON; what is unknown is null.

    Args:
        summaries: From `regrad_runner.statistics.verdicts.summarize`.
        measure: What was compared.
        **more: What else the object shall hold, by key.

    Returns:
        An object with the keys `measure` and `arms`; an arm has the fields of `ArmSummary` and `sentence`.
    """
    baseline = _baseline(summaries)
    arms = [
        asdict(summary) | {"sentence": sentence(summary, measure, baseline=baseline)}
        for summary in summaries
    ]
    return json.dumps({"measure": asdict(measure), "arms": arms, **more}, indent=2, allow_nan=False)


def _baseline(summaries: Sequence[ArmSummary]) -> str:
    return next((summary.arm for summary in summaries if summary.verdict == "baseline"), "none")


def _in_lines(name: str, width: int) -> str:
    """Break an arm's name into lines of at most `width`, where its parts and options meet if that is enough."""
    lines = [""]
    for piece in re.split(r"(?<=[:,( ])(?=.)|(?=\+)", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(part for line in lines for part in textwrap.wrap(line, width))


def _mean(summary: ArmSummary, measure: Measure) -> str:
    if summary.mean is None:
        return "–"
    mean, spread = short_number(summary.mean, measure), summary.sd
    return mean if spread is None else f"{mean} ± {short_number(spread, measure)}"


def _steps(summary: ArmSummary) -> str:
    if not summary.seeds:
        return "–"
    median = "–" if summary.steps_to_target is None else f"{summary.steps_to_target:g}"
    return median + (f" ({summary.misses})" if summary.misses else "")


def _difference(summary: ArmSummary | PairedDifference, measure: Measure) -> str:
    if summary.difference is None:
        return ""
    difference, *ends = (
        short_number(v, measure, sign="+") for v in (summary.difference, *(summary.interval or ()))
    )
    return f"{difference} [{', '.join(ends)}]" if ends else difference


def _time(summary: ArmSummary) -> str:
    if summary.verdict == "baseline":
        return "1.00×"
    return "–" if summary.time_ratio is None else f"{summary.time_ratio:.2f}×"


def _effect(summary: ArmSummary) -> str:
    return (
        "" if summary.verdict in ("baseline", "control") else f"{summary.touched}/{summary.seeds}"
    )


def _why(summary: ArmSummary, measure: Measure, baseline: str) -> str:
    pairs = _count(summary.pairs, "seed")
    if summary.verdict == "baseline":
        return f"the baseline, {_count(summary.seeds, 'seed')}{_hits(summary, measure)}"
    if summary.verdict == "inert":
        return f"changed nothing in {_count(summary.seeds, 'run')}; it is {baseline} under another name"
    if summary.verdict == "control":
        return f"a control; difference to {baseline} {_difference(summary, measure) or 'unknown'}"
    if summary.verdict == "too few seeds":
        return f"{pairs} in common with {baseline} cannot decide; {FEWEST_SEEDS} are the fewest that can"
    found = _difference(summary, measure) or "no seed with two numbers"
    how = (
        f", by ranks: in {summary.diverged_pairs} one run diverged"
        if summary.diverged_pairs
        else ""
    )
    evidence = f"({found}, {probability(summary.p_adjusted)} after Holm, {pairs}{how})"
    return _in_words(summary, measure, f"{baseline} {evidence}")


def _in_words(summary: ArmSummary, measure: Measure, baseline: str) -> str:
    if summary.verdict == "no evidence":
        return f"no evidence of a difference to {baseline}"
    if summary.verdict == "worse":
        return f"worse than {baseline}"
    return f"better than {baseline}{_against_control(summary, measure)}"


def _against_control(summary: ArmSummary, measure: Measure) -> str:
    test = summary.against_control
    if test is None:
        if summary.verdict == "better":
            return "; there is no control that it must beat"
        return (
            f", but its control {summary.control} was not run"
            if summary.control
            else ", but no control was run"
        )
    beaten = " and than" if summary.verdict == "better" else ", but not shown to be better than"
    p_value = f"{probability(test.p_value)} before Holm"
    return f"{beaten} its control {summary.control} ({_difference(test, measure)}, {p_value})"


def _pace(summary: ArmSummary, measure: Measure, baseline: str) -> str:
    if summary.steps_ratio is None or measure.target is None:
        return _hits(summary, measure)
    ratio = f"{summary.steps_ratio:.2f} times the steps of {baseline} to {_short(f'{measure.target:g}')}"
    return f"; {ratio} ({probability(summary.steps_p)}, not adjusted)"


def _hits(summary: ArmSummary, measure: Measure) -> str:
    if measure.target is None:
        return ""
    return f"; {summary.seeds - summary.misses} of {summary.seeds} runs reached {_short(f'{measure.target:g}')}"


def short_number(value: float, measure: Measure, *, sign: str = "-") -> str:
    """Return a number with the measure's decimals, without a zero before the point.

    Example:
        >>> short_number(0.98765, Measure(), sign="+"), short_number(-0.5, Measure(decimals=2))
        ('+.9877', '-.50')
    """
    return _short(f"{value:{sign}.{measure.decimals}f}")


def _short(number: str) -> str:
    """Leave out the zero before the point, which is always there in a share."""
    return re.sub(r"^([+-]?)0\.", r"\1.", number)


def probability(p_value: float | None) -> str:
    """Return a p-value in words.

    Example:
        >>> probability(0.03125), probability(1e-5)
        ('p = .031', 'p < .001')
    """
    if p_value is None:
        return "p unknown"
    return "p < .001" if p_value < 0.001 else f"p = {_short(f'{p_value:.3f}')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
