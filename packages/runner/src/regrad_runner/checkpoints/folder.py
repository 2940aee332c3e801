"""The folder of a checkpoint: whole or absent, with a checksum of every file.

Written by hand: neither `torch.distributed.checkpoint` nor accelerate's `save_state` puts a whole
folder in the place of an old one at once, or keeps checksums by which a damaged file is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from regrad.errors import RegradError

from regrad_runner.errors import DiskError
from regrad_runner.files import (
    PART,
    check_own_folder,
    disk_errors,
    folder_aside,
    force_names,
    move_aside,
    open_regular_file,
    read_bytes,
    remove_folder,
    remove_left_over,
    unforeseeable,
    whole_file,
)

FORMAT = 3
CHECKPOINT_PREFIX = "step-"
DAMAGED_PREFIX = "damaged-"
TENSORS = "tensors.pt"
STATE = "state.json"
CHECKPOINT_RECEIPT = "receipt.json"
CHECKSUMS = "checksums.json"
# The files of an engine that writes its own; absent otherwise.
ENGINE = "engine"


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        tensors: Nested dictionaries and lists of tensors and plain values.
        state: What JSON can hold.
        receipt: What JSON can hold.
    """

    tensors: Mapping[str, Any]
    state: Mapping[str, Any]
    receipt: Mapping[str, Any]


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the one with the most steps last."""
    return sorted(folder.glob(f"{CHECKPOINT_PREFIX}*"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or would be."""
    return folder / f"{CHECKPOINT_PREFIX}{step:08d}"


def make_engine_folder(folder: Path, step: int) -> Path:
    """Make a hidden folder in which an engine writes its files, before they are moved.

    Args:
        folder: Holds the run's checkpoints; made if it does not exist.
        step: Of the checkpoint.

    Raises:
        DiskError: If it cannot be made.
    """
    check_own_folder(folder)
    aside = unforeseeable(checkpoint_path(folder, step), PART)
    with disk_errors(folder):
        aside.mkdir(parents=True)
    return aside


def write_checkpoint(
    folder: Path, step: int, content: Content, *, keep: int, engine: Path | None = None
) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest.

    Args:
        folder: Holds the run's checkpoints; made if it does not exist.
        step: Names the checkpoint; another one of this step is replaced.
        content: What to keep.
        keep: How many of the last checkpoints stay, at least 1.
        engine: From `make_engine_folder`, with a folder `ENGINE` in it, which is moved; or None.

    Returns:
        The checkpoint's folder.

    Raises:
        RegradError: If it cannot be written to disk; what was there before is unchanged.
    """
    path = checkpoint_path(folder, step)
    check_own_folder(folder)
    try:
        with folder_aside(path) as aside:
            if engine is not None:
                _move_engine(engine / ENGINE, aside / ENGINE)
            _fill(aside, content)
    except OSError as problem:
        raise DiskError(
            f"checkpoint must be written, got {problem}; earlier ones are intact: free some space "
            "and use --resume"
        ) from problem
    for old in checkpoints(folder)[:-keep]:
        remove_folder(old)
    remove_left_over(folder, CHECKPOINT_PREFIX)
    return path


def read_checkpoint(path: Path) -> Content:
    """Read a checkpoint without running anything that it holds.

    Raises:
        RegradError: If it is damaged, of another format, or holds more than tensors and plain
            values.
    """
    fault = damage_of(path)
    if fault is not None:
        raise RegradError(f"checkpoint must be undamaged, got '{path}': {fault}")
    try:
        state = _read_json(path / STATE)
        receipt = _read_json(path / CHECKPOINT_RECEIPT)
    except (ValueError, RecursionError) as problem:
        raise RegradError(
            f"checkpoint must hold JSON objects beside its tensors, got something else in '{path}'"
        ) from problem
    if state.get("format") != FORMAT:
        raise RegradError(
            f"checkpoint must be of format {FORMAT}, got {state.get('format')!r} in '{path}'"
        )
    return Content(_read_tensors(path), state, receipt)


def _read_tensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a checkpoint; nothing in them is run."""
    try:
        tensors = torch.load(path / TENSORS, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise RegradError(
            f"checkpoint must hold tensors and plain values only, got '{path / TENSORS}', "
            "which would run code; "
            "it is not loaded: remove it if you do not know where it comes from"
        ) from problem
    except Exception as problem:
        raise RegradError(
            "checkpoint must be a file written by torch.save, got something else in "
            f"'{path / TENSORS}'"
        ) from problem
    if not isinstance(tensors, dict):
        raise RegradError(
            f"checkpoint must hold tensors by name, "
            f"got {type(tensors).__name__} in '{path / TENSORS}'"
        )
    return tensors


def read_latest(folder: Path) -> tuple[Path, Content, list[str]] | None:
    """Read the latest checkpoint that is whole.

    Damaged ones that come after it are renamed, so that they no longer count.

    Returns:
        Where it is, what it holds, and a line for each damaged one; None if there is no
        checkpoint.

    Raises:
        RegradError: If all are damaged, or the one to be read is refused.
    """
    faults: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        fault = damage_of(path)
        if fault is None:
            content = read_checkpoint(path)
            return path, content, [_set_aside(old, why, instead=path) for old, why in faults]
        faults.append((path, fault))
    if faults:
        listed = "; ".join(f"{path.name}: {fault}" for path, fault in faults)
        raise RegradError(
            f"checkpoints must be undamaged to resume, got only damaged ones in '{folder}' "
            f"({listed})"
        )
    return None


def damage_of(path: Path) -> str | None:
    """Say what is wrong with a checkpoint's files; None if every file is unchanged."""
    try:
        sums = _read_json(path / CHECKSUMS)
        for name in _names_of_files(path, sums):
            if checksum(path / name) != sums.get(name):
                return f"{name} has changed since it was written"
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).name} is missing"
    except OSError as problem:
        name = Path(problem.filename or CHECKSUMS).name
        return f"{name} cannot be read ({problem.strerror or type(problem).__name__})"
    except (ValueError, RecursionError) as problem:
        return f"{CHECKSUMS} cannot be read ({type(problem).__name__})"
    return None


