"""The cost of starting: importing the core and listing plugins, beside an idle Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from regrad_bench.cases import Case, Pair, Setting


class Start(NamedTuple):
    """Something that starts.

    Attributes:
        words: What it is called.
        arguments: Python's arguments.
        goal: The largest ratio to a Python that does nothing: that takes 15 ms where the goal in
            milliseconds was set.
        goal_ms: The most milliseconds.
    """

    words: str
    arguments: list[str]
    goal: float
    goal_ms: float


STARTS = {
    "import": Start("import regrad", ["-c", "import regrad"], 1.33, 20),
    "plugins": Start("regrad plugins list", ["-m", "regrad_runner", "plugins", "list"], 8.0, 120),
}
NOTHING = ["-c", "pass"]


def start_cases() -> list[Case]:
    """Return the cases."""
    return [
        Case(
            name=f"start/{name}",
            ours=start.words,
            peer="python -c pass",
            build=_build(start.arguments),
            goal=start.goal,
            goal_ms=start.goal_ms,
            most_pairs=10,
            host_only=True,
            wall=True,
        )
        for name, start in STARTS.items()
    ]


def _build(arguments: list[str]) -> Callable[[Setting], Pair]:
    return lambda _: Pair(ours=lambda: _run(arguments), peer=lambda: _run(NOTHING))


def _run(arguments: list[str]) -> None:
    words = [sys.executable, *arguments]  # our own, no user's
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
