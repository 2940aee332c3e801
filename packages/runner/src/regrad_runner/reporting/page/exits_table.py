"""The table of models with several exits: their last exit, and budgets of multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

from regrad_runner.diagnostics.exits import ExitOutcome
from regrad_runner.reporting.figures.exits import outcomes_by_series
from regrad_runner.reporting.figures.scales import MINUS
from regrad_runner.reporting.page.content import NO_BREAK, NOTHING, PageTable, TableCell
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.statistics.paired import PairedDifference, paired_difference
from regrad_runner.statistics.rows import RunRow


def exits_table(data: ReportData) -> PageTable | None:
    """Return accuracy and cost of the last exit and of every budget; None without exits."""
    series = outcomes_by_series(data)
    rows = []
    for name, outcomes in series.items():
        for answer in _answers(outcomes):
            chosen = [row for row in outcomes if row.answer == answer]
            reference = [row for row in series.get(data.baseline or "", []) if row.answer == answer]
            is_baseline = name == data.baseline
            difference = None if is_baseline else _difference(data, chosen, reference)
            rows.append(
                [
                    TableCell(name, name),
                    TableCell(answer, answer),
                    _accuracy_cell([row.accuracy for row in chosen]),
                    _cost_cell([row.multiply_adds for row in chosen]),
                    _difference_cell(difference),
                ]
            )
    if not rows:
        return None
    columns = [
        "Arm",
        "Answer taken at",
        f"Test accuracy ±{NO_BREAK}sd",
        "Mean multiply-adds",
        f"Difference from the baseline [95{NO_BREAK}%{NO_BREAK}interval]",
    ]
    caption = (
        "The last exit and budgets: means over the runs that ended with a number; differences are "
        "paired by seed, with Student's t and without Holm"
    )
    return PageTable(caption, columns, rows, frozenset({0, 1}))


def _answers(outcomes: Sequence[ExitOutcome]) -> list[str]:
    """Return the last exit and the budgets, without the earlier exits."""
    answers = dict.fromkeys(row.answer for row in outcomes if not row.is_budget)
    budgets = dict.fromkeys(row.answer for row in outcomes if row.is_budget)
    return [*list(answers)[-1:], *budgets]


def _difference(
    data: ReportData, chosen: Sequence[ExitOutcome], reference: Sequence[ExitOutcome]
) -> PairedDifference | None:
    """Return the test of the accuracies of equal seeds."""
    ours = _runs(data, chosen)
    theirs = _runs(data, reference)
    return paired_difference([(ours[seed], theirs[seed]) for seed in ours if seed in theirs])


def _runs(data: ReportData, outcomes: Sequence[ExitOutcome]) -> dict[int, RunRow]:
    """Return the runs with an accuracy in place of the measure, by seed."""
    accuracies = {row.seed: row.accuracy for row in outcomes}
    arm = outcomes[0].arm if outcomes else None
    return {
        run.seed: replace(run, value=accuracies[run.seed])
        for run in data.usable_runs(arm)
        if run.seed in accuracies
    }


def _accuracy_cell(values: Sequence[float]) -> TableCell:
    mean = fmean(values)
    text = f"{mean:.4f}"
    if len(values) > 1:
        text = f"{text} ± {stdev(values):.4f}"
    return TableCell(text, mean)


def _cost_cell(values: Sequence[float]) -> TableCell:
    mean = fmean(values)
    return TableCell(f"{mean:,.0f}", mean)


def _difference_cell(found: PairedDifference | None) -> TableCell:
    if found is None or found.difference is None:
        return TableCell(NOTHING)
    text = f"{found.difference:+.4f}"
    if found.interval is not None:
        low, high = found.interval
        text = f"{text} [{low:+.4f}, {high:+.4f}]"
    return TableCell(text.replace("-", MINUS), found.difference)
