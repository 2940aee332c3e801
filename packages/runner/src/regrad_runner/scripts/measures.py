"""The curve of a script's measure, from what it prints or writes."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrad_runner.files import open_regular_file
from regrad_runner.settings.measure_source import STEP, MeasureSource, value_group

NOT_FINITE = re.compile(r"(?<![\w.])[-+]?(?:nan|inf|infinity)(?![\w.])", re.IGNORECASE)
LARGEST_FILE = 2**28  # bytes


@dataclass(frozen=True)
class Seen:
    """A value of the measure.

    Attributes:
        step: At which it was measured; its number in the curve, from 1, where nothing says more.
        value: May be not a number.
        time: When it was seen, in milliseconds since 1970.
    """

    step: int
    value: float
    time: int


class OutputReader:
    """Finds a measure in lines as they are printed.

    Args:
        pattern: With one group for the value, and maybe one named "step".

    Attributes:
        seen: What was found so far.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)
        self._group = value_group(self._pattern)
        self.seen: list[Seen] = []

    def hear(self, line: str) -> list[Seen]:
        """Look at a line, and return what it says of the measure."""
        found = [self._seen(match[self._group], match) for match in self._pattern.finditer(line)]
        found = found or self._not_finite(line)
        new = [seen for seen in found if seen is not None]
        self.seen += new
        return new

    def _not_finite(self, line: str) -> list[Seen | None]:
        """Find a value that is not a number where the pattern itself asks for digits.

        Otherwise the curve of a run that diverged would end at its last good value.
        """
        words = list(NOT_FINITE.finditer(line))
        if not words:
            return []
        for word in words:
            as_number = f"{line[: word.start()]}0.0{line[word.end() :]}"
            match = self._pattern.search(as_number)
            if match and match.start(self._group) <= word.start() < match.end(self._group):
                return [self._seen(word[0], match)]
        return []

    def _seen(self, text: str, match: re.Match[str]) -> Seen | None:
        value = _number(text)
        if value is None:
            return None
        step = None
        if STEP in self._pattern.groupindex:
            step = _number(match[STEP])
        return Seen(_step(step, len(self.seen)), value, _now())


def curve_in_json(text: str, key: str) -> list[Seen]:
    r"""Return a curve from JSON lines, or from one object or list of objects.

    Args:
        text: Of the file.
        key: Of the value; dots lead into objects, and into the objects of a list.

    Example:
        >>> [seen.value for seen in curve_in_json('{"loss": 2.0}\n{"loss": 1.5}', "loss")]
        [2.0, 1.5]
        >>> history = '{"log_history": [{"step": 5, "eval_loss": 2.0}, {"step": 6}]}'
        >>> [seen.step for seen in curve_in_json(history, "log_history.eval_loss")]
        [5]
    """
    rows = _objects(text)
    first, dot, rest = key.partition(".")
    if dot and len(rows) == 1 and isinstance(rows[0].get(first), list):
        items = [item for item in rows[0][first] if isinstance(item, dict)]
        return _curve(items, rest)
    return _curve(rows, key)


def curve_in_csv(text: str, column: str) -> list[Seen]:
    """Return a curve from a table with a heading; rows without a value in the column are none."""
    return _curve(csv.DictReader(text.splitlines()), column)


def curve_in_file(source: MeasureSource, file: str, folder: Path) -> list[Seen]:
    """Return a curve from the file that a script wrote; nothing where there is none.

    Args:
        source: Of the kind "json" or "csv".
        file: Its file, with everything filled in. Stars stand for any names; of several files the
            last one written is read.
        folder: In which a relative name is looked up.

    Raises:
        OSError: If the file cannot be read.
    """
    found = _newest(file, folder)
    if found is None:
        return []
    with open_regular_file(found, follow_link=True) as opened:
        text = opened.read(LARGEST_FILE).decode("utf-8", errors="replace")
    if source.kind == "json":
        return curve_in_json(text, source.key)
    return curve_in_csv(text, source.key)


def _newest(file: str, folder: Path) -> Path | None:
    """Return the file of a name that may hold stars; None where there is none."""
    path = folder / file  # an absolute name stays as it is
    if path.is_file():
        return path
    root = Path(path.anchor) if path.is_absolute() else Path()
    pattern = str(path.relative_to(root)) if path.is_absolute() else str(path)
    files = [match for match in root.glob(pattern) if match.is_file()]
    return max(files, key=lambda match: match.stat().st_mtime_ns, default=None)


def _objects(text: str) -> list[Mapping[str, Any]]:
    """Return the objects of a JSON document or of JSON lines; broken lines are left out."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = [_json_or_none(line) for line in text.splitlines()]
    items = whole if isinstance(whole, list) else [whole]
    return [item for item in items if isinstance(item, dict)]


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _curve(rows: Iterable[Mapping[str, Any]], key: str) -> list[Seen]:
    seen: list[Seen] = []
    for row in rows:
        value = _number(_at(row, key))
        if value is not None:
            seen.append(Seen(_step(_number(_at(row, STEP)), len(seen)), value, _now()))
    return seen


def _at(row: Mapping[str, Any], key: str) -> Any:
    """Return what is at a key, or at keys with dots between them; None where nothing is."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _step(step: float | None, before: int) -> int:
    """Return the step of a value; where nothing says it, how many there are with it."""
    if step is None or not math.isfinite(step):
        return before + 1
    return int(step)


def _now() -> int:
    return time.time_ns() // 1_000_000


def differs(one: Sequence[Seen], other: Sequence[Seen]) -> bool:
    """Say whether two curves hold different values."""
    return [seen.value for seen in one] != [seen.value for seen in other]
