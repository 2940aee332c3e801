"""The receipt beside a Trainer's checkpoint: written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

RECEIPT = "regrad.json"


def write_receipt(folder: Path, receipt: Mapping[str, Any]) -> None:
    """Write what actually happened into a folder, for people to read.

    If the process is killed, the old file stays, or none.
    """
    _write(folder / RECEIPT, json.dumps(receipt, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    """Write aside, force it to the disk, and rename.

    The temporary name cannot be guessed, and is never opened through a link.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    flags = (
        os.O_WRONLY
        | os.O_CREAT
        | os.O_EXCL
        | getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_BINARY", 0)
    )
    file = os.fdopen(os.open(aside, flags, 0o666), "wb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
