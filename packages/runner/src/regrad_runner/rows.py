"""Files that are there whole or not at all, and rows of dataclasses in CSV that no spreadsheet computes."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Row = TypeVar("Row")
PART = ".part"
COMPUTED = ("=", "+", "-", "@", "\t", "\r", "'")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one, never a half."""
    aside = path.with_name(f".{path.name}{PART}")
    with aside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_rows(path: Path, rows: Iterable[Any], kind: type[Any]) -> None:
    """Write dataclass rows as CSV; None is an empty cell."""
    names = sorted((f.name for f in fields(kind)), key=lambda name: name not in ("arm", "seed"))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)
    write_whole(path, text.getvalue())


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read back what `write_rows` wrote; nothing where there is no file.

    Raises:
        ValueError: If the file does not hold such rows.
    """
    if not path.is_file():
        return []
    hints = get_type_hints(kind)
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return [
                kind(**{k: _read_cell(v, hints[k]) for k, v in row.items()})
                for row in csv.DictReader(file)
            ]
        except (KeyError, TypeError, ValueError, csv.Error) as problem:
            raise ValueError(
                f"'{path}' must hold the columns {', '.join(hints)}: {problem}"
            ) from problem


def _cell(value: Any) -> Any:
    """Return what stands in a cell: a text that a spreadsheet would compute, or that is one of these, is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in COMPUTED else value


def _read_cell(text: str, hint: Any) -> Any:
    """Turn a cell into the type that the row's annotation names."""
    kinds = getattr(hint, "__args__", (hint,))
    if type(None) in kinds and not text:
        return None
    if bool in kinds:
        return {"True": True, "False": False}[text]
    kind = next((kind for kind in (int, float) if kind in kinds), None)
    return text.removeprefix("'") if kind is None else kind(text)
