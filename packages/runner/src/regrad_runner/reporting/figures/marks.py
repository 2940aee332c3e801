"""What the figures show, mark by mark: figures are drawn and `figures.csv` is written from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from regrad_runner.reporting.styles import Style
from regrad_runner.results.tables import write_rows
from regrad_runner.statistics.bands import Band

FIGURES_FILE = "figures.csv"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One mark of a figure, as `figures.csv` keeps it.

    Attributes:
        figure: Name of the figure, and of its file.
        series: What the mark belongs to: an arm, or a correction of an arm in one stage.
        seed: Of the run that it shows; None if it stands for all of them.
        seeds: Number of runs behind it.
        x: Place along the horizontal axis; None for a run that missed the target.
        y: Place along the vertical axis; None if the series are the rows of the figure.
        low: Lower end of its band or interval; None if it has none.
        high: Upper end; None if it has none, or if the interval is open.
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
        name: Of its file and of its rows in `figures.csv`.
        kind: Curves over training, rows of dots, or rows of bars.
        title: Its heading.
        caption: What is drawn, as far as the section of the page does not say it.
        section_caption: What the section says for all of its figures. A picture outside the page
            says it too.
        x_label: With the unit.
        y_label: With the unit; empty if the series are rows.
        marks: What is drawn.
        styles: How each series looks, in the order of the legend.
        reference: A value to draw a line at, such as the target or one.
        words: What is written at the end of a row, by series.
        log: Whether the axis of values is logarithmic.
        span: Ends of the vertical axis, if they are fixed.
        zoomed: Whether the vertical axis is scaled to the second half of training.
        far_off: Series that the axis of values is not scaled to: they may lie outside.
        better: Which side of the reference is better: "left" or "right"; empty for neither.
    """

    name: str
    kind: Literal["curves", "dots", "bars"]
    title: str
    x_label: str
    y_label: str = ""
    caption: str = ""
    section_caption: str = ""
    marks: list[Mark]
    styles: Mapping[str, Style]
    reference: float | None = None
    words: Mapping[str, str] | None = None
    log: bool = False
    span: tuple[float, float] | None = None
    zoomed: bool = False
    far_off: frozenset[str] = frozenset()
    better: Literal["left", "right", ""] = ""

    @property
    def alternative(self) -> str:
        """What the figure says, in words: the end of each curve, the middle of each row."""
        ends = []
        for series in self.styles:
            whole = [mark for mark in self.marks_of(series) if mark.seed is None]
            if whole:
                ends.append(f"{series} {self._in_words(whole[-1])}")
        what = self.x_label
        if self.kind == "curves":
            what = f"{self.y_label} against {self.x_label}, at the end"
        return f"{self.title}. {what}: {'; '.join(ends)}."

    def marks_of(self, series: str) -> list[Mark]:
        """Return the marks of one series."""
        return [mark for mark in self.marks if mark.series == series]

    def _in_words(self, mark: Mark) -> str:
        value = mark.y if self.kind == "curves" else mark.x
        text = "missed" if value is None else f"{value:.4g}"
        if mark.low is None:
            return text
        end = "beyond" if mark.high is None else f"{mark.high:.4g}"
        return f"{text} ({mark.low:.4g} to {end})"


def write_marks(path: Path, drawings: Iterable[Drawing]) -> Path:
    """Write every mark of every figure into `figures.csv` in a folder, and return the file."""
    marks = chain.from_iterable(drawing.marks for drawing in drawings)
    write_rows(path / FIGURES_FILE, list(marks), Mark)
    return path / FIGURES_FILE


def marks_of_bands(
    figure: str, found: Mapping[str, Band], x: Mapping[str, Mapping[int, float]] | None = None
) -> list[Mark]:
    """Return the marks of curves with bands.

    Args:
        figure: Name of the figure.
        found: From `regrad_runner.statistics.bands.bands`.
        x: Where each step of each series stands, by default at the step itself. Steps without a
            place are left out.
    """
    marks = []
    for series, band in found.items():
        places = _places(band) if x is None else x.get(series, {})
        for index, step in enumerate(band.steps):
            if int(step) in places:
                mark = Mark(
                    figure=figure,
                    series=series,
                    seeds=band.seeds,
                    x=places[int(step)],
                    y=float(band.middle[index]),
                    low=float(band.low[index]),
                    high=float(band.high[index]),
                )
                marks.append(mark)
    return marks


def _places(band: Band) -> dict[int, float]:
    """Return the steps of a curve as their own places."""
    return {int(step): float(step) for step in band.steps}


def styles_of(styles: Mapping[str, Style], marks: Iterable[Mark]) -> dict[str, Style]:
    """Return the styles of the series that have a mark."""
    drawn = {mark.series for mark in marks}
    return {series: style for series, style in styles.items() if series in drawn}
