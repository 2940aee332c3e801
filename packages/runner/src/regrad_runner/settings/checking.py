"""Values checked, with an error of one line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ValidationError,
)

Settings = TypeVar("Settings", bound=BaseModel)

LONGEST_TEXT = 1000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 3


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Return the settings, or raise a `ValueError` of one line that names setting, rule and value."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as problems:
        raise ValueError(_line(kind, problems)) from None


def shown(value: object) -> str:
    """Return what an error shows of a value, in one short line: YAML of a few bytes can stand for gigabytes."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a very long {type(value).__name__}"


def check_text(name: str, text: str) -> None:
    """Raise a `ValueError` where a text is empty, too long, or would tear a terminal."""
    if not (text.isprintable() and len(text) <= LONGEST_TEXT):
        raise ValueError(
            f"{name} must be at most {LONGEST_TEXT} printable characters, got {shown(text)}"
        )
    if not text.strip():
        raise ValueError(f"{name} must not be empty, got {text!r}; leave it out for the default")


def _line(kind: type[BaseModel], problems: ValidationError) -> str:
    """Say the first problem in one line."""
    problem = problems.errors()[0]
    name, message, value = str(next(iter(problem["loc"]), "")), problem["msg"], problem["input"]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(kind.model_fields)}"
        return f"no setting named {shown(name)}; {hint}"
    if problem["type"] == "value_error":
        return message.removeprefix("Value error, ")
    rule = re.split(r", (?:unable|got) ", message.replace("Input should", "must"))[0]
    return f"{name} {rule}, got {shown(value)}"
