"""The command that repeats a comparison."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import chain
from typing import Any

from regrad_runner.settings.script_config import comparison_settings_of

# Where numbers are sent changes no result, and an address may hold a password.
PRIVATE_SETTINGS = {"tracking_uri", "processes", "controls"}
# Settings without a flag of their name: the words after "--", and the direction of the measure.
WRITTEN_OTHERWISE = {"script", "better"}
ONE_FLAG_EACH = {"optimizer_class"}
ALWAYS_NAMED = {"workload", "corrections", "seeds"}


def command_to_repeat(settings: Mapping[str, Any], *, processes: int = 1) -> str:
    r"""Return a command line, quoted for a shell, that runs the comparison with these settings.

    It names every setting that is not the command's own default, also those that a workload chose.
    A folder of data is named as it was given: relative to the folder in which the comparison was
    started.

    Args:
        settings: As `config.yaml` holds them.
        processes: How many there were.

    Returns:
        The command. If nothing but the baseline was compared it reads the folder's `config.yaml`.

    Example:
        >>> settings = {"workload": "digits", "corrections": ["agc:axis=[0,1]"], "seeds": 6}
        >>> print(command_to_repeat(settings))
        regrad compare \
          --workload digits \
          --corrections 'agc:axis=[0,1]' \
          --seeds 6
        >>> script = {"corrections": ["agc"], "measure": "loss=loss ([0-9.]+)", "better": "lower"}
        >>> print(command_to_repeat(script | {"seeds": 6, "script": ["train.py", "--seed={seed}"]}))
        regrad compare \
          --corrections agc \
          --seeds 6 \
          --measure 'loss=loss ([0-9.]+)' \
          --lower-is-better \
          -- train.py '--seed={seed}'
    """
    if not settings.get("corrections"):
        # An empty list cannot be written as a flag.
        return "regrad compare --config config.yaml"
    lines = [_program(processes)]
    for name, field in comparison_settings_of(settings).model_fields.items():
        value = settings.get(name)
        if value is None or name in PRIVATE_SETTINGS | WRITTEN_OTHERWISE:
            continue
        if name in ALWAYS_NAMED or value != _as_in_yaml(field.default):
            lines.append(_flag(name, value))
    if settings.get("controls") is False:
        lines.append(["--no-controls"])
    if "better" in settings:
        lines.append([f"--{settings['better']}-is-better"])
    if "script" in settings:
        lines.append(["--", *settings["script"]])
    return " \\\n  ".join(shlex.join(words) for words in lines)


def _program(processes: int) -> list[str]:
    if processes > 1:
        return ["torchrun", "--nproc-per-node", str(processes), "-m", "regrad_runner", "compare"]
    return ["regrad", "compare"]


def _flag(name: str, value: Any) -> list[str]:
    """Return a setting as the words of a flag."""
    flag = f"--{name.replace('_', '-')}"
    if name == "corrections":
        return [flag, *value]
    if name in ONE_FLAG_EACH:
        return list(chain.from_iterable((flag, item) for item in value))
    if value is True:
        return [flag]
    if isinstance(value, list):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]


def _as_in_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
