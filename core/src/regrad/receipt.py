"""The receipt: what actually happened, as plain values that JSON can hold."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from regrad import registry
from regrad.distributions import version

if TYPE_CHECKING:
    from regrad.correction import Correction
    from regrad.engine import Engine
    from regrad.hookspecs import Step

CLIPPED = "gradients are read as the loop leaves them at step(): clipping in the loop comes first"
ON_WEIGHTS = {"gradient", "moment", "update", "weights"}


def receipt(engine: Engine, reasons: tuple[str, ...]) -> dict[str, Any]:
    """Return the receipt of an attachment, see `Attachment.receipt`.

    Args:
        engine: Of the attachment.
        reasons: Why corrections were moved, and what they note about their choices.
    """
    step = engine.step()
    notes = list(reasons)
    own_step = engine.layout.own_step
    if own_step is not None:
        notes += own_step.notes
    elif engine.callers["correct_gradients"] or engine.callers["correct_moments"]:
        notes.append(CLIPPED)
    return {
        "corrections": [_row(correction, step) for correction in engine.corrections],
        "order": [correction.name for correction in engine.corrections],
        "notes": notes,
        "parameters": len(step.names),
        "steps_applied": engine.applied,
        "steps_skipped": engine.skipped,
        "effects": engine.meter.effects(),
        "seed": torch.initial_seed(),
        "environment": _environment(step),
    }


def _row(correction: Correction, step: Step) -> dict[str, Any]:
    """Return what one correction is, and which parameters it acts on."""
    matched: list[str] = []
    if ON_WEIGHTS & set(correction.needs.stages):
        named = step.named_parameters()
        matched = [name for name, parameter in named if correction.selects(name, parameter)]
    return {
        "name": correction.name,
        **registry.origin(correction),
        "options": json.loads(json.dumps(vars(correction.options), default=str)),
        "stages": list(correction.needs.stages),
        "matched": matched,
    }


def _environment(step: Step) -> dict[str, str]:
    """Return versions and devices."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "regrad": version("regrad"),
        "device": ", ".join(sorted({str(parameter.device) for parameter in step.parameters})),
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one line per correction that is missing, added, or has other options."""
    old = {row["name"]: row["options"] for row in theirs["corrections"]}
    new = {row["name"]: row["options"] for row in ours["corrections"]}
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            lines.append(f"{name!r} is missing here")
        elif name not in old:
            lines.append(f"{name!r} is new here")
        else:
            lines += _changed_options(name, old[name], new[name])
    return lines


def _changed_options(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}.{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
