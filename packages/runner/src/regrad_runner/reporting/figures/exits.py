"""The figures of models with several exits: accuracy against multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from regrad_runner.diagnostics.exits import AS_PREDICTED, ExitOutcome
from regrad_runner.reporting.figures.curves import over_seeds
from regrad_runner.reporting.figures.marks import Drawing, marks_of_bands, styles_of
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.reporting.styles import DASHES, Style
from regrad_runner.statistics.bands import bands

MILLION = 1e6
EXITS = "Answers of all images taken at one exit."
BUDGETS = (
    "An image leaves at the first exit that is sure enough of it; thresholds are chosen on the "
    "validation images, so that exit by exit .25, .5, 1, 2 or 4 times as many leave."
)


def exit_curves(data: ReportData) -> list[Drawing]:
    """Return test accuracy against multiply-adds, of every exit and of budgets, if there are any.

    A line per arm, and one more for the running sums of its outputs where they answer otherwise.
    """
    series = outcomes_by_series(data)
    exits = {name: [row for row in rows if not row.is_budget] for name, rows in series.items()}
    budgets = {name: [row for row in rows if row.is_budget] for name, rows in series.items()}
    return [
        *_curve(data, budgets, name="budgets", title="Accuracy for a budget", caption=BUDGETS),
        *_curve(data, exits, name="exits", title="Accuracy of every exit", caption=EXITS),
    ]


def outcomes_by_series(data: ReportData) -> dict[str, list[ExitOutcome]]:
    """Return what exits were worth, as an arm predicts and, if they differ, by running sums."""
    found: dict[str, list[ExitOutcome]] = {}
    for arm in data.styles:
        rows = [row for row in data.exits if row.arm == arm]
        predicted = [row for row in rows if row.judged == AS_PREDICTED]
        summed = [row for row in rows if row.judged != AS_PREDICTED]
        if predicted:
            found[arm] = predicted
        if _accuracies(summed) != _accuracies(predicted):
            found[summed_name(arm)] = summed
    return found


def summed_name(arm: str) -> str:
    """Return what the running sums of an arm's outputs are called.

    Example:
        >>> summed_name("baseline")
        'baseline, running sums'
    """
    return f"{arm}, running sums"


def _accuracies(rows: Sequence[ExitOutcome]) -> list[float]:
    return [row.accuracy for row in rows]


def _curve(
    data: ReportData,
    series: Mapping[str, Sequence[ExitOutcome]],
    *,
    name: str,
    title: str,
    caption: str,
) -> list[Drawing]:
    """Return a figure whose curves have a point per exit or budget, in the order of their costs."""
    numbers: dict[str, int] = {}
    values: list[tuple[str, int, float]] = []
    for arm, rows in series.items():
        for row in rows:
            number = numbers.setdefault(row.answer, len(numbers))
            values.append((arm, number, row.accuracy))
    places = {arm: _mean_costs(rows, numbers) for arm, rows in series.items()}
    marks = marks_of_bands(name, bands(values), places)
    if not marks:
        return []
    drawing = Drawing(
        name=name,
        kind="curves",
        title=title,
        caption=f"{caption} {over_seeds(data)}",
        x_label="mean multiply-adds of an image, millions",
        y_label="test accuracy",
        marks=marks,
        styles=styles_of(_styles(data.styles), marks),
    )
    return [drawing]


def _mean_costs(rows: Sequence[ExitOutcome], numbers: Mapping[str, int]) -> dict[int, float]:
    """Return the mean cost over the seeds by the number of an exit or budget."""
    costs: dict[int, list[float]] = {}
    for row in rows:
        costs.setdefault(numbers[row.answer], []).append(row.multiply_adds)
    return {number: fmean(seen) / MILLION for number, seen in costs.items()}


def _styles(styles: Mapping[str, Style]) -> dict[str, Style]:
    """Return the arms' styles, each followed by that of its running sums: dotted, without band."""
    found: dict[str, Style] = {}
    for arm, style in styles.items():
        found[arm] = style
        found[summed_name(arm)] = replace(style, control=True, dashes=DASHES[2])
    return found
