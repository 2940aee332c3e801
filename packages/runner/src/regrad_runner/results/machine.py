"""What a comparison ran on: machine and versions, for whoever reads its numbers later."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib
import psutil
import torch
from regrad.devices import accelerator
from regrad.distributions import version

LIBRARIES_TOLD = ("regrad", "regrad-runner", "torch", "torchvision", "accelerate", "numpy")


def surroundings(*, processes: int, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `about.json` says of the places in which a comparison ran.

    Args:
        processes: Number of processes of this start.
        earlier: What `about.json` said before: a comparison that is continued may have run
            elsewhere too.

    Returns:
        The keys "processes", of this start, and "machines": one entry per place, in the order of
        the first start there, each with "since" (UTC), "system", "processor", "cores",
        "memory_gib", "devices", "python" and "versions".
    """
    here = machine()
    seen = list(earlier.get("machines", []))
    known = [{key: value for key, value in place.items() if key != "since"} for place in seen]
    if here not in known:
        seen.append({"since": datetime.now(UTC).isoformat(timespec="seconds"), **here})
    return {"processes": processes, "machines": seen}


def machine() -> dict[str, Any]:
    """Return what this machine is, without its name."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": _devices(),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES_TOLD if (found := version(name))},
    }


def usable_cores() -> int:
    """Return how many CPU cores this process may use.

    Fewer than there are where its affinity or a container's quota says so, or the environment
    variable LOKY_MAX_CPU_COUNT.
    """
    return int(joblib.cpu_count())


def _processor() -> str:
    """Return the processor's model; the platform module knows only its family on Linux.

    Read by hand: psutil does not tell it, and `torch.utils.collect_env` returns all that lscpu
    prints, in the language of the user.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    """Return the names of the accelerators; where torch has none, their type and number."""
    kind = accelerator()
    if kind is None:
        return []
    indices = range(torch.accelerator.device_count())
    name_of = getattr(torch.get_device_module(kind), "get_device_name", None)
    return [f"{kind}:{index}" if name_of is None else str(name_of(index)) for index in indices]
