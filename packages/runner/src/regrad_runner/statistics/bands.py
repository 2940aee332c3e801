"""Curves over seeds: the median, and the middle half around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Band:
    """One curve over the seeds, each array of shape [steps].

    Attributes:
        steps: Optimizer steps, rising.
        low: First quartile over the seeds.
        middle: Median.
        high: Third quartile.
        seeds: Number of seeds.
    """

    steps: npt.NDArray[np.int64]
    low: npt.NDArray[np.float64]
    middle: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    seeds: int


def bands(rows: Iterable[tuple[str, int, float]]) -> dict[str, Band]:
    """Return one band per series, in the order in which they come first.

    Args:
        rows: (series, step, value), at most one per seed. Steps that not every seed of a series has
            are left out.

    Example:
        >>> band = bands([("agc", 10, value) for value in (0.1, 0.2, 0.9)])["agc"]
        >>> band.steps.tolist(), band.middle.tolist(), band.seeds
        ([10], [0.2], 3)
    """
    values: dict[str, dict[int, list[float]]] = {}
    for series, step, value in rows:
        values.setdefault(series, {}).setdefault(step, []).append(value)
    found = {}
    for series, by_step in values.items():
        seeds = max(map(len, by_step.values()))
        steps = sorted(step for step, seen in by_step.items() if len(seen) == seeds)
        low, middle, high = np.quantile(
            [by_step[step] for step in steps], (0.25, 0.5, 0.75), axis=1
        )
        found[series] = Band(steps=np.array(steps), low=low, middle=middle, high=high, seeds=seeds)
    return found
