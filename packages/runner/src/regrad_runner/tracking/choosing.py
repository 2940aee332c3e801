"""Which tracker shows an output folder, as the settings name it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrad_runner.settings.config import Settings
from regrad_runner.tracking.accelerate_trackers import (
    THROUGH_ACCELERATE,
    AccelerateStore,
    check_library,
)
from regrad_runner.tracking.stores import Store

MLFLOW = "mlflow"


def store_of(kind: str, folder: Path, address: str | None) -> Store | AccelerateStore:
    """Return the way to a tracker.

    Args:
        kind: "mlflow", "tensorboard" or "wandb".
        folder: The output folder.
        address: Of an MLflow server or database; None for the database in the folder.
    """
    if kind in THROUGH_ACCELERATE:
        return AccelerateStore(kind, folder)
    return Store(folder, address)


def check_tracker(settings: Settings, given: Mapping[str, Any], *, resume: bool) -> None:
    """Check that the tracker of some settings can be used, before anything is written.

    Args:
        settings: Of a command.
        given: Those that were given as flags.
        resume: Whether the others are of a folder that is continued: its address then stays
            where it is, unused by another tracker.

    Raises:
        ValueError: If its library is missing, or an address is given that it does not take.
    """
    kind = settings.tracker
    has_address = settings.tracking_uri is not None
    if has_address and kind != MLFLOW and ("tracking_uri" in given or not resume):
        raise ValueError(
            f"--tracking-uri must be given with --tracker mlflow alone, got --tracker {kind}; "
            "leave one of them out"
        )
    if kind in THROUGH_ACCELERATE:
        check_library(kind)
