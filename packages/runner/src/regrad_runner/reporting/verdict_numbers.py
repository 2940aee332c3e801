"""The numbers of a comparison's verdicts, for a table of comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from regrad_runner.reporting.measures import measure_in
from regrad_runner.reporting.summaries import summarize_folder
from regrad_runner.results.about import read_about
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.statistics.verdicts import ArmSummary


def verdict_numbers(path: Path) -> dict[str, float]:
    """Return the numbers of the verdicts of a comparison by name, such as "difference/xgrad".

    Args:
        path: The comparison's folder.

    Raises:
        ValueError: If it holds no comparison with a run, or something in it is damaged.
    """
    measure = measure_in(read_about(path))
    if measure is None:
        raise ValueError(f"folder must say what it compares by, got '{path}'")
    return numbers_of_verdicts(summarize_folder(ResultsFolder(path), measure))


def numbers_of_verdicts(summaries: Sequence[ArmSummary]) -> dict[str, float]:
    """Return what is known and finite of each arm: difference, its interval, p, ratio of steps.

    Args:
        summaries: One per arm; the baseline, from which the others differ, is left out.

    Example:
        >>> arm = ArmSummary(arm="agc", seeds=6, failed=0, mean=0.9, sd=0.1, difference=0.01)
        >>> numbers_of_verdicts([arm])
        {'difference/agc': 0.01}
    """
    found = {}
    for summary in summaries:
        if summary.verdict == "baseline":
            continue
        low, high = summary.interval or (None, None)
        numbers = {
            "difference": summary.difference,
            "difference_low": low,
            "difference_high": high,
            "p": summary.p_adjusted,
            "steps_ratio": summary.steps_ratio,
        }
        for name, number in numbers.items():
            if number is not None and math.isfinite(number):
                found[f"{name}/{summary.arm}"] = number
    return found
