"""The choice of each arm's learning rate, among those given and those beyond them that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from regrad_runner.results.cells import Cell, Extension
from regrad_runner.results.outcomes import Trial
from regrad_runner.settings.config import FIRST_TUNING_SEED, ComparisonSettings, rounded_rate


@dataclass(frozen=True)
class RateSearch:
    """How the arms of a comparison choose their learning rates: all in the same way.

    Attributes:
        rates: Those given; one alone is not a choice.
        trials: Runs per rate and arm.
        extensions: How many rates an arm may add to these.
        higher_is_better: The direction of the measure.
    """

    rates: tuple[float, ...]
    trials: int = 3
    extensions: int = 3
    higher_is_better: bool = True

    @property
    def is_choice(self) -> bool:
        """Whether there is more than one rate to choose from."""
        return len(self.rates) > 1

    @property
    def seeds(self) -> range:
        """Seeds of the trials of a rate; none of them is compared on."""
        return range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.trials)


@dataclass(frozen=True)
class RateChoice:
    """What the trials of one arm say so far.

    Attributes:
        tried: The rates given and those added, smallest first.
        added: Those added, in the order in which they were asked for. The trials of the last one
            may be missing.
        best: The rate chosen; None while trials are missing.
    """

    tried: tuple[float, ...]
    added: tuple[float, ...] = ()
    best: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the arm has chosen, so that no further rate is tried."""
        return self.best is not None

    @property
    def at_edge(self) -> bool:
        """Whether the rate chosen is the smallest or the largest of several that were tried."""
        return len(self.tried) > 1 and self.best in (self.tried[0], self.tried[-1])


@dataclass
class _Scores:
    """Values of one arm's trials, by rate and seed, such that larger is better."""

    search: RateSearch
    by_rate: dict[float, dict[int, float]] = field(default_factory=dict)

    def add(self, trial: Trial) -> None:
        value = -math.inf  # diverged or failed
        if math.isfinite(trial.validation):
            value = trial.validation if self.search.higher_is_better else -trial.validation
        self.by_rate.setdefault(trial.lr, {})[trial.seed] = value

    def is_complete(self, rate: float) -> bool:
        return all(seed in self.by_rate.get(rate, {}) for seed in self.search.seeds)

    def of(self, rate: float) -> tuple[float, float, float]:
        """Return what rates are ordered by."""
        values = [self.by_rate[rate][seed] for seed in self.search.seeds]
        return min(values), fmean(values), -rate


def choose_rate(search: RateSearch, trials: Iterable[Trial]) -> RateChoice:
    """Return which rate an arm chooses, or which trials it waits for.

    The best rate is the one whose *worst* trial, at its end and on the validation split, is best:
    an unsteady rate that is lucky once must not win. A trial that diverged or failed is worse than
    any number. Between rates whose worst trials are equal the better mean decides, and then the
    smaller rate.

    While the best rate is the smallest or the largest of those tried, one more is tried beyond it,
    as far from it as its neighbour is, by factor: beyond .1, .3 comes .9. It is rounded to three
    digits. An arm adds `search.extensions` rates at most.

    Args:
        search: The rates given, and how many trials each has.
        trials: Of the arm.

    Example:
        >>> search = RateSearch((0.1, 0.3), trials=1)
        >>> trials = [Trial(arm="agc", lr=0.1, seed=1_000_000, validation=0.7)]
        >>> trials += [Trial(arm="agc", lr=0.3, seed=1_000_000, validation=0.8)]
        >>> choose_rate(search, trials)
        RateChoice(tried=(0.1, 0.3, 0.9), added=(0.9,), best=None)
        >>> trials += [Trial(arm="agc", lr=0.9, seed=1_000_000, validation=0.6)]
        >>> choose_rate(search, trials).best
        0.3
    """
    if not search.is_choice:
        return RateChoice(search.rates, best=next(iter(search.rates), None))
    scores = _Scores(search)
    for trial in trials:
        scores.add(trial)
    tried = sorted(search.rates)
    added: list[float] = []
    while all(scores.is_complete(rate) for rate in tried):
        best = max(tried, key=scores.of)
        beyond = rate_beyond(tried, best)
        if beyond is None or len(added) == search.extensions:
            return RateChoice(tuple(tried), tuple(added), best)
        added.append(beyond)
        tried = sorted([*tried, beyond])
    return RateChoice(tuple(tried), tuple(added))


def rate_beyond(tried: Sequence[float], best: float) -> float | None:
    """Return the rate to try beyond the best one where that is at an edge; else None.

    Args:
        tried: At least two rates, smallest first.
        best: One of them.

    Example:
        >>> rate_beyond([0.001, 0.003, 0.01], 0.01), rate_beyond([0.001, 0.003, 0.01], 0.001)
        (0.0333, 0.000333)
    """
    if best == tried[-1]:
        neighbour = tried[-2]
    elif best == tried[0]:
        neighbour = tried[1]
    else:
        return None
    exact = best * (best / neighbour)
    # Rates that are almost equal may become equal by rounding.
    for rate in (rounded_rate(exact), exact):
        if _lies_beyond(rate, best, neighbour):
            return rate
    return None


def _lies_beyond(rate: float, best: float, neighbour: float) -> bool:
    """Say whether a rate is a positive number on the other side of the best one."""
    if best > neighbour:
        return best < rate < math.inf
    return 0 < rate < best


def run_of(cell: Cell | Extension, choice: RateChoice) -> Cell | None:
    """Return the run that a cell stands for; None for a rate that its arm has not requested.

    Args:
        cell: Of an arm.
        choice: What the arm's trials say.
    """
    if isinstance(cell, Cell):
        return cell
    if len(choice.added) < cell.round:
        return None
    return Cell(cell.arm, cell.seed, choice.added[cell.round - 1])


def choices_of(
    cells: Iterable[Cell | Extension], search: RateSearch, trials: Iterable[Trial]
) -> dict[str, RateChoice]:
    """Return what the trials say of each arm's learning rate.

    Args:
        cells: Of the comparison.
        search: How its arms choose.
        trials: Those that ended, of all arms.
    """
    trials_of: dict[str, list[Trial]] = {cell.arm: [] for cell in cells}
    for trial in trials:
        trials_of.setdefault(trial.arm, []).append(trial)
    return {arm: choose_rate(search, of_arm) for arm, of_arm in trials_of.items()}


def missing_cells(
    cells: Sequence[Cell | Extension],
    choices: Mapping[str, RateChoice],
    has_ended: Callable[[Cell], bool],
) -> list[int]:
    """Return the numbers of the cells that have not ended.

    A rate that an arm may still ask for counts; one that it chose without does not.

    Args:
        cells: Of the comparison.
        choices: What the trials say, by arm.
        has_ended: Whether a run ended or failed.
    """
    missing = []
    for number, cell in enumerate(cells):
        choice = choices[cell.arm]
        run = run_of(cell, choice)
        is_done = choice.is_settled if run is None else has_ended(run)
        if not is_done:
            missing.append(number)
    return missing


def search_of(config: ComparisonSettings, *, higher_is_better: bool) -> RateSearch:
    """Return how the arms of a comparison choose their rates.

    Args:
        config: Resolved settings.
        higher_is_better: The direction of its measure.
    """
    return RateSearch(
        rates=config.rates,
        trials=config.tuning_seeds,
        extensions=config.tuning_extensions,
        higher_is_better=higher_is_better,
    )
