"""Where the runs of a comparison take place: in this command, or as jobs of their own."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from regrad_runner.settings.checking import check_text

HERE = "here"
LOCAL: Final = "local"
SLURM: Final = "slurm"
PLACES = (HERE, LOCAL, SLURM)
DEFAULT_MINUTES = 240
# Options of sbatch, and two that submitit adds: `array_parallelism` and `signal_delay_s`. What is
# not here would break what a job is: one task that runs one cell.
NUMBERS = ("array_parallelism", "cpus_per_gpu", "cpus_per_task", "nice", "signal_delay_s")
TEXTS = (
    "account",
    "comment",
    "constraint",
    "exclude",
    "gpus",
    "gpus_per_node",
    "gpus_per_task",
    "gres",
    "hint",
    "licenses",
    "mail_type",
    "mail_user",
    "mem",
    "mem_per_cpu",
    "mem_per_gpu",
    "nodelist",
    "partition",
    "prefer",
    "qos",
    "reservation",
    "tmp",
    "wckey",
)
TIME_LIMIT = "time"
KNOWN_REQUESTS = (*NUMBERS, *TEXTS, TIME_LIMIT)
# What sbatch takes: minutes, minutes:seconds, hours:minutes:seconds, and all of these after days.
TIME_FORM = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
# A comma ends a value only where another name follows: nodelist=a,b is one value.
BETWEEN_REQUESTS = re.compile(r",(?=\s*[\w-]+\s*=)")


@dataclass(frozen=True)
class Cluster:
    """A queue of jobs in which the runs of a comparison take place.

    Attributes:
        place: "local" for processes on this machine, "slurm" for jobs of SLURM.
        requests: What SLURM is asked for, by the name of sbatch's option with `_` for `-`.
        text: The same as it was given, or nothing.
    """

    place: Literal["local", "slurm"]
    requests: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def minutes(self) -> int:
        """How long a job may take, in minutes; SLURM ends it after that."""
        text = self.requests.get(TIME_LIMIT)
        return DEFAULT_MINUTES if text is None else minutes_of(text)

    @property
    def array_parallelism(self) -> int | None:
        """How many jobs may run at once; None for as many as SLURM starts."""
        text = self.requests.get("array_parallelism")
        return None if text is None else int(text)

    @property
    def words(self) -> str:
        """The flags that ask for this, as a shell takes them."""
        if not self.text:
            return f"--on {self.place}"
        return f"--on {self.place} --slurm {shlex.quote(self.text)}"


def cluster_of(place: str | None, slurm: str | None) -> Cluster | None:
    """Return where runs take place, or None for the command's own process and its workers.

    Args:
        place: One of `PLACES`; None is "here".
        slurm: What SLURM is asked for, such as "partition=gpu,time=04:00:00".

    Raises:
        ValueError: If a place, a name or a value is not one that SLURM takes.

    Example:
        >>> cluster = cluster_of("slurm", "time=1-00:00:00,nodelist=a,b,array_parallelism=8")
        >>> cluster.minutes, cluster.requests["nodelist"], cluster.array_parallelism
        (1440, 'a,b', 8)
    """
    if place not in (None, *PLACES):
        raise ValueError(f"on must be one of {', '.join(PLACES)}, got {place!r}")
    if slurm is not None and place != SLURM:
        raise ValueError(f"slurm must be given with --on slurm, got --on {place or HERE}")
    if place == LOCAL:
        return Cluster(LOCAL)
    if place == SLURM:
        return Cluster(SLURM, _requests_in(slurm or ""), slurm or "")
    return None


def minutes_of(text: str) -> int:
    """Return a time limit in minutes, rounded up.

    Args:
        text: As sbatch takes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ValueError: If it is none of these, or nothing.

    Example:
        >>> [minutes_of(text) for text in ("90", "90:30", "04:00:00", "1-12", "1-12:30")]
        [90, 91, 240, 2160, 2190]
    """
    found = TIME_FORM.fullmatch(text)
    if found is None:
        raise ValueError(_wrong_time(text))
    days, *rest = found.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours = 0
        minutes, seconds = [*numbers, 0][:2]
    total = 24 * 60 * int(days or 0) + 60 * hours + minutes + math.ceil(seconds / 60)
    if total == 0:
        raise ValueError(_wrong_time(text))
    return total


def _wrong_time(text: str) -> str:
    return (
        f"--slurm time must be a time limit of more than nothing, got {text!r}; "
        "write 04:00:00 or 1-12:00:00"
    )


def _requests_in(text: str) -> dict[str, str]:
    """Return what a text asks SLURM for, by name."""
    requests: dict[str, str] = {}
    if not text.strip():
        return requests
    check_text(SLURM, text)
    for part in BETWEEN_REQUESTS.split(text):
        typed, separator, value = part.partition("=")
        name = typed.strip().replace("-", "_")
        if not separator:
            raise ValueError(
                f"slurm must be NAME=VALUE pairs with commas between, got {part!r}; "
                "write partition=gpu,time=04:00:00"
            )
        _check_request(name, value.strip())
        if name in requests:
            raise ValueError(f"slurm must name {name} once, got {text!r}")
        requests[name] = value.strip()
    return requests


def _check_request(name: str, value: str) -> None:
    """Raise a `ValueError` unless this can be asked of SLURM."""
    if name not in KNOWN_REQUESTS:
        near = difflib.get_close_matches(name, KNOWN_REQUESTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(KNOWN_REQUESTS)}"
        raise ValueError(f"no --slurm setting named {name!r}; {hint}")
    if not value:
        raise ValueError(f"--slurm {name} must not be empty, got {value!r}; leave it out")
    if name == TIME_LIMIT:
        minutes_of(value)
    if name in NUMBERS and not re.fullmatch(r"[1-9]\d{0,6}", value):
        raise ValueError(f"--slurm {name} must be a whole number from 1, got {value!r}")
