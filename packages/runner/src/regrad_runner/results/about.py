"""What a folder says about itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from regrad_runner.files import read_bytes

# Of the folder. 1 kept its numbers in tables alone; in 2 the arm without corrections was `none`,
# and no rate beyond those given was tried.
LAYOUT = 3


class Role(BaseModel):
    """What an arm is in a comparison.

    Attributes:
        must_beat: Name of the arm with the trivial change that this one must beat, or None.
        control: Whether it is a control and no correction of its own.
        control_of: Of a control, the corrections that declare it.
    """

    model_config = ConfigDict(strict=True)

    must_beat: str | None
    control: bool
    control_of: list[str] = []


class About(BaseModel):
    """What is used of `about.json`. Types are checked, and fields not known here are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    layout: int | None = None
    id: str = Field(default="", pattern="^([0-9a-f]{32})?$")
    started: int = 0
    job_array: bool = False
    roles: dict[str, Role] = {}
    kind: str | None = None
    workload: str | None = None
    measure: Any = None
    samples: str | None = None
    sizes: dict[str, int] | None = None
    left_out: dict[str, str] = {}
    arms: dict[str, dict[str, Any]] = {}
    processes: int = 1
    machines: list[dict[str, Any]] = []
    script_sha256: str = ""


def read_about(path: Path) -> dict[str, Any]:
    """Return what a folder says about itself; nothing if it says nothing.

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
            f"'{file}' must be as compare or train wrote it, got something else: "
            f"{type(problem).__name__}; take it from a copy of the folder"
        ) from None
    if about.get("layout") != LAYOUT:
        raise ValueError(
            f"folder must be of layout {LAYOUT}, got '{path}' of another version of regrad; its "
            "tables can be read as they are: start again in another folder"
        )
    return about
