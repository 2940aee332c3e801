"""Ctrl-C and SIGTERM: they end what is under way as killed, and never leave a tracked run open.

Where a checkpoint can be saved, the first one acts after the step under way and the second one at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from regrad_runner.tracking import LeftAtOnce, Run, Terminated

if TYPE_CHECKING:
    from rich.console import Console

STOPPING = b"\nstopping after this step; once more leaves at once\n"


@dataclass
class _Signals:
    """Whether signals wait, whether the first one may act after the step, and the one that came meanwhile."""

    wait: bool = False
    after_step: bool = False
    came: int | None = None

    def stop_waiting(self) -> int | None:
        """Let signals act at once, and return the one that waited."""
        came, self.came, self.wait = self.came, None, False
        return came


_signals = _Signals()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on Ctrl-C and `Terminated` on SIGTERM, unless they are to wait. Main thread only."""
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let a signal that comes during the block act at its end."""
    _signals.wait = True
    try:
        yield
    finally:
        came = _signals.stop_waiting()
    if came is not None:
        _raise(came)


@contextmanager
def tracked(start: Callable[[], Run]) -> Iterator[Run]:
    """Begin a run and end it with the block: finished, failed or killed, also where a signal comes in between.

    Args:
        start: Begins the run. A signal waits until it is known, and again while it is finished.
    """
    with ExitStack() as stack:
        with signals_wait():
            run = stack.enter_context(start())
        yield run
        with signals_wait():
            run.finish()


@contextmanager
def stops_after_steps() -> Iterator[None]:
    """Let the first signal in the block act where `stop_if_asked` is called, and the second one at once."""
    _signals.after_step = True
    try:
        yield
        stop_if_asked()
    finally:
        _signals.after_step, _signals.came = False, None


def stop_asked() -> bool:
    """Say whether a signal came that waits for `stop_if_asked`."""
    return _signals.came is not None


def stop_if_asked() -> None:
    """Raise what the signal that came means."""
    if _signals.came is not None:
        _raise(_signals.came)


@contextmanager
def going_on(console: Console, again: str, *, quiet: bool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end what is under way as killed, and say how to go on."""
    try:
        with stoppable():
            yield
    except (KeyboardInterrupt, SystemExit):
        if not quiet:
            console.print(f"stopped; this goes on from here: {again}", highlight=False, markup=False, soft_wrap=True)
        raise


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    if _signals.wait:
        _signals.came = number
    elif _signals.after_step and _signals.came is None:
        _signals.came = number
        os.write(2, STOPPING)  # the streams of Python may be in the middle of a line of ours
    elif _signals.after_step and number == signal.SIGINT:
        raise LeftAtOnce
    else:
        _raise(number)


def _raise(number: int) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
