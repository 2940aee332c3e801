"""Checksums of the tables in a folder: a table that was cut reads like a shorter one, and nothing else can tell."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from regrad_runner.files import read_bytes, write_whole

FILE = ".checksums.json"
SEALS = TypeAdapter(dict[str, list[str]])


@contextmanager
def sealed(path: Path, content: bytes) -> Iterator[None]:
    """Note what a file is going to hold while the block writes it.

    Until the end of the block what it held before is noted too: a kill may come before the file is renamed, or after.

    Args:
        path: The file.
        content: What the block writes.

    Raises:
        DiskError: If the disk does not take the note.
    """
    before = [_sum(read_bytes(path))] if path.is_file() else []
    _note(path, [_sum(content), *before])
    yield
    if before:
        _note(path, [_sum(content)])


def check_seal(path: Path, content: bytes) -> None:
    """Raise a `ValueError` unless a file holds what was written; in an older folder anything may stand.

    Args:
        path: The file.
        content: What it holds.
    """
    known = _read(path.parent).get(path.name)
    if known is not None and _sum(content) not in known:
        raise ValueError(
            f"'{path}' must be as it was written, got another or a part of it; take it from a copy of the folder, "
            f"or remove it and '{path.with_name(FILE)}' to go on without it"
        )


def _note(path: Path, sums: list[str]) -> None:
    seals = _read(path.parent)
    seals[path.name] = sums
    write_whole(path.parent / FILE, json.dumps(seals, indent=1) + "\n")


def _read(folder: Path) -> dict[str, list[str]]:
    path = folder / FILE
    if not os.path.lexists(path):
        return {}
    try:
        return SEALS.validate_json(read_bytes(path), strict=True)
    except (OSError, ValidationError):
        raise ValueError(
            f"'{path}' must hold the checksums of the tables, got something else; "
            "remove it if you know that the tables are whole"
        ) from None


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
