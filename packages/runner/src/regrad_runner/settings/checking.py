"""Values checked, with an error of one line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Validated = TypeVar("Validated", bound=BaseModel)

LONGEST_TEXT = 1000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 3


def validated(kind: type[Validated], values: Mapping[str, Any]) -> Validated:
    """Return the settings, or raise a `ValueError` of one line with setting, rule and value."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as problems:
        raise ValueError(_line(kind, problems)) from None


def shown(value: object) -> str:
    """Return a value in one short line, for an error.

    A few bytes of YAML can stand for gigabytes.
    """
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a very long {type(value).__name__}"


def check_text(name: str, text: str) -> None:
    """Raise a `ValueError` if a text is empty, too long, or would break a terminal."""
    if not (text.isprintable() and len(text) <= LONGEST_TEXT):
        raise ValueError(
            f"{name} must be at most {LONGEST_TEXT} printable characters, got {shown(text)}"
        )
    if not text.strip():
        raise ValueError(f"{name} must not be empty, got {text!r}; leave it out for the default")


def _line(kind: type[BaseModel], problems: ValidationError) -> str:
    """Describe the first problem in one line."""
    problem = problems.errors()[0]
    location = problem["loc"]
    name = str(location[0]) if location else ""
    message = problem["msg"]
    if problem["type"] == "extra_forbidden":
        return f"no setting named {shown(name)}; {_hint(name, kind)}"
    if problem["type"] == "value_error":
        return message.removeprefix("Value error, ")
    rule = re.split(r", (?:unable|got) ", message.replace("Input should", "must"))[0]
    return f"{name} {rule}, got {shown(problem['input'])}"


def _hint(name: str, kind: type[BaseModel]) -> str:
    """Say which setting a name may stand for."""
    near = difflib.get_close_matches(name, kind.model_fields, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"allowed: {', '.join(kind.model_fields)}"
