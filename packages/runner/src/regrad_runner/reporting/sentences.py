"""The result of each arm in a sentence."""

from __future__ import annotations

from regrad_runner.reporting.numbers import (
    count,
    difference_in_brackets,
    is_resolved,
    probability,
    ratio_interval,
    target_in_words,
    times_the_rate,
)
from regrad_runner.statistics.verdicts import FEWEST_SEEDS, ArmSummary
from regrad_runner.workloads.workload import Measure


def sentence(summary: ArmSummary, measure: Measure) -> str:
    """Say in one line what an arm achieved, and the reason for its verdict.

    Args:
        summary: The arm.
        measure: What was compared.

    Example:
        >>> few = ArmSummary(
        ...     arm="xgrad", seeds=3, failed=0, mean=0.98, sd=0.01, verdict="too few seeds", pairs=3
        ... )
        >>> sentence(few, Measure())
        'xgrad: too few seeds for a verdict: 3 shared with the baseline, at least 6 are needed.'
    """
    return f"{summary.arm}: {reason(summary, measure)}."


def reason(summary: ArmSummary, measure: Measure) -> str:
    """Say the same without the name of the arm and without a full stop."""
    parts = [
        _verdict(summary, measure),
        _rate(summary),
        _target(summary, measure),
        _unsteadiness(summary),
        _failures(summary),
        _divergences(summary),
    ]
    return "; ".join(part for part in parts if part)


def _verdict(summary: ArmSummary, measure: Measure) -> str:
    """Return the verdict in words, with its evidence if it rests on a test."""
    if summary.verdict == "baseline":
        return f"the baseline, {count(summary.seeds, 'seed')}"
    if summary.verdict == "control":
        if not summary.seeds:
            return "a control without a run that ended with a number"
        difference = difference_in_brackets(summary, measure) or "unknown"
        return f"a control; difference from the baseline {difference}"
    if summary.verdict == "inert":
        return _inert(summary, measure)
    if summary.verdict == "too few seeds":
        return (
            f"too few seeds for a verdict: {summary.pairs} shared with the baseline, at least "
            f"{FEWEST_SEEDS} are needed"
        )
    return _tested_verdict(summary, measure)


def _inert(summary: ArmSummary, measure: Measure) -> str:
    """Say that an arm changed nothing, and where numbers that differ may come from."""
    runs = count(summary.seeds, "run")
    if not summary.difference and (summary.interval is None or not any(summary.interval)):
        return f"changed nothing in {runs}: it equals the baseline"
    difference = difference_in_brackets(summary, measure)
    return (
        f"changed nothing in the measured steps of {runs}; its difference from the baseline, "
        f"{difference}, comes from rounding, or from steps between those"
    )


def _tested_verdict(summary: ArmSummary, measure: Measure) -> str:
    evidence = _evidence(summary, measure)
    if summary.verdict == "no evidence":
        return f"no evidence of a difference from the baseline ({evidence})"
    if summary.verdict == "worse":
        return f"worse than the baseline ({evidence})"
    better = f"better than the baseline ({evidence})"
    if summary.verdict == "better":
        return f"{better}{_better_than_control(summary, measure)}"
    return f"{better}, but {_why_not_better(summary, measure)}"


def _evidence(summary: ArmSummary, measure: Measure) -> str:
    """Return the result of the comparison with the baseline."""
    difference = difference_in_brackets(summary, measure) or "no seed with both numbers"
    p_value = f"{probability(summary.p_adjusted)} after Holm"
    seeds = count(summary.pairs, "seed")
    if summary.diverged_pairs:
        seeds += f", {summary.diverged_pairs} of them with one diverged run: tested by ranks"
    return f"{difference}, {p_value}, {seeds}"


def _better_than_control(summary: ArmSummary, measure: Measure) -> str:
    if summary.against_control is None:
        return "; it has no control to beat"
    return f" and than its control {_control_evidence(summary, measure)}"


def _why_not_better(summary: ArmSummary, measure: Measure) -> str:
    """Say why an arm that beats the baseline is not "better"."""
    if summary.against_control is not None:
        control = _control_evidence(summary, measure)
        return f"not shown to be better than its control {control}"
    if summary.control is not None:
        return f"its control {summary.control} was not run"
    return "no control was run"


def _control_evidence(summary: ArmSummary, measure: Measure) -> str:
    """Return the control's name and the result of the comparison with it."""
    test = summary.against_control
    if test is None:
        return str(summary.control)
    difference = difference_in_brackets(test, measure)
    return f"{summary.control} ({difference}, {probability(test.p_value)} before Holm)"


def _rate(summary: ArmSummary) -> str:
    """Say how the learning rate compares with the baseline's, if it differs."""
    if summary.rate_ratio is None or summary.rate_ratio == 1 or not summary.seeds:
        return ""
    return times_the_rate(summary.rate_ratio)


def _target(summary: ArmSummary, measure: Measure) -> str:
    """Say how fast the target was reached, if there is one and any run that could."""
    is_without_verdict = summary.verdict in ("inert", "too few seeds")
    if summary.target is None or is_without_verdict or not summary.seeds:
        return ""
    target = target_in_words(summary.target, measure)
    if summary.steps_ratio is None or summary.verdict == "baseline":
        hits = summary.seeds - summary.misses
        return f"{hits} of {summary.seeds} runs reached {target}"
    if not is_resolved(summary.steps_interval):
        return (
            f"steps to reach {target}: not resolved, as too many runs of this arm or of the "
            "baseline miss it"
        )
    ratio = f"{summary.steps_ratio:.2f} {ratio_interval(summary.steps_interval)}".strip()
    return (
        f"takes {ratio} times the baseline's steps to reach {target} "
        f"({probability(summary.steps_p)}, not adjusted)"
    )


def _unsteadiness(summary: ArmSummary) -> str:
    """Say how much more an unsteady arm's runs differ than others do."""
    if not summary.unsteady or summary.spread_ratio is None:
        return ""
    return (
        f"unsteady: its runs spread {summary.spread_ratio:.1f} times as much as those of "
        f"{summary.steadiest} ({probability(summary.spread_p)} if all arms spread alike)"
    )


def _failures(summary: ArmSummary) -> str:
    if not summary.failed:
        return ""
    verb = "is" if summary.failed == 1 else "are"
    return f"{count(summary.failed, 'run')} failed and {verb} left out"


def _divergences(summary: ArmSummary) -> str:
    if not summary.diverged:
        return ""
    verb = "counts" if summary.diverged == 1 else "count"
    return f"{count(summary.diverged, 'run')} diverged and {verb} as worse than any number"
