"""Import plugins one by one and write a line of JSON about each.

The doctor runs this in a process of its own.

Usage: python -m regrad_runner.plugins.doctor_imports GROUP/NAME …
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from regrad.distributions import hide_broken

LIBRARY_BUILDS = "libraries"
DEVICE = "device"


def main(wanted: list[str]) -> None:
    """Import torch and torchvision, look for a device, then import each given plugin."""
    hide_broken()  # torch would end with the first of them; the doctor names them on its own
    run_job(LIBRARY_BUILDS, _libraries)
    run_job(DEVICE, _device)
    for name in wanted:
        run_job(name, partial(_load, name))


def run_job(name: str, job: Callable[[], Any]) -> None:
    """Write one line when a job starts, since it may end the process, and one with how it went."""
    _write({"starts": name})
    clock = time.process_time if is_busy() else time.perf_counter
    start = clock()
    problem = ""
    found = None
    try:
        found = job()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever an import does is reported
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    _write({"name": name, "seconds": clock() - start, "problem": problem, "found": found})


def is_busy() -> bool:
    """Say whether the machine is overloaded: then wall-clock times prove nothing."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _write(line: dict[str, Any]) -> None:
    """Write a line of its own, whatever a plugin has printed on import."""
    sys.stdout.write(f"\n{json.dumps(line)}\n")
    sys.stdout.flush()


def _libraries() -> dict[str, str | None]:
    import torch  # noqa: PLC0415 - measured here
    import torchvision  # noqa: PLC0415

    return {
        "torch": _build(torch.version.cuda),
        "torchvision": _build(getattr(torchvision.version, "cuda", None)),
    }


def _build(cuda: Any) -> str:
    """Name what a library is built for; torchvision may write CUDA 13.2 as 13020."""
    if not cuda:
        return "the CPU"
    if not str(cuda).isdigit():
        return f"CUDA {cuda}"
    number = int(cuda)
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def _device() -> dict[str, Any]:
    import torch  # noqa: PLC0415

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.accelerator.is_available()
        kind = str(torch.accelerator.current_accelerator()) if found else "cpu"
    reasons = [" ".join(str(warning.message).split()) for warning in said]
    return {
        "kind": kind,
        "count": torch.accelerator.device_count() if found else 0,
        "reasons": reasons,
    }


def _load(name: str) -> None:
    import regrad  # noqa: PLC0415

    group, _, plugin = name.partition("/")
    loaded = regrad.load(plugin, group)
    if isinstance(loaded, type) and issubclass(loaded, regrad.Correction):
        loaded.check_class()


if __name__ == "__main__":
    main(sys.argv[1:])
