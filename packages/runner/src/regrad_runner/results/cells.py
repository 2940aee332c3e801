"""The runs of a comparison, in an order that its settings alone decide.

A job array counts them in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import TypeGuard

from regrad_runner.results.run import run_names
from regrad_runner.settings.config import FIRST_TUNING_SEED, ComparisonSettings


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
        return f"{self.arm}, lr {self.lr:g}, trial {_trial_number(self.seed)}"

    @property
    def folder_names(self) -> tuple[str, str, str]:
        """Of the folders that lead to its run, from the comparison's."""
        return run_names(self.arm, self.seed, self.lr)


@dataclass(frozen=True)
class Extension:
    """A number kept for a trial of a rate beyond those given, which its arm may never ask for.

    Which rate that is, if any, the trials before it decide: see `rates.run_of`.

    Attributes:
        arm: Name of the arm.
        seed: Of the trial.
        round: Which of the rates that the arm may add, from 1.
    """

    arm: str
    seed: int
    round: int

    @property
    def name(self) -> str:
        """As printed."""
        return f"{self.arm}, extension {self.round}, trial {_trial_number(self.seed)}"


def is_compared(cell: Cell | Extension) -> TypeGuard[Cell]:
    """Say whether a cell is a run that is compared, and no trial of a learning rate."""
    return isinstance(cell, Cell) and cell.lr is None


def _trial_number(seed: int) -> int:
    return seed - FIRST_TUNING_SEED + 1


def cells_of(arms: Iterable[str], config: ComparisonSettings) -> list[Cell | Extension]:
    """Return the cells of a comparison.

    The trials of the rates given come first, if there is a choice, then round by round the rates
    that may be added, and then the runs. Arms take turns within a seed, so that seeds that are
    added later come last.

    Args:
        arms: Their names, in order.
        config: Resolved settings.

    Example:
        >>> from regrad_runner.settings.config import CompareConfig
        >>> config = CompareConfig(seeds=2, lr=[0.1])
        >>> [cell.name for cell in cells_of(["baseline", "agc"], config)]
        ['baseline, seed 0', 'agc, seed 0', 'baseline, seed 1', 'agc, seed 1']
    """
    names = list(arms)
    runs = [Cell(arm, seed) for seed, arm in product(range(config.seeds), names)]
    if len(config.rates) < 2:  # one rate leaves no choice
        return [*runs]
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + config.tuning_seeds)
    rounds = range(1, config.tuning_extensions + 1)
    trials = [Cell(arm, seed, lr) for arm, lr, seed in product(names, config.rates, seeds)]
    extensions = [Extension(arm, seed, step) for step, arm, seed in product(rounds, names, seeds)]
    return [*trials, *extensions, *runs]


def in_ranges(numbers: Sequence[int]) -> str:
    """Write numbers that go up as a job array takes them.

    Example:
        >>> in_ranges([0, 1, 2, 7])
        '0-2,7'
    """
    rows = [list(row) for _, row in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    ends = [(row[0][1], row[-1][1]) for row in rows]
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ends)
