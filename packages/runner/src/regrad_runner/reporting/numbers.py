"""How numbers are written in tables and sentences."""

from __future__ import annotations

import re

from regrad_runner.statistics.paired import PairedDifference
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure


def short_number(value: float, measure: Measure, *, sign: str = "-") -> str:
    """Return a number with the measure's decimals, without a zero before the point.

    Args:
        value: The number.
        measure: It says how many decimals there are.
        sign: "+" to write the sign of positive numbers too.

    Example:
        >>> short_number(0.98765, Measure(), sign="+"), short_number(-0.5, Measure(decimals=2))
        ('+.9877', '-.50')
    """
    return without_zero(f"{value:{sign}.{measure.decimals}f}")


def short_target(target: float, measure: Measure) -> str:
    """Return what steps are counted to, without a zero before the point.

    Args:
        target: The value.
        measure: Says how many decimals a value has that the baseline's runs came to; a number that
            somebody chose is written as it is.

    Example:
        >>> short_target(0.96125, Measure()), short_target(0.96, Measure(target=0.96))
        ('.9613', '.96')
    """
    if measure.fixed_target is None:
        return short_number(target, measure)
    return without_zero(f"{target:g}")


def target_in_words(target: float, measure: Measure) -> str:
    """Say what steps are counted to.

    Example:
        >>> target_in_words(0.96125, Measure()), target_in_words(0.96, Measure(target=0.96))
        ("the baseline's end, .9613", '.96')
    """
    number = short_target(target, measure)
    return number if measure.fixed_target is not None else f"the baseline's end, {number}"


def ratio_interval(interval: tuple[float, float | None] | None) -> str:
    """Return the interval of a ratio in brackets, or its one end; nothing if there is none.

    Example:
        >>> ratio_interval((0.7, 0.95)), ratio_interval((0, 0.95)), ratio_interval((0.7, None))
        ('[0.70, 0.95]', '[≤ 0.95]', '[≥ 0.70]')
        >>> ratio_interval((0, None))
        'not resolved'
    """
    if interval is None:
        return ""
    if not is_resolved(interval):
        return "not resolved"
    low, high = interval
    if high is None:
        return f"[≥ {low:.2f}]"
    if low == 0:
        return f"[≤ {high:.2f}]"
    return f"[{low:.2f}, {high:.2f}]"


def is_resolved(interval: tuple[float, float | None] | None) -> bool:
    """Say whether the interval of a ratio excludes anything: from 0 to infinity it does not.

    Example:
        >>> is_resolved((0, 0.95)), is_resolved((0, None))
        (True, False)
    """
    return interval is None or interval != (0, None)


def times_the_rate(ratio: float) -> str:
    """Say how a learning rate compares with the baseline's.

    Example:
        >>> times_the_rate(2)
        "at twice the baseline's rate"
        >>> times_the_rate(0.0625)
        "at 0.0625 times the baseline's rate"
    """
    words = {2.0: "twice", 0.5: "half"}.get(ratio, f"{ratio:.3g} times")
    return f"at {words} the baseline's rate"


def without_zero(number: str) -> str:
    """Return a written number without the zero before its point."""
    return re.sub(r"^([+-]?)0\.", r"\1.", number)


def difference_in_brackets(summary: ArmSummary | PairedDifference, measure: Measure) -> str:
    """Return a difference and its interval in brackets, as far as they are known.

    Example:
        >>> test = PairedDifference(pairs=6, difference=0.01, interval=(0.002, 0.018), p_value=0.03)
        >>> difference_in_brackets(test, Measure())
        '+.0100 [+.0020, +.0180]'
    """
    if summary.difference is None:
        return ""
    difference = short_number(summary.difference, measure, sign="+")
    if summary.interval is None:
        return difference
    low, high = (short_number(end, measure, sign="+") for end in summary.interval)
    return f"{difference} [{low}, {high}]"


def probability(p_value: float | None) -> str:
    """Return a p-value in words.

    Example:
        >>> probability(0.03125), probability(1e-5)
        ('p = .031', 'p < .001')
    """
    if p_value is None:
        return "p unknown"
    if p_value < 0.001:
        return "p < .001"
    return f"p = {without_zero(f'{p_value:.3f}')}"


def count(number: int, noun: str) -> str:
    """Return a number of things.

    Example:
        >>> count(1, "seed"), count(2, "seed")
        ('1 seed', '2 seeds')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
