"""What a folder says about itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from regrad_runner.files import read_bytes


class About(BaseModel):
    """What `about.json` says, as far as it is used; the types are checked, what is not known here is kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    kind: str | None = None
    workload: str | None = None
    measure: Any = None
    samples: str | None = None
    left_out: dict[str, str] = {}
    arms: dict[str, dict[str, Any]] = {}
    tracked: str = ""
    processes: int = 1
    machines: list[dict[str, Any]] = []


def read_about(path: Path) -> dict[str, Any]:
    """Return what a folder says about itself; nothing where it says nothing.

    Raises:
        ValueError: If its `about.json` is damaged.
    """
    file = path / "about.json"
    if not os.path.lexists(file):
        return {}
    try:
        about: dict[str, Any] = json.loads(read_bytes(file))
        About.model_validate(about)
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(
            f"'{file}' must be as compare or train wrote it, got something else: {type(problem).__name__}; "
            "take it from a copy of the folder"
        ) from None
    return about
