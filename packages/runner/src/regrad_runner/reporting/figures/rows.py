"""The figures with a row per arm: differences, steps to the target, overhead, gradient quality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Literal

from regrad_runner.diagnostics.gradient_quality import Quality
from regrad_runner.reporting.figures.families import far_off, in_families
from regrad_runner.reporting.figures.marks import Drawing, Mark, styles_of
from regrad_runner.reporting.numbers import target_in_words
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.reporting.styles import Style
from regrad_runner.reporting.summaries import steps_of_runs, verdict_in_words
from regrad_runner.statistics.intervals import median_interval
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import name_on_validation

MEDIAN_CAPTION = (
    "Marks: one per run; bar: median; line: interval that covers the median with at least 95 %, "
    "from the order of the runs (6 or more)."
)


def difference_rows(data: ReportData) -> list[Drawing]:
    """Return the paired differences from the baseline: what the verdicts rest on."""
    reference = {run.seed: run.value for run in data.usable_runs(data.baseline)}
    marks = []
    words = {}
    for summary in data.summaries:
        if summary.difference is None:
            if summary.verdict != "baseline" and not summary.seeds:
                words[summary.arm] = "no run has a number"
            continue
        differences = {
            run.seed: run.value - reference[run.seed]
            for run in data.usable_runs(summary.arm)
            if run.seed in reference
        }
        low, high = summary.interval or (None, None)
        mean = Mark(
            figure="differences",
            series=summary.arm,
            seeds=len(differences),
            x=summary.difference,
            low=low,
            high=high,
        )
        marks += [*_dots("differences", summary.arm, differences), mean]
        words[summary.arm] = verdict_in_words(summary)
    if not marks:
        return []
    better: Literal["left", "right"] = "right" if data.measure.higher_is_better else "left"
    drawing = Drawing(
        name="differences",
        kind="dots",
        title="Difference from the baseline",
        caption=(
            "Marks: one per seed; bar: mean; line: its 95 % interval (Student's t). "
            f"{better.capitalize()} of zero is better. Dashed: a control."
        ),
        x_label=f"difference in {data.measure.name}",
        marks=marks,
        styles={arm: data.styles[arm] for arm in in_families(data.summaries) if arm in words},
        reference=0.0,
        words=words,
        far_off=far_off(data.summaries, higher_is_better=data.measure.higher_is_better),
        better=better,
    )
    return [drawing]


def target_rows(data: ReportData) -> list[Drawing]:
    """Return the steps to the target, if there is one."""
    if data.target is None:
        return []
    reached = steps_of_runs(data.folder.results, data.folder.curves, data.measure).steps
    marks = []
    words = {}
    for summary in data.summaries:
        steps = {
            run.seed: reached.get((summary.arm, run.seed)) for run in data.usable_runs(summary.arm)
        }
        if steps:
            marks += _dots("steps-to-target", summary.arm, steps)
            marks.append(_median_mark("steps-to-target", summary.arm, steps.values()))
            words[summary.arm] = _steps_in_words(summary, len(steps))
    if not marks:
        return []
    target = target_in_words(data.target, data.measure)
    drawing = Drawing(
        name="steps-to-target",
        kind="dots",
        title=f"Steps to {name_on_validation(data.measure)} {target}",
        caption=(
            f"{MEDIAN_CAPTION} A run reaches the target when the running median of three "
            "evaluations does; × at the edge: a run that missed it. Right: median ratio to the "
            "baseline's steps of the same seed."
        ),
        x_label="optimizer steps to the target",
        marks=marks,
        styles=styles_of(data.styles, marks),
        words=words,
    )
    return [drawing]


def _steps_in_words(summary: ArmSummary, runs: int) -> str:
    """Return the ratio of an arm's steps, and how many runs missed."""
    parts = []
    if summary.steps_ratio is not None and summary.verdict != "baseline":
        parts.append(f"{summary.steps_ratio:.2f}×")
    if summary.misses:
        parts.append(f"{summary.misses} of {runs} missed")
    return ", ".join(parts)


