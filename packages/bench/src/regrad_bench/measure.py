"""Run a case and return the result."""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from regrad import RegradError, RegradWarning
from regrad.devices import accelerator

from regrad_bench.cases import Case, Pair, Setting
from regrad_bench.memory import launches, peak_bytes, sees_launches
from regrad_bench.timing import Clock, HostClock, Paired, WallClock, clock_for, interleave

Verdict = Literal["met", "missed", "no goal", "not measured"]
NO_DEVICE = "no {kind} device here"
HOST_ALONE = "it is about the host only"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table, measured.

    Attributes:
        name: The case.
        ours: What was timed, in words.
        peer: What it was timed against.
        device: Type of the device.
        goal: The largest ratio that is good enough, or None.
        goal_ms: The most milliseconds of our side that are good enough, or None.
        pairs: How many pairs were timed.
        ours_ms: Median milliseconds of our side.
        peer_ms: Median milliseconds of the peer.
        ratio: Median of the ratios, over what the sizes suggest; of peak memories
            where nothing is timed.
        low: Their first quartile.
        high: Their third quartile.
        memory_ratio: Ratio of the peak memories, if it was requested.
        memory_goal: The largest that is good enough, or None.
        difference: Largest relative difference between both sides' results, where they
            should be equal.
        ours_launches: Kernels that our side launched, on an accelerator.
        peer_launches: Kernels that the peer launched.
        reason: Why nothing was measured, or None.
    """

    name: str
    ours: str
    peer: str
    device: str
    goal: float | None = None
    goal_ms: float | None = None
    pairs: int = 0
    ours_ms: float | None = None
    peer_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    memory_ratio: float | None = None
    memory_goal: float | None = None
    difference: float | None = None
    ours_launches: int | None = None
    peer_launches: int | None = None
    reason: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the ratio, that of the memory, and our time are within their goals."""
        if self.ratio is None:
            return "not measured"
        if self.goal is None:
            return "no goal"
        beyond = self.ratio > self.goal
        if self.memory_goal is not None and self.memory_ratio is not None:
            beyond = beyond or self.memory_ratio > self.memory_goal
        if self.goal_ms is not None and self.ours_ms is not None:
            beyond = beyond or self.ours_ms > self.goal_ms
        return "missed" if beyond else "met"


def measure(case: Case, setting: Setting, *, pairs: int) -> Result:
    """Build a case, time it, and release it.

    Args:
        case: The case.
        setting: Where, and how large.
        pairs: Pairs to time, unless the case allows fewer.

    Returns:
        What was measured, or the reason why nothing could be.
    """
    result = Result(
        name=case.name,
        ours=case.ours,
        peer=case.peer,
        device=setting.device.type,
        goal=case.goal,
        goal_ms=case.goal_ms,
    )
    if setting.device.type != "cpu":
        if case.host_only:
            return replace(result, reason=HOST_ALONE)
        if setting.device.type != accelerator():
            return replace(result, reason=NO_DEVICE.format(kind=setting.device.type.upper()))
    try:
        with _own_random_numbers(setting.device):
            return _measured(case, setting, result, min(pairs, case.most_pairs))
    except (ValueError, RegradError) as problem:
        return replace(result, reason=textwrap.shorten(str(problem), 100, placeholder=" …"))


def _measured(case: Case, setting: Setting, result: Result, pairs: int) -> Result:
    """Build both sides of a case, and return the result with everything that was measured."""
    with _built(case, setting) as pair:
        if case.only_memory:
            ours, peer = _of_both(pair, lambda call: peak_bytes(call, setting.device))
            ratio = ours / peer
            return replace(result, pairs=1, ratio=ratio, low=ratio, high=ratio, memory_ratio=ratio)
        timed = interleave(
            pair.ours,
            pair.peer,
            pairs=pairs,
            clock=_clock(case, setting),
            prepare=pair.prepare,
            repeats=1 if setting.quick else case.repeats,
        )
        result = _with_times(result, timed, case)
        if case.memory_goal:
            ours, peer = _of_both(pair, lambda call: peak_bytes(call, setting.device))
            result = replace(result, memory_ratio=ours / peer)
        if setting.device.type != "cpu" and sees_launches():
            ours, peer = _of_both(pair, launches)
            result = replace(result, ours_launches=ours, peer_launches=peer)
        # Last, because what it frees changes how memory is allocated.
        if pair.difference:
            result = replace(result, difference=pair.difference())
    return replace(result, pairs=pairs, memory_goal=case.memory_goal)


def _clock(case: Case, setting: Setting) -> Clock:
    """Return the clock that a case is timed with."""
    if case.wall:
        return WallClock()
    if case.host_only:
        return HostClock()
    return clock_for(setting.device)


def _with_times(result: Result, timed: Paired, case: Case) -> Result:
    """Return a result with times in milliseconds, and their ratio with its quartiles."""
    ours, peer = timed.medians
    low, high = timed.quartiles
    return replace(
        result,
        ours_ms=ours * 1000,
        peer_ms=peer * 1000,
        ratio=timed.ratio / case.scale,
        low=low / case.scale,
        high=high / case.scale,
    )


def _of_both(pair: Pair, look: Callable[[Callable[[], object]], int]) -> tuple[int, int]:
    """Return what `look` says of our side and of the peer."""
    seen = []
    for call in (pair.ours, pair.peer):
        pair.prepare()
        seen.append(look(call))
    return seen[0], seen[1]


@contextlib.contextmanager
def _built(case: Case, setting: Setting) -> Iterator[Pair]:
    """Build both sides, and detach them at the end."""
    with warnings.catch_warnings():
        # A correction that is called without a forward pass says so; some say that nothing changes.
        warnings.simplefilter("ignore", RegradWarning)
        pair = case.build(setting)
        try:
            yield pair
        finally:
            pair.close()


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type):
        torch.manual_seed(0)
        yield
