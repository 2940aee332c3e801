"""The result in one sentence, and further remarks in a second one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from regrad_runner.statistics.verdicts import FEWEST_SEEDS, ArmSummary

MOST_NAMES = 4


def headline(summaries: Sequence[ArmSummary]) -> str:
    """Return the answer: which corrections are better than the baseline and than their controls.

    Args:
        summaries: One per arm.

    Example:
        >>> def arm(name, verdict):
        ...     return ArmSummary(arm=name, seeds=6, failed=0, mean=1.0, sd=0.1, verdict=verdict)
        >>> arms = [arm("baseline", "baseline"), arm("agc", "no evidence")]
        >>> headline(arms)
        'No correction is shown to be better than the baseline.'
        >>> headline([*arms, arm("xgrad", "better than nothing")])
        'xgrad is better than the baseline, but not shown to be better than a control.'
    """
    tested = _tested(summaries)
    if not tested:
        return "Only the baseline was run: there is nothing to compare."
    if all(summary.verdict == "too few seeds" for summary in tested):
        most = max(summary.pairs for summary in tested)
        return f"Too few seeds for a verdict: {most} shared of at least {FEWEST_SEEDS}."
    better = [summary for summary in tested if summary.verdict == "better"]
    if better:
        return f"{_are(better)} better than the baseline{_beaten(better)}."
    halfway = [summary for summary in tested if summary.verdict == "better than nothing"]
    if halfway:
        own = _controls(halfway)
        return f"{_are(halfway)} better than the baseline, but not shown to be better than {own}."
    return "No correction is shown to be better than the baseline."


def rest(summaries: Sequence[ArmSummary]) -> str:
    """Return what the headline leaves open: the results of the other corrections.

    Args:
        summaries: One per arm.

    Example:
        >>> def arm(name, verdict):
        ...     return ArmSummary(arm=name, seeds=6, failed=0, mean=1.0, sd=0.1, verdict=verdict)
        >>> rest([arm("xgrad", "better"), arm("agc", "worse"), arm("clip-norm", "no evidence")])
        'agc is worse than the baseline. No evidence of a difference: clip-norm.'
    """
    tested = _tested(summaries)
    if all(summary.verdict == "too few seeds" for summary in tested):
        return ""
    has_better = any(summary.verdict == "better" for summary in tested)
    sentences: list[tuple[str, Callable[[list[ArmSummary]], str]]] = [
        ("worse", lambda arms: f"{_are(arms)} worse than the baseline."),
        ("no evidence", lambda arms: f"No evidence of a difference: {_names(arms)}."),
        ("inert", lambda arms: f"{_names(arms)} changed no measured step."),
        ("too few seeds", lambda arms: f"Too few seeds for a verdict: {_names(arms)}."),
    ]
    if has_better:
        sentences.insert(0, ("better than nothing", _only_than_nothing))
    found = []
    for verdict, say in sentences:
        arms = [summary for summary in tested if summary.verdict == verdict]
        if arms:
            found.append(say(arms))
    return " ".join(found)


def _tested(summaries: Sequence[ArmSummary]) -> list[ArmSummary]:
    return [summary for summary in summaries if summary.verdict not in ("baseline", "control")]


def _only_than_nothing(arms: list[ArmSummary]) -> str:
    return (
        f"{_are(arms)} better than the baseline, but not shown to be better than {_controls(arms)}."
    )


def _are(arms: Sequence[ArmSummary]) -> str:
    return f"{_names(arms)} {'is' if len(arms) == 1 else 'are'}"


def _names(arms: Sequence[ArmSummary]) -> str:
    """Return the names of arms as a list in words; of many the first ones."""
    names = [summary.arm for summary in arms]
    if len(names) > MOST_NAMES:
        names = [*names[: MOST_NAMES - 1], f"{len(names) - MOST_NAMES + 1} more"]
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _beaten(better: Sequence[ArmSummary]) -> str:
    """Say what else was beaten than the baseline."""
    with_control = [summary for summary in better if summary.against_control is not None]
    if not with_control:
        return " (without a control to beat)"
    if len(with_control) < len(better):
        return f" and, where there is one, than {'its' if len(better) == 1 else 'their'} control"
    return f" and than {_controls(better)}"


def _controls(arms: Sequence[ArmSummary]) -> str:
    """Return the controls of arms in words."""
    if len(arms) > 1:
        return "their controls"
    control = arms[0].control
    return "a control" if control is None else f"its control, {control}"
