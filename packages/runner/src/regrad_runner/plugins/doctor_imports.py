"""Import plugins one by one and say, a line of JSON each, how it went: run by the doctor in a process of its own.

Usage: python -m regrad_runner.plugins.doctor_imports GROUP/NAME …
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from regrad.distributions import hide_broken

LIBRARIES, DEVICE = "libraries", "device"


def main(wanted: list[str]) -> None:
    """Import torch and torchvision, look for a device, then import each plugin that was asked for."""
    hide_broken()  # torch would end with the first of them; the doctor names them on its own
    report(LIBRARIES, _libraries)
    report(DEVICE, _device)
    for name in wanted:
        report(name, lambda name=name: _load(name))  # type: ignore[misc]


def report(name: str, job: Callable[[], Any]) -> None:
    """Write one line when a job starts, since it may end the process, and one with how it went."""
    _write({"starts": name})
    clock = time.process_time if is_busy() else time.perf_counter
    start, problem, found = clock(), "", None
    try:
        found = job()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what a foreign module does on import is what we report
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    _write({"name": name, "seconds": clock() - start, "problem": problem, "found": found})


def is_busy() -> bool:
    """Say whether more wants to run here than can: then a clock on the wall says nothing of a plugin."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _write(line: dict[str, Any]) -> None:
    sys.stdout.write(
        "\n" + json.dumps(line) + "\n"
    )  # what a plugin prints on import ends before it
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
    number = int(cuda) if str(cuda).isdigit() else 0
    return f"CUDA {number // 1000}.{number % 1000 // 10}" if number else f"CUDA {cuda}"


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
