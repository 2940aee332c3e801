"""Names with options, such as "gpt:layers=2": read, and checked against what takes the options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from regrad import specs


def read_spec(text: str, what: str = "optimizer") -> tuple[str, dict[str, Any]]:
    """Split "name:option=value,option=value" into the name and its options, as the core reads them.

    Args:
        text: As the user typed it.
        what: What it names, as an error calls it.

    Raises:
        ValueError: If it is not of that form.

    Example:
        >>> read_spec("sgd:momentum=0.9,nesterov=true")
        ('sgd', {'momentum': 0.9, 'nesterov': True})
        >>> read_spec("adamw:betas=(0.9,0.99)")
        ('adamw', {'betas': (0.9, 0.99)})
    """
    return specs.read_spec(text, what)


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return what a function takes, by name."""
    return inspect.signature(function).parameters


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    what: str,
    settings: Collection[str],
) -> None:
    """Raise a `ValueError` unless a function takes every option, of its annotated type.

    Args:
        function: What will be called with them.
        options: From `read_spec`.
        what: What has the options, such as "model 'gpt'".
        settings: Arguments of the function that are no options, because they are settings of their
            own or come from the caller.
    """
    allowed = [name for name in parameters_of(function) if name not in settings]
    for key, value in options.items():
        if key in settings:
            raise ValueError(f"{what} must not set {key}, got {value!r}; use the setting {key}")
        if key not in allowed:
            known = f"allowed: {', '.join(allowed)}" if allowed else "it has none"
            raise ValueError(f"{what} has no option {key!r}; {known}")
        _check_type(function, key, value)


def _check_type(function: Callable[..., Any], key: str, value: Any) -> None:
    """Raise a `ValueError` unless a value is of the type that the function's argument has."""
    try:
        kind = typing.get_type_hints(function).get(key, Any)
    except NameError:  # a hint that only its author's type checker can resolve
        return
    # Brackets are read into a tuple, whatever the function calls what it takes.
    fits = _fits(kind, value) or (isinstance(value, tuple) and _fits(kind, list(value)))
    if not fits:
        raise ValueError(f"{key} must be {inspect.formatannotation(kind)}, got {value!r}")


def _fits(kind: Any, value: Any) -> bool:
    """Say whether a value is of a type, without being converted to it."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
