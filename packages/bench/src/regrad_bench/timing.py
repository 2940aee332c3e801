"""Time two sides of a comparison alternately, so that a machine that slows down slows both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Paired:
    """Seconds of both sides, pair by pair.

    Attributes:
        ours: Seconds of one side, n of them.
        peer: Seconds of the other side, in the same order.
    """

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, pair by pair."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of `ratios`; with one ratio, that one twice."""
        if len(self.ratios) == 1:
            return self.ratio, self.ratio
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third

    @property
    def medians(self) -> tuple[float, float]:
        """The median seconds of each side."""
        return statistics.median(self.ours), statistics.median(self.peer)


class HostClock:
    """Seconds of a call on the CPU.

    With one thread they are the process's CPU time: what other processes take from
    the core does not count, and nothing measured here waits for anything else.

    Args:
        read: Returns the time in seconds.
    """

    def __init__(self, read: Callable[[], float] | None = None) -> None:
        self._read = read or (
            time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        )

    def seconds(self, call: Call) -> float:
        """Run `call` once and return the seconds it took."""
        start = self._read()
        call()
        return self._read() - start


class WallClock(HostClock):
    """Seconds that pass while a call runs: for calls that wait for another process."""

    def __init__(self) -> None:
        super().__init__(time.perf_counter)


class DeviceClock:
    """Seconds between two events on a device's stream, around everything that a call queues there.

    Args:
        device: An accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Call) -> float:
        """Run `call` once, wait for the device, and return the seconds between its events."""
        start = torch.Event(self._device, enable_timing=True)
        end = torch.Event(self._device, enable_timing=True)
        torch.accelerator.synchronize(self._device)
        start.record()
        call()
        end.record()
        torch.accelerator.synchronize(self._device)
        return float(start.elapsed_time(end)) / 1000


Clock = HostClock | DeviceClock


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return HostClock() if device.type == "cpu" else DeviceClock(device)


def interleave(
    ours: Call,
    peer: Call,
    *,
    pairs: int,
    clock: Clock,
    prepare: Call = lambda: None,
    repeats: int = 1,
    warm_up: int = 2,
) -> Paired:
    """Time both sides alternately; every second pair begins with the peer.

    Args:
        ours: One side.
        peer: The other side.
        pairs: How often each is timed, at least 1.
        clock: Says how long a call took.
        prepare: Called before each timed call and not timed, such as filling
            gradients anew.
        repeats: Calls per measurement, for calls of some microseconds; the
            seconds are those of one call.
        warm_up: Untimed calls of each side first.

    Returns:
        The seconds of each call.

    Raises:
        ValueError: If `pairs` or `repeats` is not positive.
    """
    for name, value in (("pairs", pairs), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    sides = [("ours", _repeated(ours, repeats)), ("peer", _repeated(peer, repeats))]
    for _ in range(warm_up):
        for call in (ours, peer):
            prepare()
            call()
    with _without_collector():
        for pair in range(pairs):
            order = sides if pair % 2 == 0 else sides[::-1]
            for name, call in order:
                prepare()
                seconds[name].append(clock.seconds(call) / repeats)
    return Paired(tuple(seconds["ours"]), tuple(seconds["peer"]))


def _repeated(call: Call, times: int) -> Call:
    """Return a call that makes `times` calls."""
    if times == 1:
        return call

    def several() -> None:
        for _ in range(times):
            call()

    return several


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the garbage collector from running inside a timed call."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
