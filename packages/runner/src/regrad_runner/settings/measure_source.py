"""Where the measure of a script comes from: its output, or a file or run that it writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

STEP = "step"
WAYS = "NAME=REGEX, NAME=mlflow:KEY, NAME=json:FILE:KEY or NAME=csv:FILE:COLUMN"

Kind = Literal["output", "mlflow", "json", "csv"]


@dataclass(frozen=True)
class MeasureSource:
    """Where a script says how well it trained.

    Attributes:
        name: Of the measure, as printed.
        kind: "output" for the lines it prints, "mlflow" for its own MLflow runs, "json" for a file
            of JSON lines, "csv" for a table.
        key: The regular expression, the metric, the key or the column.
        file: Of a json or csv source, as it was written: words in braces are still to replace.
    """

    name: str
    kind: Kind
    key: str
    file: str = ""

    @property
    def in_words(self) -> str:
        """What is looked for, for a message."""
        if self.kind == "output":
            return f"nothing that matches {self.key!r} in what it printed"
        if self.kind == "mlflow":
            return f"no metric {self.key!r} in an MLflow run of its own"
        return f"no {self.key!r} in {self.file}"


def read_measure_source(text: str) -> MeasureSource:
    r"""Return what `--measure` asks for.

    Args:
        text: NAME=REGEX with one group, whose matches in order are the curve, the last one the
            result; a second group, named "step", gives the curve's axis. Or NAME=mlflow:KEY,
            NAME=json:FILE:KEY, NAME=csv:FILE:COLUMN.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> read_measure_source("val loss=val loss ([0-9.]+)").key
        'val loss ([0-9.]+)'
        >>> read_measure_source("accuracy=csv:{out}/metrics.csv:val_acc").file
        '{out}/metrics.csv'
    """
    name, equals, source = text.partition("=")
    name = name.strip()
    if not (equals and name and source):
        raise ValueError(f"measure must be {WAYS}, got {text!r}")
    kind, colon, rest = source.partition(":")
    if colon and kind == "mlflow":
        if not rest:
            raise ValueError(f"measure must name a metric after 'mlflow:', got {text!r}")
        return MeasureSource(name, "mlflow", rest)
    if colon and kind in ("json", "csv"):
        file, _, key = rest.rpartition(":")
        if not (file and key):
            what = "key" if kind == "json" else "column"
            raise ValueError(f"measure must be NAME={kind}:FILE:{what.upper()}, got {text!r}")
        return MeasureSource(name, "json" if kind == "json" else "csv", key, file)
    _check_pattern(source)
    return MeasureSource(name, "output", source)


def value_group(pattern: re.Pattern[str]) -> int:
    """Return the number of the group that holds the value: the one that is not named "step"."""
    step = pattern.groupindex.get(STEP)
    return next(number for number in range(1, pattern.groups + 1) if number != step)


def _check_pattern(text: str) -> None:
    """Raise a `ValueError` unless a regular expression has one group for the value."""
    try:
        pattern = re.compile(text)
    except re.error as problem:
        raise ValueError(
            f"measure must have a regular expression after '=', got {text!r}: {problem}"
        ) from None
    groups = pattern.groups - (STEP in pattern.groupindex)
    if groups != 1:
        raise ValueError(
            f"measure must have one group in parentheses, for the value, got {groups} in {text!r}; "
            "write (?:...) for parentheses that are not a group, and (?P<step>...) for the step"
        )
