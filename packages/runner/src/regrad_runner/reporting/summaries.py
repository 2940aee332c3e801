"""The arms of a comparison, each summed up."""

from __future__ import annotations

from collections.abc import Sequence

from regrad_runner.results.outcomes import Result
from regrad_runner.statistics.verdicts import ArmSummary, summarize
from regrad_runner.workloads.workload import Measure


def summarize_results(results: Sequence[Result], measure: Measure) -> list[ArmSummary]:
    """Return one summary per arm, in the order in which the arms first ran.

    Raises:
        ValueError: If there is no run.
    """
    if not results:
        raise ValueError(
            "folder must hold runs, got none; regrad compare --resume --out starts them"
        )
    controls_only = _arms_that_are_only_controls(results)
    must_beat = {
        result.arm: result.must_beat for result in results if result.arm not in controls_only
    }
    return summarize(
        [result.as_run_row() for result in results],
        controls=must_beat,
        higher_is_better=measure.higher_is_better,
    )


def baseline_of(summaries: Sequence[ArmSummary]) -> str | None:
    """Return the name of the arm that the others are compared with; None if it was not run."""
    for summary in summaries:
        if summary.verdict == "baseline":
            return summary.arm
    return None


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
