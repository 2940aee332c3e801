"""The arms of a comparison, each summarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from regrad_runner.diagnostics.step_times import StepTime, kept_step_times
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import CurvePoint, Result
from regrad_runner.settings.arms import BASELINE
from regrad_runner.statistics.steps import StepsToTarget, steps_to_baseline
from regrad_runner.statistics.verdicts import ArmSummary, summarize
from regrad_runner.workloads.workload import BASELINE_TARGET, Measure


def summarize_folder(folder: ResultsFolder, measure: Measure) -> list[ArmSummary]:
    """Return one summary per arm of a comparison's folder, in the order of its runs.

    Raises:
        ValueError: If there is no run, or something in the folder is damaged.
    """
    step_times = kept_step_times(folder.path)
    return summarize_results(folder.results, measure, curves=folder.curves, step_times=step_times)


def summarize_results(
    results: Sequence[Result],
    measure: Measure,
    *,
    curves: Sequence[CurvePoint] = (),
    step_times: Mapping[str, StepTime] | None = None,
) -> list[ArmSummary]:
    """Return one summary per arm, in the order in which the arms first ran.

    Args:
        results: The runs.
        measure: What they are compared by.
        curves: Their evaluations on the validation samples, if steps to the baseline are to be
            counted.
        step_times: Time per step by arm, if it was measured.

    Raises:
        ValueError: If there is no run.
    """
    if not results:
        raise ValueError(
            "folder must hold runs, got none; regrad compare --resume --out DIR starts them"
        )
    controls_only = _arms_that_are_only_controls(results)
    must_beat = {
        result.arm: result.must_beat for result in results if result.arm not in controls_only
    }
    reached = steps_of_runs(results, curves, measure)
    # A script's evaluations may be counted in epochs, or one by one, and then its steps are too.
    ends: dict[tuple[str, int], int] = {}
    for point in curves:
        run = (point.arm, point.seed)
        ends[run] = max(point.step, ends.get(run, 0))
    rows = []
    for result in results:
        run = (result.arm, result.seed)
        row = result.as_run_row()
        steps = ends.get(run, row.steps)
        rows.append(replace(row, steps_to_target=reached.steps.get(run), steps=steps))
    summaries = summarize(
        rows,
        controls=must_beat,
        higher_is_better=measure.higher_is_better,
        target=reached.target,
    )
    ratios = _rate_ratios(results)
    measured = step_times or {}
    return [
        replace(
            summary,
            rate_ratio=ratios.get(summary.arm),
            time_ratio=measured[summary.arm].ratio if summary.arm in measured else None,
        )
        for summary in summaries
    ]


def _rate_ratios(results: Sequence[Result]) -> dict[str, float]:
    """Return each arm's learning rate over the baseline's; nothing if there is no rate."""
    rates = {result.arm: result.lr for result in results}
    own = rates.get(BASELINE, 0.0)
    if own <= 0:
        return {}
    return {arm: float(f"{rate / own:.6g}") for arm, rate in rates.items() if rate > 0}


def steps_of_runs(
    results: Sequence[Result], curves: Sequence[CurvePoint], measure: Measure
) -> StepsToTarget:
    """Return the target of a measure and when each run reached it first.

    A number is what the runs themselves counted to. What the baseline's runs came to, which no run
    knows, is counted from the curves.
    """
    if measure.target != BASELINE_TARGET:
        counted = {(result.arm, result.seed): result.steps_to_target for result in results}
        return StepsToTarget(target=measure.fixed_target, steps=counted)
    by_arm: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for result in results:
        if result.status != "failed":
            by_arm.setdefault(result.arm, {})[result.seed] = []
    for point in curves:
        runs = by_arm.get(point.arm, {})
        if point.seed in runs and point.step > 0:  # scripts may evaluate before the first step
            runs[point.seed].append((point.step, point.value))
    return steps_to_baseline(by_arm, baseline=BASELINE, higher_is_better=measure.higher_is_better)


def baseline_of(summaries: Sequence[ArmSummary]) -> str | None:
    """Return the name of the arm that the others are compared with; None if it was not run."""
    for summary in summaries:
        if summary.verdict == "baseline":
            return summary.arm
    return None


def target_of(summaries: Sequence[ArmSummary]) -> float | None:
    """Return what steps are counted to; None for nothing."""
    return summaries[0].target if summaries else None


def has_step_times(summaries: Sequence[ArmSummary]) -> bool:
    """Say whether the time per step of any arm was measured."""
    return any(summary.time_ratio is not None for summary in summaries)


def verdict_in_words(summary: ArmSummary) -> str:
    """Return the verdict on an arm, and whether it is unsteady.

    Example:
        >>> one = ArmSummary(
        ...     arm="xgrad", seeds=6, failed=0, mean=1.0, sd=1.0, verdict="better", unsteady=True
        ... )
        >>> verdict_in_words(one)
        'better, unsteady'
    """
    return f"{summary.verdict}, unsteady" if summary.unsteady else summary.verdict


def _arms_that_are_only_controls(results: Sequence[Result]) -> set[str]:
    """Return the arms that ran as a control alone.

    Folders of older versions do not say which arms these are: there it is every arm that another
    one must beat.
    """
    beaten = {result.must_beat for result in results}
    controls = set()
    for result in results:
        is_control = result.arm in beaten if result.control is None else result.control
        if is_control:
            controls.add(result.arm)
    return controls
