"""What a table of timings must say about its machine, versions and command."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from regrad.devices import accelerator

PEERS = ("torch", "torchvision", "timm", "pytorch-optimizer", "regrad")


def about(command: str, *, pairs: int, quick: bool) -> dict[str, str]:
    """Return the conditions of a run, as names and texts.

    Args:
        command: The command as it was typed.
        pairs: Pairs that were asked for.
        quick: Whether the sizes were small, so that the numbers mean nothing.
    """
    threads = torch.get_num_threads()
    clock = "CPU time of the process" if threads == 1 else "time that passed"
    seen = {
        "Machine": f"{processor()}, {os.cpu_count()} cores; {graphics()}",
        "Threads": f"{threads}; seconds are {clock} (start-up: time that passed)",
        "Versions": ", ".join(f"{name} {version(name)}" for name in PEERS)
        + f", Python {platform.python_version()}",
        "Command": f"`{command}`, {pairs} pairs at most",
        "Date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if os.name == "posix":
        seen["Load at the start"] = (
            f"{os.getloadavg()[0]:.1f} processes wanted a core in the last minute"
        )
    return seen | ({"Sizes": "quick: small sizes, so the numbers mean nothing"} if quick else {})


def processor() -> str:
    """Return the processor's name, as Linux has it or else as Python does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def graphics() -> str:
    """Return the name of the first accelerator device."""
    kind = accelerator()
    if kind is None:
        return "no accelerator device"
    name_of = getattr(torch.get_device_module(kind), "get_device_name", None)
    return kind if name_of is None else str(name_of(0))
