"""Settings from a YAML file and flags, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from regrad_runner.files import read_bytes
from regrad_runner.settings.checking import shown, validated
from regrad_runner.settings.config import Config, Settings
from regrad_runner.settings.yaml_text import read_yaml, write_yaml

# What PyYAML's parsing of numbers, dates and deep nesting raises besides its YAMLError.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# The first and the last line of settings that regrad wrote: without its last line a file was cut.
FIRST_LINE = "# Written by regrad. The last line is three dots."
LAST_LINE = "..."


def load_config(
    kind: type[Config], *, file: Path | None = None, flags: Mapping[str, Any]
) -> Config:
    """Return the settings in `file`, overridden by the given flags.

    Args:
        kind: Which settings, such as `CompareConfig`.
        file: A YAML mapping from settings to values, or None.
        flags: Values by setting; None stands for a flag that was not given.

    Raises:
        ValueError: If the file cannot be read, or a setting is unknown or out of its range.
    """
    settings = read_settings(file) if file else {}
    for name, value in flags.items():
        if value is not None:
            settings[name] = value
    return validated(kind, settings)


def write_config(config: Settings) -> str:
    """Return the settings as YAML that `load_config` reads, or refuses if a part is missing."""
    return f"{FIRST_LINE}\n{write_yaml(config.model_dump(mode='json'))}{LAST_LINE}\n"


def read_settings(file: Path) -> dict[str, Any]:
    """Return what a YAML file says, whatever settings it names.

    Raises:
        ValueError: If it cannot be read or is not a mapping.
    """
    try:
        text = read_bytes(file).decode("utf-8")
        _check_is_whole(text)
        loaded = read_yaml(text)
    except OSError as problem:
        raise ValueError(
            f"config must be a readable file, got '{file}': {problem.strerror or 'something else'}"
        ) from None
    except (yaml.YAMLError, *UNREADABLE) as problem:
        why = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(f"config must be YAML, got '{file}': {why}") from None
    if not isinstance(loaded, dict):
        raise ValueError(  # noqa: TRY004 - what the file says is wrong, not what a caller passed
            f"config must map settings to values, got {type(loaded).__name__} in '{file}'"
        )
    for name in loaded:
        if not isinstance(name, str):
            raise ValueError(f"no setting named {shown(name)} in '{file}'")  # noqa: TRY004
    return loaded


def _check_is_whole(text: str) -> None:
    """Raise a `ValueError` for a part of what `write_config` wrote.

    The settings that are missing would be read as their defaults.
    """
    first = text.partition("\n")[0].strip()
    last = text.rstrip().rpartition("\n")[2]
    if first == FIRST_LINE and last != LAST_LINE:
        raise ValueError(f"its last line is not {LAST_LINE!r}: a part of it is missing")
