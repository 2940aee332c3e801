"""From the runs of a comparison to one honest verdict per arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from regrad_runner.settings.arms import BASELINE
from regrad_runner.statistics.paired import PairedDifference, holm, paired_difference
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.spreads import SpreadRatio, spread_ratios
from regrad_runner.statistics.steps import StepsRatio, steps_ratio

FEWEST_SEEDS = 6
Verdict = Literal[
    "baseline",
    "control",
    "too few seeds",
    "inert",
    "worse",
    "no evidence",
    "better than nothing",
    "better",
]


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm of a comparison.

    Attributes:
        arm: Its name.
        seeds: Runs that finished with a number.
        failed: Runs that did not, for a reason that says nothing about the arm.
        diverged: Runs whose numbers were no longer finite.
        mean: Mean of the measure over those runs; None without any.
        sd: Their sample standard deviation; None for fewer than two.
        pairs: Seeds that say something in comparison with the baseline, as in `PairedDifference`.
        diverged_pairs: Those in which one run alone diverged; `p_value` is then that of the signed
            ranks.
        difference: Mean paired difference to the baseline, over seeds that both finished; None
            without any.
        interval: Student-t interval of it at 1 - level.
        p_value: Of the two-sided paired test.
        p_adjusted: The same after Holm over the correction arms; None for baseline and controls.
        target: Value on the validation samples to which steps are counted; None for none.
        steps_to_target: Median over the arm's runs; None if the median run missed the target.
        misses: Runs that never reached the target.
        steps_ratio: Median paired ratio to the baseline's steps; None if the median is a miss.
        steps_interval: Interval of that median at 1 - level; its upper end is None if it is
            open. See `regrad_runner.statistics.steps.steps_ratio`.
        steps_p: Exact sign-flip test of the paired log ratios' signed ranks.
        spread_ratio: `sd` over the smallest of the arms with 6 runs or more; None if that is
            not known.
        steadiest: Name of the arm with the smallest.
        spread_p: Bound on the probability that any two of the arms differ so much or more in their
            spread if all arms spread alike; None if the ratio is not known.
        unsteady: Whether that ratio is above 3.
        time_ratio: Median ratio of the time per step to the baseline's, from the measurement at the
            end of a comparison; None if there is none.
        rate_ratio: Learning rate over the baseline's; None if either has none.
        touched: Runs in which a correction changed something.
        control: Name of the arm it must also beat; None if none is declared or known.
        against_control: The comparison with that arm; None if it was not run.
        verdict: In words; see `summarize`.
    """

    arm: str
    seeds: int
    failed: int
    mean: float | None
    sd: float | None
    pairs: int = 0
    diverged: int = 0
    diverged_pairs: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    target: float | None = None
    steps_to_target: float | None = None
    misses: int = 0
    steps_ratio: float | None = None
    steps_interval: tuple[float, float | None] | None = None
    steps_p: float | None = None
    spread_ratio: float | None = None
    steadiest: str | None = None
    spread_p: float | None = None
    unsteady: bool = False
    time_ratio: float | None = None
    rate_ratio: float | None = None
    touched: int = 0
    control: str | None = None
    against_control: PairedDifference | None = None
    verdict: Verdict = "no evidence"


