"""The command that repeats a comparison."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from regrad_runner.settings.config import CompareConfig

# Where numbers are sent changes no result, and an address may hold a password.
LEFT_OUT = {"tracking_uri", "processes", "controls"}
ALWAYS = {"workload", "corrections", "seeds"}


def command_to_repeat(settings: Mapping[str, Any], *, processes: int = 1) -> str:
    r"""Return a command line, quoted for a shell, that runs the comparison with these settings again.

    It names every setting that is not the command's own default, those that a workload chose among them. A folder
    of data is named as it was: relative to the folder in which the comparison was started.

    Args:
        settings: As `config.yaml` holds them.
        processes: How many there were.

    Returns:
        The command; where nothing but the baseline was compared, one that reads the folder's `config.yaml`.

    Example:
        >>> print(command_to_repeat({"workload": "digits", "corrections": ["agc:axis=[0,1]"], "seeds": 6}))
        regrad compare \
          --workload digits \
          --corrections 'agc:axis=[0,1]' \
          --seeds 6
    """
    if not settings.get("corrections"):
        return "regrad compare --config config.yaml"  # a list without a value cannot be written as a flag
    words, flags = ["regrad", "compare"], list[list[str]]()
    if processes > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "-m", "regrad_runner", "compare"]
    for name, field in CompareConfig.model_fields.items():
        value = settings.get(name)
        default = name not in ALWAYS and value == _plain(field.default)
        if value is not None and name not in LEFT_OUT and not default:
            flags.append(_words(name, value))
    if settings.get("controls") is False:
        flags.append(["--no-controls"])
    return " \\\n  ".join([shlex.join(words), *map(shlex.join, flags)])


def _words(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name == "corrections":
        return [flag, *value]
    if value is True:
        return [flag]
    return [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
