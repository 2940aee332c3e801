"""What starting costs: importing the core, listing plugins, beside a Python that does nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from regrad_bench.cases import Case, Pair, Setting

STARTS = {
    "import": ("import regrad", ["-c", "import regrad"]),
    "plugins": ("regrad plugins list", ["-m", "regrad_runner", "plugins", "list"]),
}
NOTHING = ["-c", "pass"]


def start_cases() -> list[Case]:
    """Return the cases."""
    return [
        Case(
            name=f"start/{name}",
            ours=words,
            peer="python -c pass",
            build=_build(arguments),
            most_pairs=10,
            host_only=True,
            wall=True,
        )
        for name, (words, arguments) in STARTS.items()
    ]


def _build(arguments: list[str]) -> Callable[[Setting], Pair]:
    return lambda _: Pair(ours=lambda: _run(arguments), peer=lambda: _run(NOTHING))


def _run(arguments: list[str]) -> None:
    words = [sys.executable, *arguments]  # our own, no user's
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
