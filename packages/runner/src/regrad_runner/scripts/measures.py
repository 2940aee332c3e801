"""The curve of a script's measure, from what it prints or writes."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrad_runner.files import open_regular_file
from regrad_runner.results.run import now
from regrad_runner.settings.measure_source import STEP, MeasureSource, value_group
from regrad_runner.settings.script_config import filled_in

NOT_FINITE_WORD = re.compile(r"(?<![\w.])[-+]?(?:nan|inf|infinity)(?![\w.])", re.IGNORECASE)
# What a number pattern may match in a place where there is "nan" or "inf" instead.
AS_NUMBERS = ("0.0", "0", *(f"0.{'0' * digits}" for digits in range(2, 9)), "0.0e+00", "0.0000e+00")
LARGEST_MEASURE_FILE = 2**28  # bytes
LARGEST_STEP = 2**53
PUNCTUATION = ".,;:%"  # that a pattern such as [0-9.]+ takes along with a number


@dataclass(frozen=True)
class Measured:
    """A value of the measure.

    Attributes:
        step: At which it was measured; its number in the curve, from 1, if nothing says more.
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
        self.seen: list[Measured] = []

    def hear(self, line: str) -> list[Measured]:
        """Look at a line, and return what it says of the measure."""
        found = [*self._numbers(line), *self._not_finite(line)]
        new: list[Measured] = []
        for text, match in sorted(found, key=lambda pair: pair[1].start()):
            value = _number(text)
            if value is not None:
                step = _step(self._step_of(match), len(self.seen) + len(new))
                new.append(Measured(step, value, now()))
        self.seen += new
        return new

    def _numbers(self, line: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Yield what the pattern finds."""
        for match in self._pattern.finditer(line):
            yield match[self._group], match

    def _not_finite(self, line: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Yield values that are not finite where the pattern itself asks for digits.

        Otherwise the curve of a run that diverged would end at its last good value.
        """
        taken = [match.span() for match in self._pattern.finditer(line)]
        for word in NOT_FINITE_WORD.finditer(line):
            if any(start <= word.start() < end for start, end in taken):
                continue
            match = self._match_as_number(line, word)
            if match is not None:
                yield word[0], match

    def _match_as_number(self, line: str, word: re.Match[str]) -> re.Match[str] | None:
        """Return the match whose value a word would be if it were a number."""
        for number in AS_NUMBERS:
            as_number = f"{line[: word.start()]}{number}{line[word.end() :]}"
            for match in self._pattern.finditer(as_number):
                if match.start(self._group) <= word.start() < match.end(self._group):
                    return match
        return None

    def _step_of(self, match: re.Match[str]) -> float | None:
        return _number(match[STEP]) if STEP in self._pattern.groupindex else None


def curve_in_json(text: str, key: str) -> list[Measured]:
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


def curve_in_csv(text: str, column: str) -> list[Measured]:
    """Return a curve from a table with a heading; rows without a value in the column are none.

    Raises:
        ValueError: If it is not a table.
    """
    try:
        return _curve(csv.DictReader(io.StringIO(text, newline="")), column)
    except csv.Error as problem:
        raise ValueError(f"file of the measure must be a table, got {str(problem)!r}") from None


def curve_in_file(source: MeasureSource, values: Mapping[str, str], folder: Path) -> list[Measured]:
    """Return a curve from the file that a script wrote; nothing if there is none.

    Args:
        source: Of the kind "json" or "csv". Stars in its file stand for any names; of several files
            the last one written is read.
        values: What is filled in where its file has {seed}, {lr}, {out} or {arm}.
        folder: In which a relative name is looked up.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a table where there must be one.
    """
    found = _newest(source.file, values, folder)
    if found is None:
        return []
    with open_regular_file(found, follow_link=True) as opened:
        text = opened.read(LARGEST_MEASURE_FILE).decode("utf-8-sig", errors="replace")
    if source.kind == "json":
        return curve_in_json(text, source.key)
    return curve_in_csv(text, source.key)


def _newest(file: str, values: Mapping[str, str], folder: Path) -> Path | None:
    """Return the file of a name that may hold stars; None if there is none."""
    path = folder / filled_in(file, values)  # an absolute path stays unchanged
    if path.is_file():
        return path
    # Values that are filled in contain no wildcards.
    pattern = filled_in(file, {name: glob.escape(value) for name, value in values.items()})
    names = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 - absolute too
    files = [folder / name for name in names if (folder / name).is_file()]
    return max(files, key=lambda match: match.stat().st_mtime_ns, default=None)


def _objects(text: str) -> list[Mapping[str, Any]]:
    """Return the objects of a JSON document or of JSON lines; broken lines are left out."""
    whole = _json_or_none(text)
    if whole is None:
        whole = [_json_or_none(line) for line in text.split("\n")]
    items = whole if isinstance(whole, list) else [whole]
    return [item for item in items if isinstance(item, dict)]


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _curve(rows: Iterable[Mapping[str, Any]], key: str) -> list[Measured]:
    seen: list[Measured] = []
    for row in rows:
        value = _number(_at(row, key))
        if value is not None:
            seen.append(Measured(_step(_number(_at(row, STEP)), len(seen)), value, now()))
    return seen


def _at(row: Mapping[str, Any], key: str) -> Any:
    """Return what is at a key, or at keys with dots between them; None if nothing is."""
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
    if isinstance(value, str):
        value = value.strip().rstrip(PUNCTUATION)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _step(step: float | None, before: int) -> int:
    """Return the step of a value; where nothing says it, how many there are with it."""
    if step is None or not abs(step) < LARGEST_STEP:
        return before + 1
    return int(step)
