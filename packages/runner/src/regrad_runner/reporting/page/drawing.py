"""Figures from marks, by matplotlib: small enough for a phone, with room for long names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from regrad_runner.reporting.page.marks import Drawing, Mark
from regrad_runner.reporting.styles import GRID, INK, PAPER, QUIET, Style

WIDTH = 5.0  # inches of 72 points: 360, as wide as a small phone
SHOWN_FROM = 0.5
LONGEST = 40  # characters of a name that fit into a row
SMALL = 9.5
DPI = 72  # one unit of an SVG file is a point
TEXT = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "text.parse_math": False,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
}


def draw(drawing: Drawing) -> Figure:
    """Return a figure; one of curves names its series in a legend below, which a page may cut off."""
    with mpl.rc_context(TEXT):
        return _curves(drawing) if drawing.kind == "curves" else _rows(drawing)


def height_without_legend(figure: Figure) -> float:
    """Return how high a figure that was drawn is above its legend, in points."""
    height = float(figure.get_figheight()) * DPI
    return height - float(figure.legends[0].get_window_extent().y1) if figure.legends else height


def _curves(drawing: Drawing) -> Figure:
    rows = math.ceil(len(drawing.styles) / 2)
    figure = Figure(figsize=(WIDTH, 3.3 + 0.22 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for series, style in drawing.styles.items():
        marks = [mark for mark in drawing.marks if mark.series == series]
        _curve(axes, series, marks, style)
    if drawing.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    elif drawing.span is not None:
        axes.set_ylim(*drawing.span)
    elif drawing.zoomed:
        _zoom(axes, drawing)
    if drawing.reference is not None:
        low, high = axes.get_ylim()
        axes.axhline(drawing.reference, color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_ylim(min(low, drawing.reference), max(high, drawing.reference))
        axes.annotate(
            f"target {drawing.reference:g}", (0, drawing.reference), xycoords=("axes fraction", "data"),
            xytext=(4, 3), textcoords="offset points", color=QUIET, fontsize=SMALL,
        )  # fmt: skip
    axes.set_xlabel(drawing.x_label)
    axes.set_ylabel(drawing.y_label)
    _tidy(axes)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def _curve(axes: Axes, series: str, marks: list[Mark], style: Style) -> None:
    x, y = _numbers(marks, "x"), _numbers(marks, "y")
    if not style.control:
        low, high = _numbers(marks, "low"), _numbers(marks, "high")
        axes.fill_between(x, low, high, color=style.colour, alpha=0.14, linewidth=0)
    axes.plot(
        x,
        y,
        label=f"\u200b{series}",  # a name that starts with "_" would be left out of the legend
        color=style.colour,
        linestyle=(0, style.dashes) if style.dashes else "-",
        linewidth=1.1 if style.control else 1.7,
        marker=style.marker,
        markevery=(len(x) // 12, max(1, len(x) // 6)),
        **_face(style, size=4.2),
    )


def _numbers(marks: list[Mark], field: str) -> list[float]:
    """Return one number of each mark of a curve, which has all of them."""
    return [float(getattr(mark, field)) for mark in marks]


def _zoom(axes: Axes, drawing: Drawing) -> None:
    """Leave the first, steep half of training outside, so that the arms can be told apart."""
    shown: list[float] = []
    for series in drawing.styles:
        own = [mark for mark in drawing.marks if mark.series == series]
        end = own[-1].x or 0.0
        late = [mark for mark in own if (mark.x or 0.0) >= SHOWN_FROM * end]
        shown += [
            value for mark in late for value in (mark.low, mark.y, mark.high) if value is not None
        ]
    low, high = min(shown), max(shown)
    if high > low:
        margin = 0.05 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _rows(drawing: Drawing) -> Figure:
    count = len(drawing.styles)
    figure = Figure(figsize=(WIDTH, 0.75 + 0.5 * count), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    edge = _edge(drawing)
    for place, (series, style) in enumerate(drawing.styles.items()):
        marks = [mark for mark in drawing.marks if mark.series == series]
        _row(axes, drawing, marks, style, place=place, edge=edge)
        _name(axes, series, (drawing.words or {}).get(series, ""), place)
    if drawing.reference is not None:
        axes.axvline(drawing.reference, color=INK, linewidth=0.9, zorder=1)
    axes.set_ylim(count - 0.42, -0.72)
    axes.set_yticks([])
    axes.set_xlabel(drawing.x_label)
    axes.locator_params(axis="x", nbins=6)
    _tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    if drawing.kind == "bars":
        axes.set_xlim(left=0)
    return figure


def _row(
    axes: Axes, drawing: Drawing, marks: list[Mark], style: Style, *, place: int, edge: float
) -> None:
    runs = [mark for mark in marks if mark.seed is not None]
    for mark, height in zip(runs, _spread(place, len(runs)), strict=True):
        if mark.x is None:
            axes.plot(edge, height, "x", color=style.colour, markersize=5)
        else:
            axes.plot(
                mark.x,
                height,
                style.marker,
                color=style.colour,
                alpha=0.75,
                **_face(style, size=3.8),
            )
    for mark in marks:
        if mark.seed is None:
            _whole(axes, mark, style, place=place, edge=edge, bar=drawing.kind == "bars")


def _whole(axes: Axes, mark: Mark, style: Style, *, place: int, edge: float, bar: bool) -> None:
    """Draw the middle of a row and its interval."""
    if bar and mark.x is not None:
        axes.barh(place, mark.x, height=0.4, color=style.colour, alpha=0.22, linewidth=0, zorder=0)
    if mark.low is not None:
        end = edge if mark.high is None else mark.high
        axes.plot(
            [mark.low, end],
            [place, place],
            color=style.colour,
            linewidth=1.8,
            solid_capstyle="butt",
        )
    if mark.x is not None:
        axes.plot(
            [mark.x, mark.x],
            [place - 0.21, place + 0.21],
            color=style.colour,
            linewidth=3,
            solid_capstyle="butt",
        )


def _name(axes: Axes, series: str, words: str, place: int) -> None:
    """Write the name of a row above it, so that a long one takes no width from the figure."""
    along = axes.get_yaxis_transform()
    short = series if len(series) <= LONGEST else f"{series[: LONGEST - 1]}…"
    ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # lines end at a name
    axes.text(
        0.0, place - 0.34, short, transform=along, ha="left", va="bottom", color=INK, bbox=ground
    )
    if words:
        axes.text(
            1.0,
            place - 0.34,
            words,
            transform=along,
            ha="right",
            va="bottom",
            color=QUIET,
            fontsize=SMALL,
            bbox=ground,
        )


def _edge(drawing: Drawing) -> float:
    """Return where runs without a value stand: behind every other."""
    values = [v for mark in drawing.marks for v in (mark.x, mark.high) if v is not None]
    return 1.08 * max(values, default=1.0)


def _spread(place: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return heights about a row, so that equal numbers stay apart."""
    return place + np.linspace(-0.15, 0.15, count) if count > 1 else np.full(count, float(place))


def _face(style: Style, *, size: float) -> Mapping[str, Any]:
    return {
        "markersize": size,
        "markeredgewidth": 0.9,
        "markeredgecolor": style.colour,
        "markerfacecolor": PAPER if style.control else style.colour,
    }


def _tidy(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="both", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
