"""The result of a comparison in pictures."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from regrad_runner.files import make_folder, write_whole
from regrad_runner.reporting.styles import GRID, QUIET, Style, arm_styles
from regrad_runner.statistics.bands import Band
from regrad_runner.statistics.bands import bands as band_by_series
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure

DPI = 160
SHOWN_FROM = 0.25
LONG = 20  # characters of a measure that takes a line of its own beside an axis


class CurveRow(Protocol):
    """One evaluation of one run: any object with these attributes."""

    @property
    def arm(self) -> str:
        """Name of the arm."""

    @property
    def seed(self) -> int:
        """Seed of the run."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def value(self) -> float:
        """The measure on the validation split."""


@rc_context({"text.parse_math": False})  # a dollar in the name of an arm is a dollar
def write_figures(
    curves: Iterable[CurveRow],
    out: Path,
    *,
    rows: Sequence[RunRow],
    summaries: Sequence[ArmSummary],
    measure: Measure,
) -> list[Path]:
    """Draw a comparison as PNG files.

    `curves.png` has the measure on the validation split against optimizer steps, median and middle half over seeds.
    `steps.png`, if there is a target, has the steps to it of every run; a run that missed stands at the right edge.
    `comparison.png` has the curves, and beside them the paired differences to the baseline: one dot per seed, the
    mean and its interval, the verdict. A control has the colour of the arm that must beat it, in dashes.

    Args:
        curves: One row per evaluation of each run. Steps that not every seed of an arm has are left out.
        out: Folder, made if need be; files of these names are replaced.
        rows: What `summaries` were made from.
        summaries: From `regrad_runner.statistics.verdicts.summarize`; the arms are drawn in this order.
        measure: What was compared.

    Returns:
        The files written; a figure without anything to show is left out.
    """
    make_folder(out)
    styles = arm_styles(summaries)
    found = band_by_series((row.arm, row.step, row.value) for row in curves)
    bands = {summary.arm: found[summary.arm] for summary in summaries if summary.arm in found}
    written = []
    if bands:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        _draw_curves(figure.subplots(), bands, styles, measure)
        written.append(_save(figure, out / "curves.png"))
    if measure.target is not None and any(row.usable for row in rows):
        figure = Figure(figsize=(7, 1.2 + 0.42 * len(summaries)), layout="constrained")
        _draw_steps(figure.subplots(), rows, summaries, styles, measure)
        written.append(_save(figure, out / "steps.png"))
    if bands and any(summary.difference is not None for summary in summaries):
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        _draw_curves(left, bands, styles, measure)
        _draw_differences(right, rows, summaries, styles, measure)
        written.append(_save(figure, out / "comparison.png"))
    return written


def _draw_curves(
    axes: Axes, bands: Mapping[str, Band], styles: Mapping[str, Style], measure: Measure
) -> None:
    for arm, band in bands.items():
        style = styles[arm]
        axes.plot(
            band.steps,
            band.middle,
            label=arm,
            color=style.colour,
            linestyle="--" if style.control else "-",
            linewidth=1.2 if style.control else 2,
        )
        if not style.control:
            axes.fill_between(
                band.steps, band.low, band.high, color=style.colour, alpha=0.12, linewidth=0
            )
    if measure.target is not None:
        axes.axhline(measure.target, color=QUIET, linewidth=0.8, linestyle=":")
    axes.set_xlabel("optimizer steps")
    name = _on_validation(measure)
    between = "\n" if len(name) > LONG else " "
    axes.set_ylabel(f"{name}{between}(median and middle half of the seeds)")
    _zoom(axes, bands.values())
    axes.legend(frameon=False, fontsize="small")
    _tidy(axes)