def summarize(
    rows: Sequence[RunRow],
    *,
    baseline: str = BASELINE,
    controls: Mapping[str, str | None],
    higher_is_better: bool = True,
    level: float = 0.05,
    target: float | None = None,
) -> list[ArmSummary]:
    r"""Compare every arm with the baseline over paired seeds, and draw the verdicts.

    Let :math:`p_b` be the p-value of the paired test against the baseline, and :math:`p_c` that of
    the test against the arm's control. Each is adjusted by Holm over the correction arms, which are
    all arms but the baseline and the controls.

    ===================  ===========================================================================
    baseline, control    the arms that the others are compared with
    inert                no run was touched in a measured step: the arm is the baseline under
                         another name, but for what rounding does
    too few seeds        fewer than 6 pairs
    worse                :math:`p_b` ≤ level, on the wrong side
    better than nothing  :math:`p_b` ≤ level, on the right side, but the control was not run or not
                         beaten
    better               :math:`\max(p_b, p_c)` ≤ level, both on the right side; where no control
                         exists, against the baseline alone
    no evidence          everything else
    ===================  ===========================================================================

    The chance that arms identical to the baseline get any of worse, better than nothing and better
    is at most `level` for the whole table (seen at .05: 4.4 % of 8,000 simulated tables of three
    arms with their controls). With 10 seeds, one arm whose mean is truly shifted by d standard
    deviations of the paired difference is told from the baseline with probability .80 (d = 1), .987
    (d = 1.5) or 1.00 (d = 2); as one of three arms, the default, with at least .60, .94 or .998;
    and at d = 1.5 with at least .85 among up to seven (noncentral t, Bonferroni). An arm that must
    beat its control too needs both to succeed.

    A run that diverged ranks behind every number. Leaving it out would flatter the arm that
    diverges: its other seeds are a selection. If only one run of a pair diverged, the exact test of
    the signed ranks replaces the t-test.

    Args:
        rows: One per run. Rows that failed or ended without a finite value count as failed and are
            left out.
        baseline: Name of the arm without corrections.
        controls: Correction arm to the name of its control arm, or to None if no control exists.
            An arm that is missing here counts as one whose control was not run. A control that is a
            correction of its own is tested like one.
        higher_is_better: The direction of better.
        level: Probability of a false verdict per table, in (0, 1).
        target: What the rows count steps to.

    Returns:
        One summary per arm, in the order of their first rows.

    Raises:
        ValueError: If the baseline has no row, a run is there twice, or `level` is out of its
            range.

    Example:
        >>> rows = [
        ...     RunRow(arm=arm, seed=seed, value=value + shift, step_seconds=1.0, touched=True)
        ...     for arm, shift in (("baseline", 0.0), ("xgrad", 0.5))
        ...     for seed, value in enumerate([0.1, 0.3, 0.2, 0.5, 0.4, 0.2])
        ... ]
        >>> summary = summarize(rows, controls={"xgrad": "nesterov"})[1]
        >>> summary.verdict, round(summary.difference, 3), summary.p_value
        ('better than nothing', 0.5, 0.03125)

    References:
        Holm, 1979, "A Simple Sequentially Rejective Multiple Test Procedure". Student, 1908, "The
        Probable Error of a Mean". If all paired differences are equal, a t-test has no spread to
        judge by: then the exact sign-flip probability 2^(1 - n) is used.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    arms = _by_arm(rows)
    if baseline not in arms:
        raise ValueError(
            f"baseline must be one of {', '.join(arms) or 'the arms (there are none)'}, "
            f"got {baseline!r}"
        )
    # An arm may be both: a correction of its own, and the change that another one must beat.
    only_controls = {arm for arm in controls.values() if arm is not None and arm not in controls}
    compare = partial(paired_difference, higher_is_better=higher_is_better, level=level)
    against = {arm: compare(_pairs(runs, arms[baseline])) for arm, runs in arms.items()}
    against_control = {
        arm: compare(_pairs(runs, arms.get(controls.get(arm) or "", {})))
        for arm, runs in arms.items()
        if arm != baseline and arm not in only_controls
    }
    adjusted, adjusted_both = _adjusted(against, against_control, controls)

    def verdict_of(arm: str) -> Verdict:
        if arm == baseline:
            return "baseline"
        if arm in only_controls:
            return "control"
        return _verdict(
            arms[arm].values(),
            against[arm],
            against_control[arm],
            differs=adjusted.get(arm, 1.0) <= level,
            differs_from_both=adjusted_both.get(arm, 1.0) <= level,
            better_side=1 if higher_is_better else -1,
        )

    spreads = spread_ratios(_values_by_arm(arms))
    return [
        _summary(
            arm,
            runs,
            test=None if arm == baseline else against[arm],
            steps=_ratio_of_steps(arm, arms, baseline=baseline, level=level),
            spread=spreads.get(arm),
            target=target,
            p_adjusted=adjusted.get(arm),
            control=controls.get(arm),
            against_control=against_control.get(arm),
            verdict=verdict_of(arm),
        )
        for arm, runs in arms.items()
    ]


def _adjusted(
    against: Mapping[str, PairedDifference | None],
    against_control: Mapping[str, PairedDifference | None],
    controls: Mapping[str, str | None],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the p-values of the correction arms after Holm, by the name of the arm.

    Args:
        against: The tests against the baseline.
        against_control: The tests of the correction arms against their controls.
        controls: As in `summarize`.

    Returns:
        Those against the baseline, and the larger one of these and those against the control.
        Arms without a p-value against the baseline are left out.
    """
    p_baseline: dict[str, float] = {}
    p_both: dict[str, float] = {}
    for arm, control_test in against_control.items():
        test = against[arm]
        if test is None or test.p_value is None:
            continue
        p_baseline[arm] = test.p_value
        p_both[arm] = max(test.p_value, _p_of_control(arm, controls, control_test))
    return _holm_by_arm(p_baseline), _holm_by_arm(p_both)


