"""Whether runs of a script that should be alike are alike, and those that should differ differ."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from regrad.errors import RegradError

from regrad_runner.results.cells import Cell
from regrad_runner.settings.arms import BASELINE


@dataclass(frozen=True)
class Beginning:
    """How a run of a script began, and what came of it.

    Attributes:
        start: Tells its first weights and inputs; None where the script was not seen so far.
        curve: Values of its measure.
    """

    start: str | None
    curve: tuple[float, ...]


class Pairs:
    """Compares the runs of a script as they end; several threads may call it."""

    def __init__(self) -> None:
        self._seen: dict[Cell, Beginning] = {}
        self._has_warned = False
        self._lock = threading.Lock()

    def add(self, cell: Cell, start: str | None, curve: Sequence[float]) -> str | None:
        """Note a run that ended.

        Returns:
            A warning where runs of one seed do not begin alike, the first time; else None.

        Raises:
            RegradError: If two seeds gave the same run.
        """
        with self._lock:
            self._seen[cell] = Beginning(start, tuple(curve))
            self._check_seeds(cell)
            return self._warning(cell)

    def _check_seeds(self, cell: Cell) -> None:
        this = self._seen[cell]
        for other, seen in self._seen.items():
            is_sibling = other.arm == cell.arm and other.lr == cell.lr and other.seed != cell.seed
            if is_sibling and seen == this:
                raise RegradError(
                    f"seeds must change the runs, got the same run of {cell.arm!r} from seeds "
                    f"{other.seed} and {cell.seed}: the script sets a seed of its own; pass it "
                    "{seed}, or give --seed-by-run, which shifts the seeds that it sets"
                )

    def _warning(self, cell: Cell) -> str | None:
        """Say that pairs are none, where the runs of one seed begin differently."""
        if self._has_warned:
            return None
        this = self._seen[cell]
        for other, seen in self._seen.items():
            if (
                other.seed != cell.seed
                or other.arm == cell.arm
                or BASELINE
                not in (
                    other.arm,
                    cell.arm,
                )
            ):
                continue
            if None not in (this.start, seen.start) and this.start != seen.start:
                self._has_warned = True
                return (
                    f"warning: the pairs are no pairs: with seed {cell.seed}, {other.arm!r} and "
                    f"{cell.arm!r} began with other weights or inputs; the script must fix every "
                    "source of chance by {seed} (weights, order of the data, augmentation, worker "
                    "processes), or be given --seed-by-run"
                )
        return None
