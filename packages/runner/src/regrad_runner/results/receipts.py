"""Reading receipts: what runs actually did, as they wrote it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from regrad_runner.files import read_bytes


class Seen(BaseModel):
    """What a correction did in one stage, in means over the run."""

    model_config = ConfigDict(extra="allow", strict=True)

    share_touched: float
    relative_change: float
    cosine: float
    trigger_rate: float


class Part(BaseModel):
    """A correction that was attached."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    distribution: str | None = ""
    version: str | None = ""
    options: dict[str, Any] = {}
    stages: list[str] = []


class OfTheRun(BaseModel):
    """What the runner adds."""

    model_config = ConfigDict(extra="allow", strict=True)

    control: dict[str, Any] | None = None


class Receipt(BaseModel):
    """What is read of a receipt; the rest may be anything."""

    model_config = ConfigDict(extra="allow", strict=True)

    corrections: list[Part]
    order: list[str]
    effects: dict[str, dict[str, Seen]]
    notes: list[str] = []
    run: OfTheRun = OfTheRun()
    environment: dict[str, Any] = {}


def read_receipt(path: Path) -> dict[str, Any]:
    """Return a run's receipt.

    Raises:
        ValueError: If there is none, or something else in its place.
    """
    try:
        receipt: dict[str, Any] = json.loads(read_bytes(path))
        Receipt.model_validate(receipt)
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(
            f"'{path}' must be the receipt of the run, got another: {_reason(problem)}; "
            "take it from a copy of the folder"
        ) from None
    return receipt


def _reason(problem: Exception) -> str:
    if not isinstance(problem, ValidationError):
        return str(problem) or type(problem).__name__
    first = problem.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
