"""How many steps runs take to a value, and the paired ratio of these steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from regrad_runner.statistics.intervals import median_interval
from regrad_runner.statistics.paired import sign_flip_p
from regrad_runner.statistics.rows import RunRow

SMOOTHED_OVER = 3  # evaluations, of which the median counts
Curve = Sequence[tuple[int, float]]  # (step, value)


@dataclass(frozen=True, kw_only=True)
class StepsToTarget:
    """When runs first reached a value.

    Attributes:
        target: The value; None if it is not known.
        steps: Steps of each run by arm and seed; None for a run that never reached it.
    """

    target: float | None = None
    steps: Mapping[tuple[str, int], int | None]


@dataclass(frozen=True, kw_only=True)
class StepsRatio:
    """Steps of one arm over those of another, on paired seeds.

    Attributes:
        pairs: Seeds that say something.
        ratio: Median over these; None if it is a miss of this arm, or there are none.
        interval: Interval that covers the median with at least 1 - level; its upper end is None
            where it is open. None for too few pairs.
        p_value: Exact sign-flip test of the log ratios' signed ranks; None without a pair.
    """

    pairs: int = 0
    ratio: float | None = None
    interval: tuple[float, float | None] | None = None
    p_value: float | None = None


def first_reaching(curve: Curve, target: float, *, higher_is_better: bool = True) -> int | None:
    """Return the step at which the running median of three evaluations first reached a value.

    Args:
        curve: Evaluations of a run.
        target: The value.
        higher_is_better: Whether it is reached from below.

    Returns:
        The step of the last of the three; None if there are none.

    Example:
        >>> first_reaching([(10, 0.1), (20, 0.5), (30, 0.4), (40, 0.6)], 0.45)
        40
    """
    sign = 1 if higher_is_better else -1
    for last in range(SMOOTHED_OVER, len(curve) + 1):
        if sign * (_smoothed(curve[:last]) - target) >= 0:
            return curve[last - 1][0]
    return None


def median_end(curves: Iterable[Curve], *, higher_is_better: bool = True) -> float | None:
    """Return the median over runs of where their curves end.

    A curve ends at the median of its last three evaluations, by which a run reaches a value too: of
    runs that rise to their last step, none would reach its own last evaluation.

    Args:
        curves: One per run; an empty one for a run that diverged, which is worse than any number.
        higher_is_better: The direction of better.

    Returns:
        The median. None without a run, where it falls on a run that diverged, or if a run has fewer
        than three evaluations.

    Example:
        >>> rising = [(1, 0.1), (2, 0.2), (3, 0.3)]
        >>> median_end([rising, rising, []])
        0.2
    """
    worst = -math.inf if higher_is_better else math.inf
    ends = []
    for curve in curves:
        if 0 < len(curve) < SMOOTHED_OVER:
            return None
        ends.append(_smoothed(curve) if curve else worst)
    if not ends:
        return None
    end = statistics.median(ends)
    return end if math.isfinite(end) else None


def steps_to_baseline(
    curves: Mapping[str, Mapping[int, Curve]], *, baseline: str, higher_is_better: bool = True
) -> StepsToTarget:
    """Return when each run first reached the median end of the baseline's runs.

    Args:
        curves: Evaluations on validation samples by arm and seed; empty for a run that diverged. A
            value that is not finite counts as worse than any number.
        baseline: Name of the arm without corrections.
        higher_is_better: The direction of better.

    Returns:
        The value and the steps; no value where `median_end` knows none, or where steps of a curve
        are not positive and rising, so that they count nothing.

    Example:
        >>> slow = [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
        >>> fast = [(10, 0.2), (20, 0.3), (30, 0.4), (40, 0.4)]
        >>> found = steps_to_baseline({"none": {0: slow}, "agc": {0: fast}}, baseline="none")
        >>> found.target, found.steps
        (0.3, {('none', 0): 40, ('agc', 0): 30})
    """
    worst = -math.inf if higher_is_better else math.inf
    whole = {
        arm: {seed: _without_gaps(curve, worst) for seed, curve in runs.items()}
        for arm, runs in curves.items()
    }
    target = median_end(whole.get(baseline, {}).values(), higher_is_better=higher_is_better)
    if target is None:
        return StepsToTarget(steps={})
    steps = {}
    for arm, runs in whole.items():
        for seed, curve in runs.items():
            if not _counts_steps(curve):
                return StepsToTarget(steps={})
            steps[arm, seed] = first_reaching(curve, target, higher_is_better=higher_is_better)
    return StepsToTarget(target=target, steps=steps)


def steps_ratio(pairs: Sequence[tuple[RunRow, RunRow]], *, level: float = 0.05) -> StepsRatio:
    r"""Compare the steps that paired runs take to a value.

    A run that misses the value takes longer than it ran. So the ratio of a pair is only known to
    lie in a range :math:`[l_i, h_i]`:

    =========================  ===========================================
    both reach it              their ratio, twice
    this arm alone misses it   all steps of its run / the other's, up to ∞
    the other alone misses it  0 to this arm's / all steps of the other
    both miss it               0 to ∞
    =========================  ===========================================

    With k as in `median_interval`, the interval runs from the k-th smallest :math:`l_i` to the k-th
    largest :math:`h_i`. It covers the median ratio with at least 1 - level, whatever the misses
    hide, since no end can lie further inside than that of the ratios themselves.

    Seen at .05, where no run misses: 96.8 % of 4,000 intervals with 6 seeds and 97.9 % with 10, as
    the binomial says; where a quarter misses, 98.7 % and 99.5 %. Of two arms whose curves are drawn
    alike, with the median end of one as the value, which half of its runs miss: 1 is covered by
    99.5 % to 99.9 % of 2,000 intervals, of which 2 % to 15 % have an upper end.

    In the median itself a pair counts as ∞ where this arm alone misses, by its upper end where the
    other alone does, and as 1 where both do. A run that diverged misses every value; both diverged
    say nothing.

    Args:
        pairs: Runs (this arm, the other arm) with equal seeds, each with a number or diverged.
        level: One minus the least coverage of the interval.

    Example:
        >>> def run(arm, seed, steps):
        ...     return RunRow(
        ...         arm=arm,
        ...         seed=seed,
        ...         value=0.5,
        ...         steps_to_target=steps,
        ...         steps=100,
        ...         step_seconds=1.0,
        ...     )
        >>> counts = [(40, 50), (36, 40), (45, 50), (30, 60), (48, 60), (50, None)]
        >>> found = steps_ratio([(run("agc", s, a), run("none", s, b))
        ...                      for s, (a, b) in enumerate(counts)])
        >>> found.ratio, found.interval, found.p_value
        (0.8, (0.0, 0.9), 0.03125)
    """
    telling = [(one, other) for one, other in pairs if one.usable or other.usable]
    if not telling:
        return StepsRatio()
    ranges = [_range(one, other) for one, other in telling]
    middle = statistics.median(_in_the_median(one, other) for one, other in telling)
    lower = median_interval([low for low, _ in ranges], level=level)
    upper = median_interval([high for _, high in ranges], level=level)
    interval = None
    if lower is not None and upper is not None:
        interval = (lower[0], _if_finite(upper[1]))
    return StepsRatio(
        pairs=len(telling),
        ratio=_if_finite(middle),
        interval=interval,
        p_value=sign_flip_p([_log_ratio(one, other) for one, other in telling]),
    )


def _without_gaps(curve: Curve, worst: float) -> Curve:
    """Return a curve with the worst value wherever it is not finite."""
    return [(step, value if math.isfinite(value) else worst) for step, value in curve]


def _counts_steps(curve: Curve) -> bool:
    """Say whether the steps of a curve are positive and rising."""
    steps = [0, *(step for step, _ in curve)]
    return all(earlier < later for earlier, later in pairwise(steps))


def _smoothed(curve: Curve) -> float:
    """Return the median of the last evaluations of a curve."""
    return statistics.median(value for _, value in curve[-SMOOTHED_OVER:])


def _range(run: RunRow, other: RunRow) -> tuple[float, float]:
    """Return the range in which the ratio of the steps of two runs lies: see `steps_ratio`."""
    steps = _steps(run)
    other_steps = _steps(other)
    if steps is not None and other_steps is not None:
        return steps / other_steps, steps / other_steps
    if other_steps is not None:
        return _ran(run) / other_steps, math.inf
    if steps is not None:
        return 0.0, _over_whole_run(steps, other)
    return 0.0, math.inf


def _in_the_median(run: RunRow, other: RunRow) -> float:
    """Return what stands for two runs in the median of ratios: see `steps_ratio`."""
    if _steps(run) is None and _steps(other) is None:
        return 1.0
    return _range(run, other)[1]


def _over_whole_run(steps: int, other: RunRow) -> float:
    """Return the largest ratio to a run that missed; 0 if it diverged: it would never reach it."""
    if other.diverged:
        return 0.0
    return steps / other.steps if other.steps else math.inf


def _ran(run: RunRow) -> float:
    """Return how long a run went on that missed."""
    return math.inf if run.diverged else run.steps


def _steps(run: RunRow) -> int | None:
    """Return the steps of a run; None if it missed, as one that diverged does."""
    return run.steps_to_target if run.usable else None


def _log_ratio(run: RunRow, other: RunRow) -> float:
    """Return log(steps / other steps), where a miss is longer than everything else."""
    steps = _steps(run)
    other_steps = _steps(other)
    if steps == other_steps:
        return 0.0
    if steps is None:
        return math.inf
    if other_steps is None:
        return -math.inf
    return math.log(steps / other_steps)


def _if_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
