"""The receipt: the record of what really happened."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regrad.correction import Correction
from regrad.engine import Engine
from regrad.registry import origin
from regrad.step import Step


def make_receipt(engine: Engine, reasons: Sequence[str]) -> dict[str, Any]:
    """Return versions, options, order, matched parameters, counts, effects, seed and environment."""
    step, notes = engine.step(), list(reasons)
    if engine.callers["correct_gradients"] or engine.callers["correct_moments"]:
        notes.append("gradients are read as the loop leaves them at step(): clipping in the loop comes first")
    device = str(step.parameters[0].device) if step.parameters else "none"
    return {
        "corrections": [_row(correction, step) for correction in engine.corrections],
        "order": [c.name for c in engine.corrections],
        "notes": notes,
        "parameters": len(step.names),
        "steps_applied": engine.applied,
        "steps_skipped": engine.skipped,
        "effects": engine.meter.effects(),
        "seed": torch.initial_seed(),
        "environment": {"python": platform.python_version(), "torch": str(torch.__version__), "device": device},
    }


def _row(correction: Correction, step: Step) -> dict[str, Any]:
    """Return what is known of one correction."""
    distribution, version = origin(correction)
    on_weights = {"gradient", "moment", "weights"} & set(correction.needs.stages)
    pairs = zip(step.names, step.parameters, strict=True) if on_weights else ()
    return {
        "name": correction.name,
        "distribution": distribution,
        "version": version,
        "options": vars(correction.options),
        "stages": list(correction.needs.stages),
        "matched": [name for name, p in pairs if correction.selects(name, p)],
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one line per correction that is missing, added, or has other options."""
    old, new = ({c["name"]: c["options"] for c in receipt["corrections"]} for receipt in (theirs, ours))
    lines = [f"{name!r} is missing here" for name in old if name not in new]
    lines += [f"{name!r} is new here" for name in new if name not in old]
    for name in old.keys() & new.keys():
        pairs = {key: (old[name].get(key), new[name].get(key)) for key in {**old[name], **new[name]}}
        lines += [f"{name}.{key} was {was!r}, is {now!r}" for key, (was, now) in pairs.items() if was != now]
    return lines
