"""The corrections' files in a Trainer's checkpoint: written whole or not at all, read without running anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from regrad.errors import RegradError

STATE, RECEIPT = "regrad.pt", "regrad.json"


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a folder's state file."""
    content = io.BytesIO()
    torch.save(dict(state), content)
    _write(folder / STATE, content.getvalue())


def write_receipt(folder: Path, receipt: Mapping[str, Any]) -> None:
    """Write what really happened beside it, for people."""
    _write(folder / RECEIPT, json.dumps(receipt, indent=1).encode())


def read_state(folders: Iterable[Path], run: str, step: int) -> dict[str, Any]:
    """Return the state that a run wrote at a step, from the first folder that holds it.

    Raises:
        RegradError: If none does, or a file holds more than tensors and plain values.
    """
    places = [*dict.fromkeys(folder / STATE for folder in folders)]
    for place in places:
        if place.is_file():
            state = _read(place)
            if (state.get("run"), state.get("step")) == (run, step):
                return state
    looked = ", ".join(f"'{place}'" for place in places)
    raise RegradError(
        f"checkpoint must hold the state of its corrections, got none of step {step} of its run in {looked}; give "
        "RegradCallback the resume_from_checkpoint of train()"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as problem:
        raise RegradError(
            f"state of corrections must be tensors and plain values, got another or half a file in '{path}'; "
            "resume from another checkpoint"
        ) from problem
    return state if isinstance(state, dict) else {}


def _write(path: Path, content: bytes) -> None:
    """Write aside, force it to the disk, and rename: a kill leaves the file that was there, or none.

    The name aside cannot be foreseen, and is never opened through a link.
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