def overhead_rows(data: ReportData) -> list[Drawing]:
    """Return the time per step as a ratio to the baseline's, as far as it was measured."""
    marks = []
    words = {}
    for summary in data.summaries:
        found = data.step_times.get(summary.arm)
        if found is not None:
            low, high = found.interval or (None, None)
            mark = Mark(
                figure="overhead",
                series=summary.arm,
                seeds=1,
                x=found.ratio,
                low=low,
                high=high,
            )
            marks.append(mark)
            words[summary.arm] = f"{found.ratio:.2f}×"
    if not marks:
        return []
    drawing = Drawing(
        name="overhead",
        kind="bars",
        title="Time per step",
        caption=(
            "Steps of the arm alternate with steps of the baseline, up to 30 pairs in one "
            "process. Bar: median ratio of a pair; line: interval that covers the median with at "
            "least 95 %."
        ),
        x_label="time per step ÷ the baseline's",
        marks=marks,
        styles=styles_of(data.styles, marks),
        reference=1.0,
        words=words,
    )
    return [drawing]


def quality_rows(data: ReportData) -> list[Drawing]:
    """Return cosine and norm ratio of raw and corrected gradients to the large batch's."""
    return [*_quality(data, "cosine", "Cosine"), *_quality(data, "norm_ratio", "Norm ratio")]


def _quality(data: ReportData, field: str, title: str) -> list[Drawing]:
    name = f"quality-{field.replace('_', '-')}"
    marks: list[Mark] = []
    styles: dict[str, Style] = {}
    for arm, style in data.styles.items():
        probes = [row for row in data.qualities if row.arm == arm]
        for word, values in _raw_and_corrected(probes, field).items():
            series = f"{arm}, {word}"
            styles[series] = replace(style, control=style.control or word == "raw")
            marks += _dots(name, series, values)
            if values:
                mean = fmean(values.values())
                marks.append(Mark(figure=name, series=series, seeds=len(values), x=mean))
    if not marks:
        return []
    drawing = Drawing(
        name=name,
        kind="dots",
        title=f"{title}, raw and corrected",
        caption=(
            "Marks: mean over the probes of one run; bar: mean over the runs. The large batch's "
            "gradient itself would be at 1."
        ),
        x_label=f"{title.lower()} against the large batch's gradient",
        marks=marks,
        styles=styles_of(styles, marks),
        reference=1.0,
    )
    return [drawing]


def _raw_and_corrected(probes: Sequence[Quality], field: str) -> dict[str, dict[int, float]]:
    """Return a number of raw and corrected gradients by seed; one row if nothing was changed."""
    if not probes:
        return {}
    raw = _mean_by_seed(probes, f"{field}_raw")
    corrected = _mean_by_seed(probes, f"{field}_corrected")
    is_changed = any(
        not math.isclose(raw[seed], value, rel_tol=1e-3)
        for seed, value in corrected.items()
        if seed in raw
    )
    if not is_changed:
        return {"raw = corrected": raw}
    return {"raw": raw, "corrected": corrected}


def _mean_by_seed(probes: Iterable[Quality], field: str) -> dict[int, float]:
    """Return the mean over the finite probes of each run that has any."""
    found: dict[int, list[float]] = {}
    for probe in probes:
        value = getattr(probe, field)
        if math.isfinite(value):
            found.setdefault(probe.seed, []).append(value)
    return {seed: fmean(values) for seed, values in found.items()}


def _dots(figure: str, series: str, values: Mapping[int, float | None]) -> list[Mark]:
    """Return a mark per run; None is a run without a value."""
    return [
        Mark(figure=figure, series=series, seed=seed, x=value) for seed, value in values.items()
    ]


def _median_mark(figure: str, series: str, values: Iterable[float | None]) -> Mark:
    """Return the mark of the median and its interval; None counts as larger than any number."""
    numbers = [math.inf if value is None else float(value) for value in values]
    low, high = median_interval(numbers) or (math.inf, math.inf)
    return Mark(
        figure=figure,
        series=series,
        seeds=len(numbers),
        x=_if_finite(median(numbers)),
        low=_if_finite(low),
        high=_if_finite(high),
    )


def _if_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
