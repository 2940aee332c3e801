"""The runs of a comparison one by one, in an order that its settings alone decide: what a job array counts."""

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
    """Return the cells of a comparison: where there is a choice of learning rates its trials, then the runs.

    Seeds that are added come last; arms take turns within a seed.

    Args:
        arms: Their names, in order.
        config: Resolved settings.

    Example:
        >>> [cell.name for cell in cells_of(["none", "agc"], CompareConfig(seeds=2, lr=[0.1]))]
        ['none, seed 0', 'agc, seed 0', 'none, seed 1', 'agc, seed 1']
    """
    names, rates = list(arms), config.lr or ()
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + config.tuning_seeds)
    trials = product(names, rates, seeds) if len(rates) > 1 else ()
    runs = [Cell(arm, seed) for seed, arm in product(range(config.seeds), names)]
    return [*(Cell(arm, seed, lr) for arm, lr, seed in trials), *runs]


def in_ranges(numbers: Sequence[int]) -> str:
    """Write numbers that go up as a job array takes them.

    Example:
        >>> in_ranges([0, 1, 2, 7])
        '0-2,7'
    """
    rows = [list(row) for _, row in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    ends = [(row[0][1], row[-1][1]) for row in rows]
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ends)
