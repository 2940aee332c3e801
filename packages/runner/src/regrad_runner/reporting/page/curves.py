"""The figures with curves over training: measure and loss, effects of corrections, gradient quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import median

from regrad_runner.diagnostics.effects import Effect
from regrad_runner.reporting.page.marks import Drawing, Mark, marks_of_bands
from regrad_runner.reporting.page.source import Source
from regrad_runner.reporting.styles import DASHES, MARKERS, Style
from regrad_runner.results.outcomes import CurvePoint
from regrad_runner.statistics.bands import bands
from regrad_runner.workloads.workload import name_on_validation

LATE = "Vertical axes fit the second half of training; what came before may leave them."
WHEN = "A point stands at the median time at which its evaluation came."
STEPS, TIME = "optimizer steps", "time in training steps, s"
EFFECTS = {
    "relative_change": ("Relative change", "relative change"),
    "cosine": ("Cosine of before and after", "cosine"),
    "trigger_rate": ("Trigger rate", "trigger rate"),
}


def training_curves(source: Source) -> list[Drawing]:
    """Return the measure and the loss against steps and against time."""
    measure = name_on_validation(source.measure)
    values: dict[str, tuple[str, Callable[[CurvePoint], float]]] = {
        "measure": (measure, lambda point: point.value),
        "loss": ("training loss", lambda point: point.loss),
    }
    times = times_of_evaluations(source)
    return [
        drawing
        for axis, places in (("steps", None), ("time", times))
        for name, (label, value) in values.items()
        if (drawing := _curve(source, f"{name}-{axis}", label, value, places))
    ]


def times_of_evaluations(source: Source) -> dict[str, dict[int, float]]:
    """Return the median time at which each evaluation of each arm came, over its seeds.

    In folders of before these times were kept it is the number of steps times the run's median time per step.
    """
    paces = {(result.arm, result.seed): result.step_seconds for result in source.folder.results}
    times: dict[str, dict[int, list[float]]] = {}
    for point in source.folder.curves:
        seconds = (
            point.step * paces[point.arm, point.seed] if point.seconds is None else point.seconds
        )
        times.setdefault(point.arm, {}).setdefault(point.step, []).append(seconds)
    return {
        arm: {step: median(seen) for step, seen in by_step.items()}
        for arm, by_step in times.items()
    }


def times_are_estimated(source: Source) -> bool:
    """Say whether the folder does not hold the times of its evaluations."""
    return any(point.seconds is None for point in source.folder.curves)


def effect_curves(source: Source) -> list[Drawing]:
    """Return relative change, cosine and trigger rate over training, a curve per arm, correction and stage."""
    styles = _effect_styles(source.styles, source.effects)
    drawings = []
    for field, (title, label) in EFFECTS.items():
        rows = [(series_of(row), row.step, float(getattr(row, field))) for row in source.effects]
        name = f"effect-{field.replace('_', '-')}"
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
            )
            drawings.append(
                replace(
                    drawing,
                    log=field == "relative_change" and _spans_decades(marks),
                    span=(-0.03, 1.03) if field == "trigger_rate" else None,
                )
            )
    return drawings


def series_of(effect: Effect) -> str:
    """Return the name of a curve of effects: the arm, the correction where the arm has another name, and the stage."""
    what = (
        effect.stage if effect.correction == effect.arm else f"{effect.correction}, {effect.stage}"
    )
    return f"{effect.arm}: {what}"


def quality_curve(source: Source) -> list[Drawing]:
    """Return the cosine of the corrected gradient and a large batch's over training."""
    rows = [(quality.arm, quality.step, quality.cosine_corrected) for quality in source.qualities]
    marks = _in_order(marks_of_bands("quality-steps", bands(rows)), source.styles)
    drawing = Drawing(
        name="quality-steps",
        kind="curves",
        title="Cosine over training",
        caption=f"The gradient that the optimizer read against the large batch's. {over_seeds(source)}",
        x_label=STEPS,
        y_label="cosine",
        marks=marks,
        styles=_of_marks(source.styles, marks),
    )
    return [drawing] if marks else []


def over_seeds(source: Source) -> str:
    """Say what lines and bands are."""
    if source.seeds == 1:
        return "Line: the only seed."
    return f"Line: median over {source.seeds} paired seeds; band: middle half of the seeds (controls have none)."


def _curve(
    source: Source,
    name: str,
    label: str,
    value: Callable[[CurvePoint], float],
    places: Mapping[str, Mapping[int, float]] | None,
) -> Drawing | None:
    found = bands((point.arm, point.step, value(point)) for point in source.folder.curves)
    marks = _in_order(marks_of_bands(name, found, places), source.styles)
    if not marks:
        return None
    against = "steps" if places is None else "time"
    target = source.measure.target if name.startswith("measure") else None
    return Drawing(
        name=name,
        kind="curves",
        title=f"{label[0].upper()}{label[1:]} against {against}",
        caption="" if places is None else WHEN,
        x_label=STEPS if places is None else TIME,
        y_label=label,
        marks=marks,
        styles=_of_marks(source.styles, marks),
        reference=target,
        zoomed=True,
    )


def _in_order(marks: Iterable[Mark], styles: Mapping[str, Style]) -> list[Mark]:
    order = list(styles)
    return sorted(
        (m for m in marks if m.series in styles and m.y == m.y),
        key=lambda mark: order.index(mark.series),
    )


def _of_marks(styles: Mapping[str, Style], marks: Iterable[Mark]) -> dict[str, Style]:
    drawn = {mark.series for mark in marks}
    return {series: style for series, style in styles.items() if series in drawn}


def _effect_styles(styles: Mapping[str, Style], effects: Iterable[Effect]) -> dict[str, Style]:
    """Return a style per curve: the colour of its arm, dashes and marker by its place within the arm."""
    found: dict[str, Style] = {}
    places: dict[str, list[str]] = {}
    order = list(styles)
    for effect in sorted(
        effects, key=lambda effect: order.index(effect.arm) if effect.arm in styles else 0
    ):
        series, seen = series_of(effect), places.setdefault(effect.arm, [])
        if series in found or effect.arm not in styles:
            continue
        seen.append(series)
        style, place = styles[effect.arm], len(seen) - 1
        marker = MARKERS[(MARKERS.index(style.marker) + place) % len(MARKERS)]
        found[series] = replace(
            style, marker=marker, dashes=DASHES[place % len(DASHES)] if place else style.dashes
        )
    return found


def _spans_decades(marks: Iterable[Mark]) -> bool:
    values = [mark.y for mark in marks if mark.y is not None]
    return min(values) > 0 and max(values) / min(values) > 20
