"""The figures with a row per arm: differences, steps to the target, time per step, gradient quality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

from regrad_runner.diagnostics.gradient_quality import Quality
from regrad_runner.reporting.page.marks import Drawing, Mark
from regrad_runner.reporting.page.source import Source
from regrad_runner.reporting.styles import Style
from regrad_runner.statistics.intervals import median_interval
from regrad_runner.statistics.rows import RunRow
from regrad_runner.workloads.workload import name_on_validation

MEDIAN = (
    "Dot: a run; bar: median; line: interval of at least 95 % for the median, from the order of the runs, "
    "where there are 6 or more."
)


def difference_rows(source: Source) -> list[Drawing]:
    """Return the paired differences to the baseline: what the verdicts rest on."""
    reference = {run.seed: run.value for run in _runs(source, source.baseline)}
    marks, words = [], {}
    for summary in source.summaries:
        if summary.difference is None:
            continue
        pairs = [
            (run.seed, run.value - reference[run.seed])
            for run in _runs(source, summary.arm)
            if run.seed in reference
        ]
        low, high = summary.interval or (None, None)
        marks += _dots("differences", summary.arm, pairs)
        whole = Mark(
            figure="differences", series=summary.arm, seeds=len(pairs), x=summary.difference
        )
        marks.append(replace(whole, low=low, high=high))
        words[summary.arm] = summary.verdict
    drawing = Drawing(
        name="differences",
        kind="dots",
        title=f"Difference to {source.baseline}",
        caption=(
            "Dot: a pair of runs of one seed; bar: their mean; line: its 95 % interval (Student's t). "
            f"{'Right' if source.measure.higher_is_better else 'Left'} of the line is better."
        ),
        x_label=f"difference in {source.measure.name}",
        marks=marks,
        styles=_drawn(source.styles, marks),
        reference=0.0,
        words=words,
    )
    return [drawing] if marks else []


def target_rows(source: Source) -> list[Drawing]:
    """Return the steps to the target, where there is one."""
    target = source.measure.target
    if target is None:
        return []
    marks, words = [], {}
    for summary in source.summaries:
        runs = _runs(source, summary.arm)
        if not runs:
            continue
        marks += [
            _dot("steps-to-target", summary.arm, run.seed, run.steps_to_target) for run in runs
        ]
        steps = [
            math.inf if run.steps_to_target is None else float(run.steps_to_target) for run in runs
        ]
        marks.append(_median_mark("steps-to-target", summary.arm, steps))
        words[summary.arm] = f"{summary.misses} of {len(runs)} missed" if summary.misses else ""
    drawing = Drawing(
        name="steps-to-target",
        kind="dots",
        title=f"Steps to {name_on_validation(source.measure)} {target:g}",
        caption=f"{MEDIAN} Reached: the running median of three evaluations; × at the edge: a run that missed.",
        x_label="optimizer steps to the target",
        marks=marks,
        styles=_drawn(source.styles, marks),
        words=words,
    )
    return [drawing] if marks else []


def overhead_rows(source: Source) -> list[Drawing]:
    """Return the time per step as a ratio to the baseline's of the same seed."""
    reference = {run.seed: run.step_seconds for run in _runs(source, source.baseline)}
    marks, words = [], {}
    for summary in source.summaries:
        pairs = [
            (run.seed, run.step_seconds / reference[run.seed])
            for run in _runs(source, summary.arm)
            if reference.get(run.seed)
        ]
        if not pairs:
            continue
        marks += _dots("overhead", summary.arm, pairs)
        ratios = [ratio for _, ratio in pairs]
        marks.append(_median_mark("overhead", summary.arm, ratios))
        words[summary.arm] = f"{median(ratios):.2f}×"
    drawing = Drawing(
        name="overhead",
        kind="bars",
        title="Time per step",
        caption=f"Bar: median of the paired ratios of a seed. {MEDIAN}",
        x_label=f"time per step ÷ {source.baseline}'s",
        marks=marks,
        styles=_drawn(source.styles, marks),
        reference=1.0,
        words=words,
    )
    return [drawing] if marks else []


def quality_rows(source: Source) -> list[Drawing]:
    """Return cosine and norm ratio of raw and corrected gradients against the large batch's."""
    by_arm = {arm: [row for row in source.qualities if row.arm == arm] for arm in source.styles}
    probed = {arm: rows for arm, rows in by_arm.items() if rows}
    return [
        drawing
        for field, title in (("cosine", "Cosine"), ("norm_ratio", "Norm ratio"))
        if (drawing := _quality(source, field, title, probed))
    ]


def _quality(
    source: Source, field: str, title: str, probed: Mapping[str, Sequence[Quality]]
) -> Drawing | None:
    name, marks, styles = f"quality-{field.replace('_', '-')}", list[Mark](), dict[str, Style]()
    for arm, rows in probed.items():
        raw, corrected = _by_seed(rows, f"{field}_raw"), _by_seed(rows, f"{field}_corrected")
        changed = any(
            not math.isclose(raw[seed], value, rel_tol=1e-3)
            for seed, value in corrected.items()
            if seed in raw
        )
        for word, values in (
            (("raw", raw), ("corrected", corrected)) if changed else (("raw = corrected", raw),)
        ):
            series = f"{arm}, {word}"
            styles[series] = replace(
                source.styles[arm], control=word == "raw" or source.styles[arm].control
            )
            marks += _dots(name, series, values.items())
            if values:
                marks.append(
                    Mark(figure=name, series=series, seeds=len(values), x=fmean(values.values()))
                )
    if not marks:
        return None
    return Drawing(
        name=name,
        kind="dots",
        title=f"{title}, raw and corrected",
        caption="Dot: mean over a run's probes; bar: mean over the runs. The large batch's gradient would be at 1.",
        x_label=f"{title.lower()} against the large batch's gradient",
        marks=marks,
        styles=_drawn(styles, marks),
        reference=1.0,
    )


def _by_seed(rows: Iterable[Quality], field: str) -> dict[int, float]:
    """Return the mean over the probes of each run; runs without a finite number are left out."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if math.isfinite(value := getattr(row, field)):
            found.setdefault(row.seed, []).append(value)
    return {seed: fmean(values) for seed, values in found.items()}


def _runs(source: Source, arm: str) -> list[RunRow]:
    rows = (result.as_run_row() for result in source.folder.results if result.arm == arm)
    return sorted((row for row in rows if row.usable), key=lambda row: row.seed)


def _dots(figure: str, series: str, pairs: Iterable[tuple[int, float]]) -> list[Mark]:
    return [_dot(figure, series, seed, value) for seed, value in pairs]


def _dot(figure: str, series: str, seed: int, value: float | None) -> Mark:
    return Mark(figure=figure, series=series, seed=seed, x=value)


def _median_mark(figure: str, series: str, values: Sequence[float]) -> Mark:
    low, high = median_interval(values) or (math.inf, math.inf)
    middle = median(values)
    return Mark(
        figure=figure,
        series=series,
        seeds=len(values),
        x=middle if math.isfinite(middle) else None,
        low=low if math.isfinite(low) else None,
        high=high if math.isfinite(high) else None,
    )


def _drawn(styles: Mapping[str, Style], marks: Iterable[Mark]) -> dict[str, Style]:
    series = {mark.series for mark in marks}
    return {name: style for name, style in styles.items() if name in series}
