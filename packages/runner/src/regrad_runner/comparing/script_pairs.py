"""Whether runs of a script that should be alike are alike, and those that should differ differ."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from regrad.errors import RegradError

from regrad_runner.results.cells import Cell
from regrad_runner.results.pairs import UnlikePair, unlike_in_words
from regrad_runner.settings.arms import BASELINE


@dataclass(frozen=True)
class Beginning:
    """How a run of a script began, and what came of it.

    Attributes:
        start: Tells its first weights and inputs; None if the script was not seen so far.
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
        if this.start is None:
            return
        for other, seen in self._seen.items():
            is_sibling = other.arm == cell.arm and other.lr == cell.lr and other.seed != cell.seed
            if is_sibling and seen == this:
                raise RegradError(
                    f"seeds must change the runs, got the same run of {cell.arm!r} from seeds "
                    f"{other.seed} and {cell.seed}: the script sets a seed of its own; pass it "
                    "{seed}, or give --seed-by-run, which shifts the seeds that it sets"
                )

    def _warning(self, cell: Cell) -> str | None:
        """Say that runs of one seed begin differently, if they do."""
        if self._has_warned:
            return None
        for other in self._seen:
            if other.seed != cell.seed or BASELINE not in (other.arm, cell.arm):
                continue
            if self._began_differently(cell, other):
                self._has_warned = True
                arm = cell.arm if other.arm == BASELINE else other.arm
                return f"warning: {unlike_in_words(UnlikePair(arm, cell.seed))}"
        return None

    def _began_differently(self, cell: Cell, other: Cell) -> bool:
        one = self._seen[cell].start
        another = self._seen[other].start
        return one is not None and another is not None and one != another
