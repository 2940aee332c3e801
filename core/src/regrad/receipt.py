"""The receipt: the record of what really happened."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regrad.engine import Engine
from regrad.registry import origin


def make_receipt(engine: Engine, reasons: Sequence[str]) -> dict[str, Any]:
    """Return versions, options, order, matched parameters, counts, effects, seed and environment."""
    step = engine.step()
    rows = []
    for correction in engine.corrections:
        distribution, version = origin(correction)
        acts = {"gradient", "moment", "weights"} & set(correction.needs.stages)
        pairs = zip(step.names, step.parameters, strict=True) if acts else ()
        rows.append(
            {
                "name": correction.name,
                "distribution": distribution,
                "version": version,
                "options": {key: _plain(value) for key, value in correction.option_values().items()},
                "stages": list(correction.needs.stages),
                "matched": [name for name, p in pairs if correction.selects(name, p)],
            }
        )
    notes = list(reasons)
    if engine.callers["correct_gradients"] or engine.callers["correct_moments"]:
        notes.append("gradients are read as the loop leaves them at step(): clipping in the loop comes first")
    return {
        "corrections": rows,
        "order": [c.name for c in engine.corrections],
        "notes": notes,
        "parameters": len(step.names),
        "steps_applied": engine.applied,
        "steps_skipped": engine.skipped,
        "effects": engine.meter.effects(),
        "seed": torch.initial_seed(),
        "environment": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "machine": platform.machine(),
            "device": str(step.parameters[0].device) if step.parameters else "none",
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one line per correction that is missing, added, or has other options."""
    old, new = ({c["name"]: c["options"] for c in receipt["corrections"]} for receipt in (theirs, ours))
    lines = [f"{name!r} is missing here" for name in old if name not in new]
    lines += [f"{name!r} is new here" for name in new if name not in old]
    for name in (n for n in old if n in new):
        keys = dict.fromkeys((*old[name], *new[name]))
        lines += [
            f"{name}.{key} was {old[name].get(key)!r}, is {new[name].get(key)!r}"
            for key in keys
            if old[name].get(key) != new[name].get(key)
        ]
    return lines
