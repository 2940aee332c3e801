"""Whether the runs of one seed began alike, as runs that are paired must."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.receipts import read_receipt
from regrad_runner.settings.arms import BASELINE


@dataclass(frozen=True)
class UnlikePair:
    """A run that began with other weights or inputs than the baseline of its seed.

    Attributes:
        arm: Its arm.
        seed: Its seed.
    """

    arm: str
    seed: int


def unlike_pairs(folder: ResultsFolder) -> list[UnlikePair]:
    """Return the runs of a folder that did not begin as the baseline of their seed.

    Only scripts of the user's own can begin differently: their receipts say how they began.

    Args:
        folder: Of a comparison.

    Raises:
        ValueError: If a receipt is damaged.
    """
    starts = {(arm, seed): start for arm, seed, start in _starts(folder)}
    found = []
    for (arm, seed), start in starts.items():
        wanted = starts.get((BASELINE, seed), start)
        if start != wanted:
            found.append(UnlikePair(arm, seed))
    return found


def unlike_in_words(pair: UnlikePair) -> str:
    """Say what it means that a run began differently, and what to do about it.

    Example:
        >>> unlike_in_words(UnlikePair("agc", 3))[:60]
        "with seed 3, 'agc' started from other weights or inputs than"
    """
    return (
        f"with seed {pair.seed}, {pair.arm!r} started from other weights or inputs than the "
        "baseline, so runs of the same seed are not paired and differences are harder to see; "
        "let {seed} decide everything random in the script (initial weights, data order, "
        "augmentation, worker processes), or give --seed-by-run"
    )


def _starts(folder: ResultsFolder) -> Iterator[tuple[str, int, str]]:
    """Yield how each run began whose receipt says it."""
    for result in folder.results:
        file = folder.receipt_file(result.arm, result.seed)
        if not os.path.lexists(file):
            continue
        script = read_receipt(file).get("script")
        start = script.get("start") if isinstance(script, dict) else None
        if isinstance(start, str):
            yield result.arm, result.seed, start
