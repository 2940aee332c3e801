"""The figures of the page: as wide as there is room, while text and lines keep their size.

A figure says where everything stands in per cent of its width and height. The template writes it
as SVG without a `viewBox`, so a phone and a large screen show letters of the same size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from regrad_runner.reporting.figures.marks import Drawing, Mark
from regrad_runner.reporting.figures.scales import (
    MINUS,
    AxisScale,
    edge_of,
    row_scale,
    step_scale,
    value_scale,
)
from regrad_runner.reporting.figures.svg import SHAPES
from regrad_runner.reporting.styles import Style

SIDE = 1000  # units along each side of the square that curves are drawn in
MOST_TICKS = 6
FEWEST_TICKS = 3  # of a small figure
MARKERS_PER_CURVE = 6
DASHES_PER_UNIT = 1.6
RUN_BAND = (30.0, 70.0)  # heights between which the runs of a row are spread, in per cent


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a series looks on the page.

    Attributes:
        role: Name of its colour.
        shape: Outline of its marker, as the `d` of a path.
        hollow: Whether the marker is hollow.
        dashes: Of its line; empty for a solid one.
    """

    role: str
    shape: str
    hollow: bool
    dashes: str


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A place on an axis, in per cent, with what is written there."""

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A place in a figure, in per cent of its width and height."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """A row of a figure with rows.

    Attributes:
        name: Whose it is.
        words: What is written at its end.
        tone: What kind of news these words are.
        look: How it is drawn.
        is_first: Whether a family begins with it.
        dots: Its runs.
        misses: Its runs without a value, which stand at the edge.
        middle: Its mean or median.
        start: Left end of its interval.
        end: Right end of it.
        beyond: Where the row lies if that is outside of the axis: "left" or "right".
        beyond_text: The value there.
    """

    name: str
    words: str
    tone: str
    look: Look
    is_first: bool
    dots: list[Dot]
    misses: list[Dot]
    middle: float | None = None
    start: float | None = None
    end: float | None = None
    beyond: str = ""
    beyond_text: str = ""


@dataclass(frozen=True, kw_only=True)
class RowsPlot:
    """A figure with rows: see `Drawing`."""

    drawing: Drawing
    rows: list[DrawnRow]
    ticks: list[Tick]
    reference: float | None
    kind: str = "rows"


@dataclass(frozen=True, kw_only=True)
class DrawnCurve:
    """A curve.

    Attributes:
        name: Whose it is.
        key: Number of its series among those of the section, for the legend.
        look: How it is drawn.
        path: The curve, as the `d` of a path in a square of `SIDE` units.
        band: The band about it, likewise; empty for none.
        markers: Places of its markers.
        points: Step, place, height and value of each of its points, as JSON.
    """

    name: str
    key: int
    look: Look
    path: str
    band: str
    markers: list[Dot]
    points: str


@dataclass(frozen=True, kw_only=True)
class CurvesPlot:
    """A figure with curves: see `Drawing`.

    Attributes:
        drawing: What it shows.
        name: Unique in the page.
        title: Its heading.
        lines: Its curves.
        x_ticks: On the horizontal axis.
        y_ticks: On the vertical axis, from the top.
        reference: Height of the line at the target; None for none.
        reference_text: What is written at it.
        small: Whether it is one of several small figures.
    """

    drawing: Drawing
    name: str
    title: str
    lines: list[DrawnCurve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    reference: float | None = None
    reference_text: str = ""
    small: bool = False
    kind: str = "curves"


Plot = RowsPlot | CurvesPlot


def look_of(style: Style) -> Look:
    """Return how a style looks on the page."""
    dashes = " ".join(f"{length * DASHES_PER_UNIT:g}" for length in style.dashes)
    return Look(role=style.role, shape=SHAPES[style.marker], hollow=style.control, dashes=dashes)


def plot_of(drawing: Drawing, keys: Mapping[str, int], tones: Mapping[str, str]) -> Plot:
    """Return the figure of a drawing.

    Args:
        drawing: What it shows.
        keys: Number of each series of curves, for the legend.
        tones: What kind of news an arm's verdict is.
    """
    if drawing.kind == "curves":
        return curves_plot(drawing, keys)
    return rows_plot(drawing, tones)


def rows_plot(drawing: Drawing, tones: Mapping[str, str]) -> RowsPlot:
    """Return a figure with a row per arm."""
    scale = row_scale(drawing)
    reference = drawing.reference
    return RowsPlot(
        drawing=drawing,
        rows=[_row(drawing, series, scale, tones) for series in drawing.styles],
        ticks=[Tick(place=_percent(scale, x), text=text) for x, text in scale.ticks(MOST_TICKS)],
        reference=None if reference is None else _percent(scale, reference),
    )


def curves_plot(drawing: Drawing, keys: Mapping[str, int]) -> CurvesPlot:
    """Return a figure with curves over training."""
    across = step_scale(drawing)
    up = value_scale(drawing)
    has_whole_steps = all(float(mark.x or 0).is_integer() for mark in drawing.marks)
    target = drawing.reference
    return CurvesPlot(
        drawing=drawing,
        name=drawing.name,
        title=drawing.title,
        lines=[_line(drawing, series, across, up, keys) for series in drawing.styles],
        x_ticks=[
            Tick(place=_percent(across, x), text=text)
            for x, text in across.ticks(8, whole=has_whole_steps)
        ],
        y_ticks=[Tick(place=100 - _percent(up, y), text=text) for y, text in up.ticks(MOST_TICKS)],
        reference=None if target is None else 100 - _percent(up, target),
        reference_text="" if target is None else f"target {target:.4g}",
    )


def small_multiples(
    drawing: Drawing,
    families: Sequence[Sequence[str]],
    baseline: str | None,
    keys: Mapping[str, int],
) -> list[CurvesPlot]:
    """Return the same curves a family at a time, each beside the baseline and on its own scale.

    Args:
        drawing: All curves.
        families: Arms that belong together.
        baseline: The arm that stands in every one.
        keys: Number of each series, for the legend.
    """
    plots = []
    for number, members in enumerate(families, start=1):
        shown = [arm for arm in (baseline, *members) if arm in drawing.styles]
        if not set(members) & set(shown):
            continue
        styles = {arm: drawing.styles[arm] for arm in shown if arm is not None}
        part = replace(
            drawing,
            styles=styles,
            marks=[mark for mark in drawing.marks if mark.series in styles],
            title=" and ".join(arm for arm in members if arm in styles),
            reference=None,
            far_off=frozenset(),
        )
        whole = curves_plot(part, keys)
        plots.append(
            replace(
                whole,
                name=f"{drawing.name}-{number}",
                x_ticks=_ends(whole.x_ticks),
                y_ticks=_thinned(whole.y_ticks),
                small=True,
            )
        )
    return plots


def _row(drawing: Drawing, series: str, scale: AxisScale, tones: Mapping[str, str]) -> DrawnRow:
    marks = drawing.marks_of(series)
    style = drawing.styles[series]
    row = DrawnRow(
        name=series,
        words=(drawing.words or {}).get(series, ""),
        tone=tones.get(series, "plain") if drawing.name == "differences" else "plain",
        look=look_of(style),
        is_first=not style.control,
        dots=[],
        misses=[],
    )
    middle = next((mark for mark in marks if mark.seed is None), None)
    if middle is None:
        return row
    if series in drawing.far_off:
        side = "left" if (middle.x or 0.0) < scale.low else "right"
        return replace(row, beyond=side, beyond_text=_signed(middle.x or 0.0))
    end = edge_of(drawing) if middle.high is None else middle.high
    return replace(
        row,
        dots=_dots(marks, scale),
        misses=_misses(marks),
        middle=None if middle.x is None else _percent(scale, middle.x),
        start=None if middle.low is None else _percent(scale, middle.low),
        end=None if middle.low is None else _percent(scale, end),
    )


def _dots(marks: Sequence[Mark], scale: AxisScale) -> list[Dot]:
    """Return the places of the runs of a row, at heights that keep equal numbers apart."""
    runs = [mark for mark in marks if mark.seed is not None]
    heights = _heights(len(runs))
    return [
        Dot(x=_percent(scale, run.x), y=height)
        for run, height in zip(runs, heights, strict=True)
        if run.x is not None
    ]


def _misses(marks: Sequence[Mark]) -> list[Dot]:
    runs = [mark for mark in marks if mark.seed is not None]
    heights = _heights(len(runs))
    return [
        Dot(x=100.0, y=height) for run, height in zip(runs, heights, strict=True) if run.x is None
    ]


def _heights(count: int) -> list[float]:
    if count < 2:
        return [50.0] * count
    low, high = RUN_BAND
    return [low + (high - low) * place / (count - 1) for place in range(count)]


def _line(
    drawing: Drawing, series: str, across: AxisScale, up: AxisScale, keys: Mapping[str, int]
) -> DrawnCurve:
    marks = [mark for mark in drawing.marks_of(series) if mark.x is not None]
    style = drawing.styles[series]
    places = [SIDE * across.share(mark.x or 0.0) for mark in marks]
    heights = [SIDE * (1 - up.share(mark.y or 0.0)) for mark in marks]
    return DrawnCurve(
        name=series,
        key=keys.get(series, 0),
        look=look_of(style),
        path=_path(list(zip(places, heights, strict=True))),
        band="" if style.control or len(marks) < 2 else _band(marks, places, up),
        markers=_markers(places, heights),
        points=json.dumps(
            [
                [_tidy(mark.x), round(x / SIDE, 4), round(y / SIDE, 4), _tidy(mark.y)]
                for mark, x, y in zip(marks, places, heights, strict=True)
            ]
        ),
    )


def _tidy(value: float | None) -> float:
    """Return a number as it is shown."""
    return float(f"{value or 0.0:.5g}")


def _markers(places: Sequence[float], heights: Sequence[float]) -> list[Dot]:
    """Return where the markers of a curve stand: some of its points, inside the figure."""
    every = max(1, len(places) // MARKERS_PER_CURVE)
    chosen = list(zip(places, heights, strict=True))[len(places) // 12 :: every]
    inside = [(x, y) for x, y in chosen if 0 <= y <= SIDE]
    return [Dot(x=100 * x / SIDE, y=100 * y / SIDE) for x, y in inside]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _band(marks: Sequence[Mark], places: Sequence[float], up: AxisScale) -> str:
    """Return the outline of the band about a curve."""
    above = [SIDE * (1 - up.share(_end(mark.high, mark))) for mark in marks]
    below = [SIDE * (1 - up.share(_end(mark.low, mark))) for mark in marks]
    there = list(zip(places, above, strict=True))
    back = list(zip(places, below, strict=True))[::-1]
    return f"{_path([*there, *back])}Z"


def _end(value: float | None, mark: Mark) -> float:
    """Return an end of a band, or the curve itself where it has none."""
    return (mark.y or 0.0) if value is None else value


def _percent(scale: AxisScale, value: float) -> float:
    return 100 * scale.share(value)


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", MINUS)


def _ends(ticks: Sequence[Tick]) -> list[Tick]:
    """Return the first and the last of some ticks, and the one in their middle."""
    if len(ticks) <= FEWEST_TICKS:
        return list(ticks)
    return [ticks[0], ticks[len(ticks) // 2], ticks[-1]]


def _thinned(ticks: Sequence[Tick]) -> list[Tick]:
    """Return every other one of some ticks, if there are many."""
    return list(ticks) if len(ticks) <= FEWEST_TICKS + 1 else list(ticks[::2])