def _zoom(axes: Axes, bands: Iterable[Band]) -> None:
    """Leave the first, steep part of training outside, so that the arms can be told apart."""
    bands = list(bands)
    shown = [(band, band.steps >= SHOWN_FROM * band.steps[-1]) for band in bands]
    low = min(float(band.middle[part].min()) for band, part in shown)
    high = max(float(band.middle[part].max()) for band, part in shown)
    if high > low:
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _draw_steps(
    axes: Axes,
    rows: Sequence[RunRow],
    summaries: Sequence[ArmSummary],
    styles: Mapping[str, Style],
    measure: Measure,
) -> None:
    hits = [row.steps_to_target for row in rows if row.usable and row.steps_to_target is not None]
    edge = 1.06 * max(hits, default=1)
    for place, summary in enumerate(summaries):
        style = styles[summary.arm]
        runs = [row for row in rows if row.arm == summary.arm and row.usable]
        for row, height in zip(runs, _spread(place, len(runs)), strict=True):
            if row.steps_to_target is None:
                axes.plot(edge, height, "x", color=style.colour, markersize=5)
            else:
                axes.plot(row.steps_to_target, height, "o", color=style.colour, **_dot(style))
        if summary.steps_to_target is not None:
            axes.plot(
                [summary.steps_to_target] * 2,
                [place - 0.34, place + 0.34],
                color=style.colour,
                linewidth=2.5,
            )
    if any(summary.misses for summary in summaries):
        axes.text(edge, -0.62, "missed", ha="center", va="bottom", color=QUIET, fontsize="small")
    axes.set_xlabel(
        f"optimizer steps to {_on_validation(measure)} {measure.target:g} (bar: median)"
    )
    _name_arms(axes, summaries)


def _draw_differences(
    axes: Axes,
    rows: Sequence[RunRow],
    summaries: Sequence[ArmSummary],
    styles: Mapping[str, Style],
    measure: Measure,
) -> None:
    baseline = next(summary.arm for summary in summaries if summary.verdict == "baseline")
    reference = {row.seed: row.value for row in rows if row.arm == baseline and row.usable}
    drawn = [
        (summary, summary.difference) for summary in summaries if summary.difference is not None
    ]
    for place, (summary, difference) in enumerate(drawn):
        style = styles[summary.arm]
        runs = [
            row for row in rows if row.arm == summary.arm and row.usable and row.seed in reference
        ]
        differences = [row.value - reference[row.seed] for row in runs]
        axes.plot(differences, _spread(place, len(runs)), "o", color=style.colour, **_dot(style))
        if summary.interval is not None:
            axes.plot(
                summary.interval,
                [place, place],
                color=style.colour,
                linewidth=2.5,
                solid_capstyle="butt",
            )
        axes.plot(difference, place, "D", color=style.colour, markersize=7, markeredgecolor="white")
        axes.text(
            1.02,
            place,
            summary.verdict,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize="small",
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.locator_params(axis="x", nbins=6)
    direction = "" if measure.higher_is_better else f"\n{measure.direction}"
    axes.set_xlabel(
        f"{measure.name}: difference to {baseline} (mean, 95 % interval, seeds){direction}"
    )
    _name_arms(axes, [summary for summary, _ in drawn])


def _on_validation(measure: Measure) -> str:
    return f"validation {measure.name.removeprefix('test ')}"


def _spread(place: int, count: int) -> npt.NDArray[np.float64]:
    """Return heights about a row of the picture, so that equal numbers stay apart."""
    return place + np.linspace(-0.24, 0.24, count) if count > 1 else np.full(count, float(place))


def _dot(style: Style) -> dict[str, Any]:
    return {
        "markersize": 4.5,
        "alpha": 0.55,
        "markeredgewidth": 0.9,
        "markerfacecolor": "none" if style.control else None,
    }


def _name_arms(axes: Axes, summaries: Sequence[ArmSummary]) -> None:
    axes.set_yticks(range(len(summaries)), [summary.arm for summary in summaries])
    axes.set_ylim(len(summaries) - 0.35, -0.65)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    write_whole(path, picture.getvalue())
    return path
