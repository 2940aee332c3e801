"""Rows of dataclasses in CSV, safe from spreadsheet formulas, read back completely or refused."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from regrad_runner.files import read_bytes, write_whole

Row = TypeVar("Row")
COMPUTED = ("=", "+", "-", "@", "\t", "\r", "'")


def write_rows(path: Path, rows: Iterable[Any], kind: type[Any]) -> None:
    """Write dataclass rows as CSV; None is an empty cell.

    Raises:
        DiskError: If it cannot be written to disk; the old file is unchanged.
    """
    names = _columns(kind)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows({name: _cell(getattr(row, name)) for name in names} for row in rows)
    content = text.getvalue().encode()
    write_whole(path, content)


def _columns(kind: type[Any]) -> list[str]:
    """Return the fields of a row, with those that name the run first."""
    names = [field.name for field in fields(kind)]
    first = [name for name in names if name in ("arm", "seed")]
    return first + [name for name in names if name not in first]


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read back what `write_rows` wrote; nothing if there is no file.

    Raises:
        ValueError: If the file does not hold such rows, or not all of them.
    """
    if not os.path.lexists(path):
        return []
    try:
        content = read_bytes(path)
    except OSError as problem:
        raise ValueError(f"'{path}' must be a file that can be read, got {problem}") from None
    hints = get_type_hints(kind)
    try:
        text = content.decode()
        if not text.endswith("\n") or "\0" in text:
            raise ValueError("the last line is incomplete, or some bytes are not text")
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [_row(kind, header, cells, hints) for cells in lines]
    except (KeyError, TypeError, ValueError, csv.Error) as problem:
        raise ValueError(
            f"'{path}' must hold the columns {', '.join(hints)}: {problem}"
        ) from problem


def checked(kind: type[Row], values: Any) -> Row:
    """Return a dataclass made of plain values.

    Raises:
        ValueError: If a value is missing, unknown or of another type; in one line.
    """
    try:
        # As JSON, which has a dictionary where Python has a dataclass.
        made: Row = _checker(cast(Any, kind)).validate_json(json.dumps(values), strict=True)
    except ValidationError as problems:
        problem = problems.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "value"
        raise ValueError(f"{where}: {problem['msg']}") from None
    return made


@functools.cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    """Return what checks values of a dataclass; to make it takes longer than a hundred checks."""
    return TypeAdapter(kind)


def _row(kind: type[Row], header: Sequence[str], cells: Sequence[str], hints: Any) -> Row:
    """Return the row that a line stands for."""
    if len(cells) != len(header):
        raise ValueError(f"a line must have {len(header)} cells, got {len(cells)}")
    return kind(
        **{name: _read_cell(cell, hints[name]) for name, cell in zip(header, cells, strict=True)}
    )


def _cell(value: Any) -> Any:
    """Return the text of a cell.

    Text that a spreadsheet would compute, or that begins with a quote, is prefixed with a quote.
    """
    if isinstance(value, str) and value[:1] in COMPUTED:
        return f"'{value}"
    return value


def _read_cell(text: str, hint: Any) -> Any:
    """Turn a cell into the type that the row's annotation names."""
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and not text:
        return None
    if bool in kinds:
        return {"True": True, "False": False}[text]
    kind = next((kind for kind in (int, float) if kind in kinds), None)
    if kind is not None:
        return kind(text)
    plain = text.removeprefix("'")
    if kinds != (str,) and str not in kinds and plain not in kinds:  # of a Literal
        raise ValueError(f"a cell must be one of {', '.join(map(str, kinds))}, got {plain!r}")
    return plain
