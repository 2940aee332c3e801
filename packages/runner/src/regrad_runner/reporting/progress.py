"""Progress of runs: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

REFRESHES_PER_SECOND = 4


class Display:
    """Show how many of a number of runs are done, and how far the current one is.

    Args:
        console: Where to show it: bars if it is a terminal, one line per finished run if not.
        runs: How many there will be.
        quiet: Show nothing: for the processes that do not report.
    """

    def __init__(self, console: Console, *, runs: int, quiet: bool = False) -> None:
        self._console = console
        self._runs = runs
        self._quiet = quiet
        self._done = 0
        self._bars: Progress | None = None
        self._all: TaskID | None = None
        self._current: TaskID | None = None
        if console.is_terminal and not quiet:
            self._bars = _bars(console)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
            self._all = self._bars.add_task("all runs", total=self._runs, unit="runs")
            self._current = self._bars.add_task("starting", total=None, unit="steps")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def expect(self, runs: int) -> None:
        """Say how many runs there will be, if that has changed."""
        self._runs = runs
        if self._bars is not None and self._all is not None:
            self._bars.update(self._all, total=runs)

    def skip(self, runs: int) -> None:
        """Count runs that were done before."""
        self._done += runs
        if self._bars is not None and self._all is not None:
            self._bars.update(self._all, completed=self._done)

    def begin(self, name: str, *, steps: int | None) -> None:
        """Say which run starts.

        Args:
            name: Of the run, or of the runs that are under way at once.
            steps: How many optimizer steps it has; None for several runs.
        """
        if self._bars is not None and self._current is not None:
            self._bars.reset(self._current, description=name, total=steps)

    def step(self, step: int) -> None:
        """Say how many optimizer steps of it are done."""
        if self._bars is not None and self._current is not None:
            self._bars.update(self._current, completed=step)

    def note(self, text: str) -> None:
        """Say how the current run is doing: beside its bar, or as a line if there are no bars."""
        if self._bars is not None and self._current is not None:
            self._bars.update(self._current, description=text)
        else:
            self.say(text)

    def end(self, outcome: str) -> None:
        """Say how it ended."""
        self._done += 1
        if self._bars is not None and self._all is not None:
            self._bars.update(self._all, completed=self._done)
        else:
            width = len(str(self._runs))
            self.say(f"[{self._done:>{width}}/{self._runs}] {outcome}")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
        expand=True,
    )
