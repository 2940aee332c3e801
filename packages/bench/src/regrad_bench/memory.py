"""The largest memory that a call holds beyond what was there, and the kernels it launches."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from regrad_bench.timing import Call

# What the profiler calls a launch on CUDA, on ROCm, and on Intel's devices.
LAUNCHES = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "hipLaunchKernel",
    "hipExtLaunchKernel",
    "urEnqueueKernelLaunch",
)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the most bytes that torch's allocator held for `call`, beyond what was there.

    On a CPU every allocation and release is read from the profiler's trace; on an
    accelerator it is the allocator's own count. Memory that libraries take for themselves is
    not in it. What the call releases of memory from before counts on an accelerator alone.

    Args:
        call: Called once. What it returns is released first.
        device: The device to look at.
    """
    gc.collect()  # garbage that an earlier call left would be released, and counted, in this one
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        call()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    return highest(_changes(_trace(call, memory=True)))


def _changes(events: Iterable[dict[str, Any]]) -> Iterator[int]:
    """Yield what each allocation adds, and each release of what was allocated in these events.

    Of memory from before them the profiler knows no size, or that of an older block that lay at
    the same address in an earlier trace.
    """
    held: dict[int, int] = {}
    for event in events:
        if event.get("name") != "[memory]":
            continue
        address, change = event["args"]["Addr"], event["args"]["Bytes"]
        if change > 0:
            held[address] = change
            yield change
        elif address in held:
            yield -held.pop(address)


def highest(changes: Iterable[int]) -> int:
    """Return the largest running sum.

    Example:
        >>> highest([4, 2, -4, 1])
        6
    """
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


def sees_launches() -> bool:
    """Say whether the profiler sees more than the CPU."""
    return len(_activities()) > 1


def launches(call: Call) -> int:
    """Return how many kernels `call` launches on an accelerator."""
    return sum(
        str(event.get("name", "")).startswith(LAUNCHES) for event in _trace(call, memory=False)
    )


def _activities() -> list[ProfilerActivity]:
    """Return what the profiler can see here."""
    find: Any = supported_activities
    return list(find())


def _trace(call: Call, *, memory: bool) -> list[dict[str, Any]]:
    """Return the profiler's events of one call in the order of time."""
    activities = [ProfilerActivity.CPU] if memory else _activities()
    with profile(activities=activities, profile_memory=memory, acc_events=True) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return sorted(
        (event for event in events if "ts" in event), key=lambda event: float(event["ts"])
    )
