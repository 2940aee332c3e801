"""The receipt: the record of what really happened."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regrad.engine import Engine
from regrad.registry import origin


def make_receipt(engine: Engine, reasons: Sequence[str]) -> dict[str, Any]:
    """Return versions, options, order, matched parameters, counts, effects, seed and environment."""
    step, rows, notes = engine.step(), [], list(reasons)
    for c in engine.corrections:
        on_weights = {"gradient", "moment", "weights"} & set(c.needs.stages)
        pairs = zip(step.names, step.parameters, strict=True) if on_weights else ()
        matched = [name for name, p in pairs if c.selects(name, p)]
        row = {"name": c.name, **origin(c), "options": vars(c.options)}
        rows.append(row | {"stages": list(c.needs.stages), "matched": matched})
    if engine.callers["correct_gradients"] or engine.callers["correct_moments"]:
        notes.append("gradients are read as the loop leaves them at step(): clipping in the loop comes first")
    counts = {"parameters": len(step.names), "steps_applied": engine.applied, "steps_skipped": engine.skipped}
    device = str(step.parameters[0].device) if step.parameters else "none"
    environment = {"python": platform.python_version(), "torch": str(torch.__version__), "device": device}
    order = [c.name for c in engine.corrections]
    seen = {"effects": engine.meter.effects(), "seed": torch.initial_seed(), "environment": environment}
    return {"corrections": rows, "order": order, "notes": notes, **counts, **seen}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one line per correction that is missing, added, or has other options."""
    old, new = ({c["name"]: c["options"] for c in receipt["corrections"]} for receipt in (theirs, ours))
    lines = [f"{name!r} is {'missing' if name in old else 'new'} here" for name in sorted(old.keys() ^ new.keys())]
    pairs = [(name, key) for name in old if name in new for key in {**old[name], **new[name]}]
    changed = [(name, key) for name, key in pairs if old[name].get(key) != new[name].get(key)]
    return lines + [f"{n}.{key} was {old[n].get(key)!r}, is {new[n].get(key)!r}" for n, key in changed]
