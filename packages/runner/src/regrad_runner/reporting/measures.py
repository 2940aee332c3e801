"""The measure of a folder, which may come from hands that are not to be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrad_runner.workloads.workload import Measure


def measure_in(about: Mapping[str, Any]) -> Measure | None:
    """Return the measure that a folder names; None if it names none, or something else.

    Args:
        about: What the folder says about itself.

    Example:
        >>> measure_in({"measure": {"name": "loss"}}).name, measure_in({"measure": {"mean": 1}})
        ('loss', None)
    """
    values = about.get("measure")
    if not isinstance(values, dict):
        return None
    try:
        measure = Measure(**values)
    except TypeError:
        return None
    return measure if measure.is_whole else None
