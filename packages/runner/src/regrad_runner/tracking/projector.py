"""A thread that keeps a store up to date while runs write their folders, and never delays them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from regrad_runner.addresses import without_secrets
from regrad_runner.errors import in_one_line
from regrad_runner.tracking.accelerate_trackers import AccelerateStore
from regrad_runner.tracking.mlflow import Sent, TrackedRun, project
from regrad_runner.tracking.stores import Store

SECONDS_BETWEEN_ROUNDS = 5.0
# After a failure the next round waits, twice as long each time.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
# How long the end of a process waits for the store, and how long if the store fails to answer.
SECONDS_AT_THE_END = 60.0
SECONDS_IN_VAIN = 10.0
# Rounds in which a store may confirm and yet hold something else afterwards.
ROUNDS_IN_VAIN = 3


@dataclass(frozen=True)
class Source:
    """Where a run to show is found.

    Attributes:
        place: What tells it from others, such as its folder.
        state: Another one whenever there may be something new to show.
        read: Returns the run.
    """

    place: Path
    state: Hashable
    read: Callable[[], TrackedRun]


@dataclass
class Round:
    """What came of looking at every run once.

    Attributes:
        sent: What was missing.
        runs: How many runs lacked something.
        problems: What went wrong, in one line each.
    """

    sent: Sent
    runs: int
    problems: list[str]


class Projection:
    """Shows runs in a store; looks again only at those that were not complete or have changed.

    Args:
        store: Where to.
        sources: Returns what there is to show, a parent run before those under it.
    """

    def __init__(
        self, store: Store | AccelerateStore, sources: Callable[[], Iterable[Source]]
    ) -> None:
        self._store = store
        self._sources = sources
        self._complete: dict[Path, Hashable] = {}

    def once(self) -> Round:
        """Look at every run once; stop early if the store does not answer."""
        done = Round(Sent(), 0, [])
        for source in self._sources():
            if self._complete.get(source.place) == source.state:
                continue
            try:
                sent = self._project(source)
            except ValueError as problem:  # of this run: its record or points are damaged
                done.problems.append(in_one_line(problem))
                continue
            except Exception as problem:  # noqa: BLE001 - every client raises its own kinds
                self._store.forget()
                done.problems.append(without_secrets(in_one_line(problem)))
                if self._is_of_the_store(problem):
                    return done
                continue
            if sent:
                done.sent += sent
                done.runs += 1
            else:
                self._complete[source.place] = source.state
        return done

    def _project(self, source: Source) -> Sent:
        run = source.read()
        if isinstance(self._store, AccelerateStore):
            return self._store.project(run)
        return project(self._store, run)

    def _is_of_the_store(self, problem: Exception) -> bool:
        """Say whether a failure would meet the other runs too: no answer, no room."""
        return isinstance(self._store, AccelerateStore) or _is_of_mlflow(problem)

    def until_complete(self, *, rounds: int = ROUNDS_IN_VAIN) -> Round:
        """Look until nothing is missing any more, or something fails; say what was sent in all.

        Args:
            rounds: After which a store that still lacks something is taken to keep nothing,
                whatever it says.
        """
        total = Round(Sent(), 0, [])
        for number in range(rounds):
            done = self.once()
            if number == 0:
                total.runs = done.runs
            total.sent += done.sent
            if done.problems:
                total.problems = done.problems
                return total
            if not done.sent:
                return total
        total.problems = [
            f"it reports that it stores what it receives, but {done.runs} runs are incomplete"
        ]
        return total


def _is_of_mlflow(problem: Exception) -> bool:
    """Say whether a failure of MLflow would meet the other runs too: no answer, no database."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - it takes seconds

    answers = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
    return not (isinstance(problem, MlflowException) and problem.error_code in answers)


class Projector:
    """Shows runs in a store every few seconds, from a thread of its own, until it is closed.

    Only `close` waits for it. A failure is reported once, and the next round tries again.

    Args:
        store: Where to.
        sources: As for `Projection`; called in the thread.
        say: Called with each line for the user, from the thread too.
    """

    def __init__(
        self,
        store: Store | AccelerateStore,
        sources: Callable[[], Iterable[Source]],
        *,
        say: Callable[[str], None],
    ) -> None:
        self.problem: str | None = None
        self._store = store
        self._projection = Projection(store, sources)
        self._say = say
        self._said = False
        self._closing = threading.Event()
        self._give_up = 0.0
        self._is_complete = False
        self._thread = threading.Thread(target=self._work, name="regrad-tracking", daemon=True)
        self._thread.start()

    def close(self, seconds: float | None = None) -> bool:
        """Show everything once more, within a time limit, and say whether all of it is there.

        Args:
            seconds: To wait; None for `SECONDS_AT_THE_END`.
        """
        if seconds is None:
            seconds = SECONDS_AT_THE_END
        self._give_up = time.monotonic() + min(seconds, SECONDS_IN_VAIN)
        self._closing.set()
        self._thread.join(seconds)
        if self._thread.is_alive() and self.problem is None:
            self.problem = f"it took more than {seconds:.0f} seconds"
        return self._is_complete

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while not self._closing.is_set():
            self._one_round()
            if self.problem is None:
                pause = FIRST_PAUSE
                self._closing.wait(SECONDS_BETWEEN_ROUNDS)
            else:
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self._last_rounds()

    def _one_round(self) -> None:
        self._take(self._guarded(self._projection.once))

    def _last_rounds(self) -> None:
        """Show everything, and try again for a while if the store fails to answer."""
        while True:
            done = self._guarded(self._projection.until_complete)
            self._take(done)
            if not done.problems:
                self._is_complete = True
                return
            if time.monotonic() + FIRST_PAUSE > self._give_up:
                return
            time.sleep(FIRST_PAUSE)

    def _guarded(self, look: Callable[[], Round]) -> Round:
        """Return what a look came to; the thread survives any error, such as a missing folder."""
        try:
            return look()
        except Exception as problem:  # noqa: BLE001 - the thread must not end
            return Round(Sent(), 0, [without_secrets(in_one_line(problem))])

    def _take(self, done: Round) -> None:
        self.problem = done.problems[0] if done.problems else None
        for note in self._store.notes:
            self._say(note)
        self._store.notes.clear()
        if self.problem is not None and not self._said:
            self._said = True
            self._say(
                f"tracking at {self._store.shown} failed: {self.problem}; the runs continue, and "
                "what is missing there is sent again"
            )
