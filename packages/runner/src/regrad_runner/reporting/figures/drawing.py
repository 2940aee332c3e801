"""Figures from marks, by matplotlib: small enough for a phone, with room for long names."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from regrad_runner.reporting.figures.marks import Drawing, Mark
from regrad_runner.reporting.figures.scales import edge_of, row_scale, value_scale
from regrad_runner.reporting.styles import GRID, INK, PAPER, QUIET, Style

FIGURE_WIDTH = 5.0  # inches of 72 points: 360, as wide as a small phone
POINTS_PER_INCH = 72  # one unit of an SVG file is a point
LONGEST_ROW_NAME = 40  # characters that fit above a row
LONGEST_TITLE = 40  # characters that fit into a line above a figure or below it
LONGEST_UPRIGHT = 30  # characters that fit into a line beside the vertical axis
SMALL_TEXT = 9.5
CAPTION_TEXT = 8.5
CAPTION_WIDTH = 60  # characters of a caption's line
CAPTION_LINE = 0.15  # height of it, in inches
DRAWING_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "text.parse_math": False,  # a dollar in the name of an arm is a dollar
    "xtick.labelsize": SMALL_TEXT,
    "ytick.labelsize": SMALL_TEXT,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
}


def draw_plain(drawing: Drawing) -> Figure:
    """Return a figure for a file of its own, without its title and caption."""
    with mpl.rc_context(DRAWING_SETTINGS):
        figure = _empty_figure(FIGURE_WIDTH, _height(drawing))
        _draw_into(figure, drawing)
    return figure


def draw_alone(drawings: Sequence[Drawing]) -> Figure:
    """Return one figure with drawings side by side, each with its title and caption."""
    with mpl.rc_context(DRAWING_SETTINGS):
        height = max(_height(drawing) + _height_of_words(drawing) for drawing in drawings)
        figure = _empty_figure(FIGURE_WIDTH * len(drawings), height)
        parts = figure.subfigures(1, len(drawings), squeeze=False)[0]
        for part, drawing in zip(parts, drawings, strict=True):
            axes = _draw_into(part, drawing)
            title = textwrap.fill(drawing.title, LONGEST_TITLE)
            axes.set_title(title, loc="left", color=INK)
            _write_caption(axes, drawing)
    return figure


def _empty_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=POINTS_PER_INCH, layout="constrained")


def _height(drawing: Drawing) -> float:
    """Return how high a figure is, in inches."""
    if drawing.kind == "curves":
        lines_of_legend = math.ceil(len(drawing.styles) / 2)
        return 3.3 + 0.22 * lines_of_legend
    return 0.75 + 0.5 * len(drawing.styles)


def _height_of_words(drawing: Drawing) -> float:
    """Return what title and caption add to it, in inches."""
    return 0.3 + CAPTION_LINE * len(_caption_lines(drawing))


def _caption_lines(drawing: Drawing) -> list[str]:
    """Return all that is said about a figure, in lines."""
    text = f"{drawing.section_caption} {drawing.caption}".strip()
    return textwrap.wrap(text, CAPTION_WIDTH)


def _write_caption(axes: Axes, drawing: Drawing) -> None:
    """Write what the page says beside a figure below the label of its horizontal axis."""
    axes.annotate(
        "\n".join(_caption_lines(drawing)),
        xy=(0, 0),
        xycoords=("axes fraction", axes.xaxis.label),
        xytext=(0, -5),
        textcoords="offset points",
        ha="left",
        va="top",
        color=QUIET,
        fontsize=CAPTION_TEXT,
    )


def _draw_into(figure: Figure | SubFigure, drawing: Drawing) -> Axes:
    axes: Axes = figure.subplots()
    if drawing.kind == "curves":
        _draw_curves(axes, drawing)
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=SMALL_TEXT)
    else:
        _draw_rows(axes, drawing)
    return axes


def _draw_curves(axes: Axes, drawing: Drawing) -> None:
    for series, style in drawing.styles.items():
        _draw_curve(axes, series, drawing.marks_of(series), style)
    _scale_values(axes, drawing)
    if drawing.reference is not None:
        _draw_target(axes, drawing.reference)
    axes.set_xlabel(textwrap.fill(drawing.x_label, LONGEST_TITLE))
    axes.set_ylabel(textwrap.fill(drawing.y_label, LONGEST_UPRIGHT))
    _tidy(axes)


def _draw_curve(axes: Axes, series: str, marks: list[Mark], style: Style) -> None:
    x = _numbers(marks, "x")
    y = _numbers(marks, "y")
    if not style.control:
        low = _numbers(marks, "low")
        high = _numbers(marks, "high")
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
        **_marker(style, size=4.2),
    )


def _numbers(marks: list[Mark], field: str) -> list[float]:
    """Return one number of each mark of a curve, which has all of them."""
    return [float(getattr(mark, field)) for mark in marks]


def _scale_values(axes: Axes, drawing: Drawing) -> None:
    """Scale the vertical axis as the drawing says."""
    scale = value_scale(drawing)
    if scale.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_ylim(scale.low, scale.high)


def _draw_target(axes: Axes, target: float) -> None:
    """Draw a line at the target."""
    axes.axhline(target, color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)))
    is_below_the_title = target >= axes.get_ylim()[1]
    axes.annotate(
        f"target {target:g}",
        xy=(0, target),
        xycoords=("axes fraction", "data"),
        xytext=(4, -3 if is_below_the_title else 3),
        verticalalignment="top" if is_below_the_title else "bottom",
        textcoords="offset points",
        color=QUIET,
        fontsize=SMALL_TEXT,
    )


def _draw_rows(axes: Axes, drawing: Drawing) -> None:
    edge = edge_of(drawing)
    scale = row_scale(drawing)
    axes.set_xlim(scale.low, scale.high)
    for place, (series, style) in enumerate(drawing.styles.items()):
        marks = drawing.marks_of(series)
        if series in drawing.far_off:
            _draw_arrow(axes, marks, style, place=place)
            marks = []
        runs = [mark for mark in marks if mark.seed is not None]
        _draw_runs(axes, runs, style, place=place, edge=edge)
        for mark in marks:
            if mark.seed is None:
                _draw_interval(axes, mark, style, place=place, edge=edge)
                _draw_middle(axes, mark, style, place=place, is_bar=drawing.kind == "bars")
        _write_row_name(axes, series, place)
        words = (drawing.words or {}).get(series)
        if words:
            _write_row_words(axes, words, place)
    if drawing.reference is not None:
        axes.axvline(drawing.reference, color=INK, linewidth=0.9, zorder=1)
    axes.set_ylim(len(drawing.styles) - 0.42, -0.72)
    axes.set_yticks([])
    axes.set_xlabel(textwrap.fill(drawing.x_label, LONGEST_TITLE))
    axes.locator_params(axis="x", nbins=6)
    _tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def _draw_arrow(axes: Axes, marks: Sequence[Mark], style: Style, *, place: int) -> None:
    """Point at a row that lies beyond the axis, and write where it is."""
    (mean,) = [mark for mark in marks if mark.seed is None]
    value = mean.x or 0.0
    is_left = value < axes.get_xlim()[0]
    axes.annotate(
        f"{value:+.3g}",
        xy=(0 if is_left else 1, place),
        xycoords=axes.get_yaxis_transform(),
        xytext=(26 if is_left else -26, 0),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="center",
        color=INK,
        fontsize=SMALL_TEXT,
        arrowprops={"arrowstyle": "->", "color": style.colour, "linewidth": 1.8},
    )


def _draw_runs(axes: Axes, runs: Sequence[Mark], style: Style, *, place: int, edge: float) -> None:
    for mark, height in zip(runs, _spread(place, len(runs)), strict=True):
        if mark.x is None:
            axes.plot(edge, height, "x", color=style.colour, markersize=5)
        else:
            marker = _marker(style, size=3.8)
            axes.plot(mark.x, height, style.marker, color=style.colour, alpha=0.75, **marker)


def _draw_middle(axes: Axes, mark: Mark, style: Style, *, place: int, is_bar: bool) -> None:
    """Draw the mean or median of a row."""
    if mark.x is None:
        return
    if is_bar:
        axes.barh(place, mark.x, height=0.4, color=style.colour, alpha=0.22, linewidth=0, zorder=0)
    axes.plot(
        [mark.x, mark.x],
        [place - 0.21, place + 0.21],
        color=style.colour,
        linewidth=3,
        solid_capstyle="butt",
    )


def _draw_interval(axes: Axes, mark: Mark, style: Style, *, place: int, edge: float) -> None:
    """Draw the interval of a row; an open one ends at the edge."""
    if mark.low is None:
        return
    high = edge if mark.high is None else mark.high
    axes.plot(
        [mark.low, high],
        [place, place],
        color=style.colour,
        linewidth=1.8,
        linestyle=(0, style.dashes) if style.dashes else "-",
        solid_capstyle="butt",
        dash_capstyle="butt",
    )


def _write_row_name(axes: Axes, series: str, place: int) -> None:
    """Write the name of a row above it, so that a long one takes no width from the figure."""
    name = series
    if len(series) > LONGEST_ROW_NAME:
        name = f"{series[: LONGEST_ROW_NAME - 1]}…"
    _write_above_row(axes, name, place, x=0.0, ha="left", color=INK)


def _write_row_words(axes: Axes, words: str, place: int) -> None:
    """Write the verdict or the number of a row at its right end."""
    _write_above_row(axes, words, place, x=1.0, ha="right", color=QUIET, fontsize=SMALL_TEXT)


def _write_above_row(axes: Axes, text: str, place: int, *, x: float, **look: Any) -> None:
    background = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # hides lines behind it
    transform = axes.get_yaxis_transform()
    axes.text(x, place - 0.34, text, transform=transform, va="bottom", bbox=background, **look)


def _spread(place: int, count: int) -> npt.NDArray[np.float64]:
    """Return heights about a row, so that equal numbers stay apart."""
    if count < 2:
        return np.full(count, float(place))
    return place + np.linspace(-0.15, 0.15, count)


def _marker(style: Style, *, size: float) -> Mapping[str, Any]:
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
