"""The command `regrad run`: a script with corrections, and what actually happened."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrad import registry

from regrad_runner.files import write_whole
from regrad_runner.scripts.attaching import Attached, AutomaticAttachment
from regrad_runner.scripts.running import check_script, run_script
from regrad_runner.scripts.seeding import seed_everything, shift_seeds

NOTHING_ATTACHED = 3
NO_CROSS_ENTROPY = (
    "  {name} on criterion: nothing, since torch's cross entropy was not called in training"
)


@dataclass(frozen=True, kw_only=True)
class ScriptRun:
    """A script, and what is to be done with it.

    Attributes:
        words: "SCRIPT ARGS..." or "-m MODULE ARGS...".
        corrections: Strings for `regrad.create`, in acting order.
        control: Name of a control to make instead.
        control_of: Corrections whose control to make instead.
        optimizer_classes: Names of the classes of optimizers to attach to; none stands for all.
        seed: Seeds Python, NumPy and torch before the script starts; None seeds nothing.
        shifts_seeds: Whether seeds that the script sets itself are moved by 1000 · `seed`.
        receipt: File for the receipts, or None.
        traces: Whether to say when and why each optimizer is attached.
    """

    words: tuple[str, ...]
    corrections: tuple[str, ...] = ()
    control: str | None = None
    control_of: tuple[str, ...] = ()
    optimizer_classes: tuple[str, ...] = ()
    seed: int | None = None
    shifts_seeds: bool = False
    receipt: Path | None = None
    traces: bool = False


def check(script: ScriptRun) -> None:
    """Raise a `ValueError` if the script or a correction is not there; runs nothing."""
    check_script(script.words)
    registry.create_all([*script.corrections, *script.control_of])
    if script.control is not None and script.control_of:
        raise ValueError("control must be given without --control-of, which names it already")
    if script.shifts_seeds and script.seed is None:
        raise ValueError("shift_seeds must be given with --seed, which says how far")


def run(script: ScriptRun) -> int:
    """Run a script with corrections and say on stderr what happened.

    Returns:
        The script's exit code if it is not 0, 3 if nothing was attached, else 0.

    Raises:
        ValueError: If the script or a correction is not there; before anything runs.
    """
    check(script)
    automatic = AutomaticAttachment(
        script.corrections,
        control=script.control,
        control_of=script.control_of,
        classes=script.optimizer_classes,
        trace=_say if script.traces else _ignore,
    )
    if script.seed is not None:
        seed_everything(script.seed)
        if script.shifts_seeds:
            shift_seeds(script.seed)
    with automatic:
        code = run_script(script.words)
    sys.stdout.flush()
    if script.receipt is not None and _is_first_process():
        write_whole(script.receipt, json.dumps(_receipt(script, automatic), indent=2) + "\n")
    for line in summary(automatic):
        _say(line)
    automatic.detach()
    if code != 0 or automatic.attached:
        return code
    return NOTHING_ATTACHED


def summary(automatic: AutomaticAttachment) -> list[str]:
    """Return what was corrected, what was not, and why, a line each."""
    lines: list[str] = []
    for attached in automatic.attached:
        lines += _lines_of(attached)
    lines += [f"not attached: {reason}" for reason in automatic.refused]
    lines += [f"not attached: {reason}" for reason in automatic.waiting]
    if automatic.attached:
        return lines
    if automatic.left_out:
        names = ", ".join(dict.fromkeys(automatic.left_out))
        lines.append(f"not attached: {names}, whose classes were not requested")
    if not lines:
        lines.append("the script made no torch optimizer in this process")
    return [*lines, "nothing was corrected"]


def _lines_of(attached: Attached) -> list[str]:
    receipt = attached.attachment.receipt()
    names = "+".join(receipt["order"]) or "no corrections"
    steps = f"{receipt['steps_applied']:,} steps corrected"
    if receipt["steps_skipped"]:
        steps += f", {receipt['steps_skipped']:,} skipped"
    where = f"{attached.optimizer} with {' and '.join(attached.modules)}"
    lines = [f"{names} on {where}: {steps}"]
    for name, stages in receipt["effects"].items():
        for stage, seen in stages.items():
            lines.append(
                f"  {name} on {stage}: {100 * seen['share_touched']:.0f} % of tensors, "
                f"relative change {seen['relative_change']:.2g}, cosine {seen['cosine']:.3f}"
            )
    without_loss = [
        correction.name
        for correction in attached.attachment.corrections
        if "criterion" in correction.needs.stages and correction.name not in receipt["effects"]
    ]
    lines += [NO_CROSS_ENTROPY.format(name=name) for name in without_loss]
    return lines


def _receipt(script: ScriptRun, automatic: AutomaticAttachment) -> dict[str, Any]:
    """Return what happened, as plain values."""
    return {
        "script": [*script.words],
        "seed": script.seed,
        "control": script.control,
        "control_of": [*script.control_of],
        "start": automatic.start,
        "attached": [
            {
                "optimizer": attached.optimizer,
                "modules": [*attached.modules],
                "receipt": attached.attachment.receipt(),
            }
            for attached in automatic.attached
        ],
        "not_attached": [*automatic.refused, *automatic.waiting],
    }


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    if _is_first_process():
        sys.stderr.write(f"regrad: {line}\n")


def _ignore(line: str) -> None:
    del line
