"""The runs of a comparison, in an order that its settings alone decide.

A job array counts them in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product

from regrad_runner.results.run import run_names
from regrad_runner.settings.config import FIRST_TUNING_SEED, CompareConfig


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        arm: Name of the arm.
        seed: Its seed.
        lr: Learning rate to try, in the choice of one; None in the runs that are compared.
    """

    arm: str
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        """As printed."""
        if self.lr is None:
            return f"{self.arm}, seed {self.seed}"
        return f"{self.arm}, lr {self.lr:g}, trial {self.seed - FIRST_TUNING_SEED + 1}"

    @property
    def folder_names(self) -> tuple[str, str, str]:
        """Of the folders that lead to its run, from the comparison's."""
        return run_names(self.arm, self.seed, self.lr)


def cells_of(arms: Iterable[str], config: CompareConfig) -> list[Cell]:
    """Return the cells of a comparison: the trials of learning rates, if any, and then the runs.

    Arms take turns within a seed, so that seeds that are added later come last.

    Args:
        arms: Their names, in order.
        config: Resolved settings.

    Example:
        >>> [cell.name for cell in cells_of(["baseline", "agc"], CompareConfig(seeds=2, lr=[0.1]))]
        ['baseline, seed 0', 'agc, seed 0', 'baseline, seed 1', 'agc, seed 1']
    """
    names = list(arms)
    rates = config.lr or ()
    trials: list[Cell] = []
    if len(rates) > 1:
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + config.tuning_seeds)
        trials = [Cell(arm, seed, lr) for arm, lr, seed in product(names, rates, seeds)]
    runs = [Cell(arm, seed) for seed, arm in product(range(config.seeds), names)]
    return [*trials, *runs]


def in_ranges(numbers: Sequence[int]) -> str:
    """Write numbers that go up as a job array takes them.

    Example:
        >>> in_ranges([0, 1, 2, 7])
        '0-2,7'
    """
    rows = [list(row) for _, row in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    ends = [(row[0][1], row[-1][1]) for row in rows]
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ends)
