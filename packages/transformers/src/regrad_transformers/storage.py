"""The receipt beside a Trainer's checkpoint: written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECEIPT = "regrad.json"


def write_receipt(folder: Path, receipt: Mapping[str, Any]) -> None:
    """Write what really happened into a folder, for people.

    It is written aside, forced to the disk, and renamed: a kill leaves the file that was there, or none.
    """
    path = folder / RECEIPT
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        file.write(json.dumps(receipt, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
