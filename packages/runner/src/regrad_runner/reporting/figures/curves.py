"""The figures with curves over training: measure and loss, effects, gradient quality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median

from regrad_runner.diagnostics.effects import Effect
from regrad_runner.reporting.figures.families import far_off
from regrad_runner.reporting.figures.marks import Drawing, Mark, marks_of_bands, styles_of
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.reporting.styles import DASHES, MARKERS, Style
from regrad_runner.statistics.bands import bands
from regrad_runner.workloads.workload import name_on_validation

ZOOM_NOTE = "Axes are scaled to the second half of training; earlier values may be cut off."
TIME_NOTE = "Each point is at the median time of its evaluation."
STEPS = "optimizer steps"
TIME = "time in training steps, s"
EFFECT_FIGURES = {
    "relative_change": ("Relative change", "relative change"),
    "cosine": ("Cosine of before and after", "cosine"),
    "trigger_rate": ("Trigger rate", "trigger rate"),
}


def training_curves(data: ReportData) -> list[Drawing]:
    """Return the measure and the loss against steps and against time."""
    times = times_of_evaluations(data)
    return [
        *measure_curves(data),
        *_training_curve(data, "loss", None),
        *_training_curve(data, "measure", times),
        *_training_curve(data, "loss", times),
    ]


def measure_curves(data: ReportData) -> list[Drawing]:
    """Return the measure on the validation split against steps, if there is an evaluation."""
    return _training_curve(data, "measure", None)


def times_of_evaluations(data: ReportData) -> dict[str, dict[int, float]]:
    """Return the median time of each evaluation of each arm over its seeds, in seconds.

    Folders that older versions wrote do not hold these times. There it is the number of steps
    times the run's median time per step.
    """
    seconds_per_step = {
        (result.arm, result.seed): result.step_seconds for result in data.folder.results
    }
    times: dict[str, dict[int, list[float]]] = {}
    for point in data.folder.curves:
        seconds = point.seconds
        if seconds is None:
            seconds = point.step * seconds_per_step[point.arm, point.seed]
            if not seconds:  # for a script the times are unknown
                continue
        times.setdefault(point.arm, {}).setdefault(point.step, []).append(seconds)
    return {
        arm: {step: median(seen) for step, seen in by_step.items()}
        for arm, by_step in times.items()
    }


def times_are_estimated(data: ReportData) -> bool:
    """Say whether the folder lacks the times of its evaluations."""
    return any(point.seconds is None for point in data.folder.curves)


def training_caption(data: ReportData) -> str:
    """Say what the curves of measure and loss are, and how their axes are scaled."""
    return f"{over_seeds(data)} {ZOOM_NOTE}"


def over_seeds(data: ReportData) -> str:
    """Say what lines and bands are."""
    if data.seeds == 1:
        return "Line: the only seed."
    return (
        f"Line: median over {data.seeds} paired seeds; band: middle half of the seeds (not drawn "
        "for controls)."
    )


def effect_curves(data: ReportData) -> list[Drawing]:
    """Return relative change, cosine and trigger rate, with a curve per correction and stage."""
    styles = _effect_styles(data.styles, data.effects)
    drawings = []
    for field, (title, label) in EFFECT_FIGURES.items():
        name = f"effect-{field.replace('_', '-')}"
        rows = [(series_of(row), row.step, float(getattr(row, field))) for row in data.effects]
        marks = _in_order(marks_of_bands(name, bands(rows)), styles)
        if marks:
            drawing = Drawing(
                name=name,
                kind="curves",
                title=title,
                x_label=STEPS,
                y_label=label,
                marks=marks,
                styles=styles,
                log=field == "relative_change" and _spans_decades(marks),
                span=(-0.03, 1.03) if field == "trigger_rate" else None,
            )
            drawings.append(drawing)
    return drawings


def series_of(effect: Effect) -> str:
    """Return the name of a curve of effects: arm and stage, and the correction if it differs."""
    if effect.correction == effect.arm:
        return f"{effect.arm}: {effect.stage}"
    return f"{effect.arm}: {effect.correction}, {effect.stage}"


def quality_curve(data: ReportData) -> list[Drawing]:
    """Return the cosine of the corrected and the large batch's gradient over training."""
    rows = [(quality.arm, quality.step, quality.cosine_corrected) for quality in data.qualities]
    marks = _in_order(marks_of_bands("quality-steps", bands(rows)), data.styles)
    if not marks:
        return []
    drawing = Drawing(
        name="quality-steps",
        kind="curves",
        title="Cosine over training",
        caption=(
            "The gradient that the optimizer used, against the large batch's. " + over_seeds(data)
        ),
        x_label=STEPS,
        y_label="cosine",
        marks=marks,
        styles=styles_of(data.styles, marks),
    )
    return [drawing]


def _training_curve(
    data: ReportData, field: str, times: Mapping[str, Mapping[int, float]] | None
) -> list[Drawing]:
    """Return the figure of "measure" or "loss" against `times`, or against steps without them."""
    axis = "steps" if times is None else "time"
    name = f"{field}-{axis}"
    of_measure = field == "measure"
    label = name_on_validation(data.measure) if of_measure else "training loss"
    seen = [
        (point.arm, point.step, point.value if of_measure else point.loss)
        for point in data.folder.curves
    ]
    rows = [(arm, step, value) for arm, step, value in seen if value is not None]
    marks = _in_order(marks_of_bands(name, bands(rows), times), data.styles)
    if not marks:
        return []
    drawing = Drawing(
        name=name,
        kind="curves",
        title=f"{label[0].upper()}{label[1:]} against {axis}",
        caption="" if times is None else TIME_NOTE,
        section_caption=training_caption(data),
        x_label=STEPS if times is None else TIME,
        y_label=label,
        marks=marks,
        styles=styles_of(data.styles, marks),
        reference=data.target if of_measure else None,
        zoomed=True,
        far_off=_far_off(data) if of_measure else frozenset(),
    )
    return [drawing]


def _far_off(data: ReportData) -> frozenset[str]:
    return far_off(data.summaries, higher_is_better=data.measure.higher_is_better)


def _in_order(marks: Iterable[Mark], styles: Mapping[str, Style]) -> list[Mark]:
    """Return the marks that have a number and a style, series by series as in the legend."""
    order = list(styles)
    drawable = [mark for mark in marks if mark.series in styles and not _is_nan(mark.y)]
    return sorted(drawable, key=lambda mark: order.index(mark.series))


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)


def _effect_styles(styles: Mapping[str, Style], effects: Iterable[Effect]) -> dict[str, Style]:
    """Return a style per curve: its arm's colour, marker and dashes by its place in the arm."""
    found: dict[str, Style] = {}
    for arm, style in styles.items():
        series = dict.fromkeys(series_of(effect) for effect in effects if effect.arm == arm)
        for place, name in enumerate(series):
            found[name] = _style_at(style, place)
    return found


def _style_at(style: Style, place: int) -> Style:
    """Return how the curve at a place among the curves of an arm looks; the first as the arm."""
    marker = MARKERS[(MARKERS.index(style.marker) + place) % len(MARKERS)]
    dashes = DASHES[place % len(DASHES)] if place > 0 else style.dashes
    return replace(style, marker=marker, dashes=dashes)


def _spans_decades(marks: Iterable[Mark]) -> bool:
    values = [mark.y for mark in marks if mark.y is not None]
    return min(values) > 0 and max(values) / min(values) > 20