def _verdict(
    runs: Iterable[RunRow],
    test: PairedDifference | None,
    control_test: PairedDifference | None,
    *,
    differs: bool,
    differs_from_both: bool,
    better_side: int,
) -> Verdict:
    """Return the verdict on an arm that is neither baseline nor control: see `summarize`.

    Args:
        runs: Of the arm.
        test: Against the baseline.
        control_test: Against the arm's control; None if there is none, or no pair.
        differs: Whether the first test, adjusted, is at most at the level.
        differs_from_both: Whether both tests, adjusted, are.
        better_side: The side of a better arm in a test, 1 or -1.
    """
    finished = [run for run in runs if run.usable]
    if finished and not any(run.touched for run in finished):
        return "inert"
    if test is None or test.pairs < FEWEST_SEEDS:
        return "too few seeds"
    if not differs:
        return "no evidence"
    if test.side == -better_side:
        return "worse"
    beats_control = control_test is None or (
        control_test.pairs >= FEWEST_SEEDS and control_test.side == better_side
    )
    return "better" if differs_from_both and beats_control else "better than nothing"


def _by_arm(rows: Sequence[RunRow]) -> dict[str, dict[int, RunRow]]:
    """Return the rows by arm and seed."""
    arms: dict[str, dict[int, RunRow]] = {}
    for row in rows:
        runs = arms.setdefault(row.arm, {})
        if row.seed in runs:
            raise ValueError(
                f"rows must hold each run once, got arm {row.arm!r} with seed {row.seed} twice"
            )
        runs[row.seed] = row
    return arms


def _pairs(runs: Mapping[int, RunRow], others: Mapping[int, RunRow]) -> list[tuple[RunRow, RunRow]]:
    """Return the pairs of runs that say something: each ended with a number or diverged."""
    pairs = [(run, others[seed]) for seed, run in runs.items() if seed in others]
    return [pair for pair in pairs if all(run.usable or run.diverged for run in pair)]


def _p_of_control(
    arm: str, controls: Mapping[str, str | None], test: PairedDifference | None
) -> float:
    """Return the p-value against the control: 0 if there is none, 1 if it was run too rarely."""
    if arm in controls and controls[arm] is None:
        return 0.0
    if test is None or test.p_value is None:
        return 1.0
    return test.p_value


def _holm_by_arm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the adjusted p-values by the name of the arm."""
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def _ratio_of_steps(
    arm: str, arms: Mapping[str, Mapping[int, RunRow]], *, baseline: str, level: float
) -> StepsRatio:
    """Compare an arm's steps to the target with the baseline's; nothing for the baseline itself."""
    if arm == baseline:
        return StepsRatio()
    return steps_ratio(_pairs(arms[arm], arms[baseline]), level=level)


def _values_by_arm(arms: Mapping[str, Mapping[int, RunRow]]) -> dict[str, list[float]]:
    """Return the values of the arms that have enough runs for their spread to be known."""
    values = {arm: [run.value for run in runs.values() if run.usable] for arm, runs in arms.items()}
    return {arm: numbers for arm, numbers in values.items() if len(numbers) >= FEWEST_SEEDS}


def _summary(
    arm: str,
    runs: Mapping[int, RunRow],
    *,
    test: PairedDifference | None,
    steps: StepsRatio,
    spread: SpreadRatio | None,
    target: float | None,
    p_adjusted: float | None,
    control: str | None,
    against_control: PairedDifference | None,
    verdict: Verdict,
) -> ArmSummary:
    """Describe the runs of an arm, alone and in pairs with those of the baseline."""
    finished = [run for run in runs.values() if run.usable]
    diverged = [run for run in runs.values() if run.diverged]
    values = [run.value for run in finished]
    reached = [math.inf if run.steps_to_target is None else run.steps_to_target for run in finished]
    found = test or PairedDifference(pairs=0)
    return ArmSummary(
        arm=arm,
        seeds=len(finished),
        failed=len(runs) - len(finished) - len(diverged),
        diverged=len(diverged),
        mean=statistics.fmean(values) if values else None,
        sd=statistics.stdev(values) if len(values) > 1 else None,
        pairs=found.pairs,
        diverged_pairs=found.diverged,
        difference=found.difference,
        interval=found.interval,
        p_value=found.p_value,
        p_adjusted=p_adjusted,
        target=target,
        steps_to_target=_median(reached),
        misses=sum(math.isinf(count) for count in reached),
        steps_ratio=steps.ratio,
        steps_interval=steps.interval,
        steps_p=steps.p_value,
        spread_ratio=None if spread is None else spread.ratio,
        steadiest=None if spread is None else spread.steadiest,
        spread_p=None if spread is None else spread.p_value,
        unsteady=spread is not None and spread.is_unsteady,
        touched=sum(run.touched for run in finished),
        control=control,
        against_control=against_control,
        verdict=verdict,
    )


def _median(values: Sequence[float]) -> float | None:
    """Return the median; None if there is none or it is not finite."""
    if not values:
        return None
    median = statistics.median(values)
    return median if math.isfinite(median) else None
