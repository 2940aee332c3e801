"""Ctrl-C, SIGTERM and SIGUSR1: they end current runs as killed, and leave no run open.

Schedulers send SIGTERM, or on request SIGUSR1, some time before they take a machine away. Where a
checkpoint can be saved, the first signal acts after the step under way. A second Ctrl-C acts at
once. The others may come again without effect, because a scheduler and a launcher may both send
them. Several processes hear a signal at different steps, or only one of them hears it: so after
each step they agree, and stop together.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
STOPPING = b"\nstopping after this step"
ONCE_MORE = b"; once more leaves at once"
OF_A_SHELL = 128  # what a shell adds to the number of the signal that ended a process
# Windows has no SIGUSR1.
STOPPING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


@dataclass
class _Signals:
    """How to treat signals, and which one came.

    Attributes:
        wait: Whether they act later.
        after_step: Whether the first one acts after the step under way.
        came: The one that waits.
        agree: Takes the signal that came to this process, 0 for none, and returns the one that all
            processes act on.
        together: Whether every process was ended by `stop`.
    """

    wait: bool = False
    after_step: bool = False
    came: int | None = None
    agree: Callable[[int], int] = int
    together: bool = False

    def stop_waiting(self) -> int | None:
        """Let signals act at once, and return the one that waited."""
        came = self.came
        self.came = None
        self.wait = False
        return came


_signals = _Signals()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on Ctrl-C and `Terminated` on SIGTERM and SIGUSR1.

    They wait where they are asked to. It works in the main thread only.
    """
    _signals.together = False
    before = {number: signal.signal(number, _on_signal) for number in STOPPING_SIGNALS}
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
def begun(begin: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """Begin something that ends with the block; no signal comes between beginning and block.

    Args:
        begin: Returns a context manager, such as a run that ends with its block. A signal waits
            meanwhile.
    """
    with ExitStack() as stack:
        with signals_wait():
            value = stack.enter_context(begin())
        yield value


@contextmanager
def stops_after_steps(agree: Callable[[int], int] = int) -> Iterator[None]:
    """Let the first signal in the block act when `stop` is called, and a second Ctrl-C at once.

    Args:
        agree: Called on every process with the number of the signal that came to it, 0 for none;
            returns the one that all act on.
    """
    _signals.after_step = True
    _signals.agree = agree
    _signals.together = False
    try:
        yield
        stop(asked_to_stop())
    finally:
        _signals.after_step = False
        _signals.agree = int
        _signals.came = None


def asked_to_stop() -> int:
    """Return the signal to stop for, 0 for none; call it on every process, after the same steps."""
    return _signals.agree(_signals.came or 0)


def stop(number: int) -> None:
    """Raise what a signal means, on every process; 0 means nothing."""
    if number == 0:
        return
    _signals.together = True
    _raise(number)


def stopped_together() -> bool:
    """Say whether every process ends for a signal, so that they can still act together."""
    return _signals.together


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    if _signals.wait:
        _signals.came = number
    elif not _signals.after_step:
        _raise(number)
    elif _signals.came is None:
        _signals.came = number
        hint = ONCE_MORE if number == signal.SIGINT else b""
        # The streams of Python may be in the middle of a line of ours.
        os.write(2, STOPPING + hint + b"\n")
    elif number == signal.SIGINT:
        raise LeftAtOnce


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(OF_A_SHELL + number)


class Terminated(SystemExit):
    """The process was asked to end, and tracked runs that are open end as killed.

    Its code tells a scheduler the signal: 143 for SIGTERM, 138 for SIGUSR1.
    """


class LeftAtOnce(KeyboardInterrupt):
    """Ctrl-C was pressed again: stop without waiting."""