def _names_of_files(path: Path, sums: Mapping[str, Any]) -> list[str]:
    """Return the files of a checkpoint, those of an engine that are there or should be last."""
    of_engine = {name for name in sums if name.startswith(f"{ENGINE}/")}
    of_engine.update(file.relative_to(path).as_posix() for file in engine_files(path))
    return [TENSORS, STATE, CHECKPOINT_RECEIPT, *sorted(of_engine)]


def engine_files(path: Path) -> list[Path]:
    """Return the files that an engine wrote for a checkpoint; none where there is no engine."""
    return sorted((path / ENGINE).glob("*"))


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open_regular_file(path, follow_link=True) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move_engine(found: Path, here: Path) -> None:
    """Move what an engine wrote into a folder that is written aside, forced to the disk."""
    found.rename(here)
    for file in here.iterdir():
        with open_regular_file(file, follow_link=False) as written:
            os.fsync(written.fileno())
    force_names(here)


def _fill(folder: Path, content: Content) -> None:
    """Write the files, and last the checksums: of what is on the disk, not of what was meant."""
    with whole_file(folder / TENSORS) as file:
        torch.save(dict(content.tensors), file)
    _write_json(folder / STATE, {"format": FORMAT, **content.state})
    _write_json(folder / CHECKPOINT_RECEIPT, content.receipt)
    written = [*sorted(path for path in folder.iterdir() if path.is_file()), *engine_files(folder)]
    sums = {path.relative_to(folder).as_posix(): checksum(path) for path in written}
    _write_json(folder / CHECKSUMS, sums)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to a file of a folder that is written aside."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a `ValueError`."""
    read = json.loads(read_bytes(path))
    if not isinstance(read, dict):
        message = f"'{path}' must hold a JSON object, got {type(read).__name__}"
        raise ValueError(message)  # noqa: TRY004 - it is the file that is wrong
    return read


def _set_aside(path: Path, fault: str, *, instead: Path) -> str:
    """Rename a damaged checkpoint and say so."""
    kept = path.with_name(DAMAGED_PREFIX + path.name)
    move_aside(path, kept)
    return (
        f"checkpoint {path.name} is damaged: {fault}; "
        f"it is now '{kept}', and {instead.name} is used instead"
    )
