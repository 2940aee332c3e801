"""How often a corrected training step waits for the device, beside the plain step: must be 0 more.

Usage: python docs/gpu/synchronisations.py FILE.csv [--quick] [--device cuda]

The step is the bench's, a ResNet-20 on one batch. On CUDA the profiler counts the calls that wait
(FILE.csv's column waits), and torch's own check the operations that would (warnings). On a CPU
nothing waits: only the reads of a tensor as a number are counted, which would wait if it lay on a
device.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import regrad
import torch
from regrad import RegradError, RegradWarning
from regrad_bench.cases import Attached, Setting
from regrad_bench.training import Trainer, resnet20
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

STEPS = 5
WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = "aten::_local_scalar_dense"


@dataclass(frozen=True)
class Waits:
    """What was counted of one kind of step.

    Attributes:
        correction: Its name; "plain" for the step without an attachment.
        reads: Tensors read as a number, per step.
        waits: Calls that wait for the device, per step; None where there is none. What the profiler
            waits for at its end is among them, also in the plain step.
        warnings: Operations that torch's own check says would wait, in one step; None likewise.
        reason: Why nothing was counted, or "".
    """

    correction: str
    reads: float | None = None
    waits: float | None = None
    warnings: int | None = None
    reason: str = ""


def main() -> int:
    """Count for every installed correction; 1 if one waits more often than the plain step."""
    parser = argparse.ArgumentParser(description="Count synchronisations per step.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", RegradWarning)
    setting = Setting(device=torch.device(asked.device), quick=asked.quick)
    plain = count("plain", Trainer(resnet20(setting), setting.device).step, setting.device)
    rows = [plain, *(count_corrected(name, setting) for name in regrad.available())]
    write(asked.file, rows)
    waiting = [row.correction for row in rows if waits_more(row, plain)]
    for row in rows:
        sys.stdout.write(
            f"{row.correction}: {row.waits} waits, {row.warnings} warnings, {row.reads} reads "
            f"per step {row.reason}\n"
        )
    if setting.device.type == "cpu":
        sys.stdout.write("nothing waits on a CPU\n")
        return 0
    sys.stdout.write(f"steps that wait more than the plain one: {', '.join(waiting) or 'none'}\n")
    return int(bool(waiting))


def count_corrected(name: str, setting: Setting) -> Waits:
    """Count for one correction, past the steps in which the effect meter looks."""
    trainer = Trainer(resnet20(setting), setting.device)
    try:
        attached = Attached(trainer.model, trainer.optimizer, [name], F.cross_entropy)
    except (RegradError, ValueError) as problem:
        return Waits(name, reason=str(problem))
    trainer.criterion = attached.attachment.criterion

    def step() -> None:
        attached.pass_the_meter()
        trainer.step()

    counted = count(name, step, setting.device)
    attached.attachment.detach()
    return counted


def count(name: str, step: Callable[[], None], device: torch.device) -> Waits:
    """Count what waits in some steps, after two that are not looked at."""
    on_cuda = device.type == "cuda"
    step()
    step()
    activities = [ProfilerActivity.CPU]
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, acc_events=True) as seen:
        for _ in range(STEPS):
            step()
    names = [event.name for event in seen.events()]
    reads = names.count(READS) / STEPS
    if not on_cuda:
        return Waits(name, reads=reads)
    waits = sum(event in WAITING_CALLS for event in names) / STEPS
    return Waits(name, reads=reads, waits=waits, warnings=_warnings_of(step))


def _warnings_of(step: Callable[[], None]) -> int:
    """Return how many operations of a step torch's own check complains of."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def waits_more(row: Waits, plain: Waits) -> bool:
    """Say whether a step waits more often than the plain one, by either count."""
    pairs = [(row.waits, plain.waits), (row.warnings, plain.warnings)]
    return any(ours > theirs for ours, theirs in pairs if ours is not None and theirs is not None)


def write(path: Path, rows: list[Waits]) -> None:
    """Write the counts as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
