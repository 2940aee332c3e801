"""Corrections with their controls, and outlying arms that would hide what the others do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from regrad_runner.statistics.verdicts import ArmSummary

FAR = 4.0  # times as far from the baseline as the farthest of the others
FEWEST_OTHERS = 3


def families(summaries: Sequence[ArmSummary]) -> list[list[str]]:
    """Return each correction with the control that it must beat, in the order of the arms.

    A control of several corrections stands with the first of them; one that none must beat stands
    alone, at the end.
    """
    only_controls = [summary.arm for summary in summaries if summary.verdict == "control"]
    found = []
    placed: set[str] = set()
    for summary in summaries:
        if summary.verdict in ("baseline", "control"):
            continue
        members = [summary.arm]
        if summary.control in only_controls and summary.control not in placed:
            members.append(str(summary.control))
        placed.update(members)
        found.append(members)
    return [*found, *([arm] for arm in only_controls if arm not in placed)]


def in_families(summaries: Sequence[ArmSummary]) -> list[str]:
    """Return all arms but the baseline, each control behind its correction."""
    return list(chain.from_iterable(families(summaries)))


def far_off(summaries: Iterable[ArmSummary], *, higher_is_better: bool) -> frozenset[str]:
    """Return the arms that are so much worse than the others that these look alike beside them.

    An arm that is better is never among them, nor are there more than a quarter of the arms.
    """
    reach = {}
    for summary in summaries:
        if summary.difference is None:
            continue
        ends = summary.interval or (summary.difference, summary.difference)
        is_worse = ends[1] < 0 if higher_is_better else ends[0] > 0
        reach[summary.arm] = (max(abs(end) for end in ends), is_worse)
    rising = sorted(reach, key=lambda arm: reach[arm][0])
    first = max(FEWEST_OTHERS, len(rising) - len(rising) // 4)
    for place in range(first, len(rising)):
        beyond = rising[place:]
        is_gap = reach[rising[place]][0] > FAR * reach[rising[place - 1]][0]
        if is_gap and all(reach[arm][1] for arm in beyond):
            return frozenset(beyond)
    return frozenset()
