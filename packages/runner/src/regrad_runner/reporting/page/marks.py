"""What the figures show: every mark as a row, from which the figures are drawn and `figures.csv` is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regrad_runner.reporting.styles import Style
from regrad_runner.results.tables import write_rows
from regrad_runner.statistics.bands import Band

FILE = "figures.csv"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One mark of a figure, as `figures.csv` keeps it.

    Attributes:
        figure: Name of the figure, that of its file too.
        series: What the mark belongs to: an arm, or a correction of an arm in one stage.
        seed: Of the run that it shows; None where it is of all of them.
        seeds: Number of runs behind it.
        x: Place along the horizontal axis; None for a run that missed the target.
        y: Place along the vertical axis; None where the series are the rows of the figure.
        low: Lower end of its band or interval; None where it has none.
        high: Upper end, which is None too where the interval has no end.
    """

    figure: str
    series: str
    seed: int | None = None
    seeds: int = 1
    x: float | None = None
    y: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure before it is drawn.

    Attributes:
        name: Of its file and its rows in `figures.csv`.
        kind: Curves over training, rows of dots, or rows of bars.
        title: As a heading.
        caption: What is drawn and over what, as far as the heading of its section does not say it.
        x_label: With the unit.
        y_label: With the unit; empty where series are rows.
        marks: What is drawn.
        styles: How each series looks, in the order of the legend.
        reference: A value to draw a line at, such as a target or one.
        words: What is written at the end of a row, by series.
        log: Whether the axis of values is logarithmic.
        span: Ends of the vertical axis, where they are fixed.
        zoomed: Whether the first half of training is left out when the vertical axis is chosen.
    """

    name: str
    kind: Literal["curves", "dots", "bars"]
    title: str
    x_label: str
    y_label: str = ""
    caption: str = ""
    marks: list[Mark]
    styles: Mapping[str, Style]
    reference: float | None = None
    words: Mapping[str, str] | None = None
    log: bool = False
    span: tuple[float, float] | None = None
    zoomed: bool = False

    @property
    def alternative(self) -> str:
        """What the figure says, in words: the end of each curve, the middle of each row."""
        ends = []
        for series in self.styles:
            own = [mark for mark in self.marks if mark.series == series and mark.seed is None]
            if own:
                ends.append(f"{series} {_in_words(own[-1], is_row=self.kind != 'curves')}")
        what = (
            f"{self.y_label} against {self.x_label}, at the end"
            if self.kind == "curves"
            else self.x_label
        )
        return f"{self.title}. {what}: {'; '.join(ends)}."


def write_marks(path: Path, drawings: Iterable[Drawing]) -> Path:
    """Write every mark of every figure into `figures.csv` in a folder, and return the file."""
    write_rows(path / FILE, [mark for drawing in drawings for mark in drawing.marks], Mark)
    return path / FILE


def marks_of_bands(
    figure: str, found: Mapping[str, Band], x: Mapping[str, Mapping[int, float]] | None = None
) -> list[Mark]:
    """Return the marks of curves with bands.

    Args:
        figure: Name of the figure.
        found: From `regrad_runner.statistics.bands.bands`.
        x: Where each step of each series stands; at the step itself where this is left out. Steps without a place are
            left out.
    """
    marks = []
    for series, band in found.items():
        places = {int(step): float(step) for step in band.steps} if x is None else x.get(series, {})
        for step, low, middle, high in zip(
            band.steps, band.low, band.middle, band.high, strict=True
        ):
            if int(step) in places:
                numbers: dict[str, Any] = {
                    "y": float(middle),
                    "low": float(low),
                    "high": float(high),
                }
                marks.append(
                    Mark(
                        figure=figure,
                        series=series,
                        seeds=band.seeds,
                        x=places[int(step)],
                        **numbers,
                    )
                )
    return marks


def _in_words(mark: Mark, *, is_row: bool) -> str:
    value = mark.x if is_row else mark.y
    interval = (
        f" ({mark.low:.4g} to {'beyond' if mark.high is None else f'{mark.high:.4g}'})"
        if mark.low is not None
        else ""
    )
    return ("missed" if value is None else f"{value:.4g}") + interval
