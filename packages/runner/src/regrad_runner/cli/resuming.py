"""The flag `--resume`: alone it continues what is in --out; `--resume auto` may begin it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from regrad_runner.cli.flags import flag
from regrad_runner.settings.flag import WHERE_IT_GOES

FLAG = "--resume"
AUTOMATIC = "auto"
ALONE = ""  # what the parser is given where nothing follows the flag


def offered_values(incomplete: str) -> list[str]:
    """Return what may follow the flag."""
    return [AUTOMATIC] if AUTOMATIC.startswith(incomplete) else []


Resume = Annotated[
    str | None,
    flag(
        "Continue what is in --out; auto: begin it if there is nothing.",
        WHERE_IT_GOES,
        FLAG,
        metavar=f"[{AUTOMATIC}]",
        completion=offered_values,
    ),
]


@dataclass(frozen=True)
class Resuming:
    """How a command takes what is in its folder.

    Attributes:
        continues: Whether it continues what is there. Otherwise nothing may be there.
        is_automatic: Whether the folder decided about that. The command's settings are then all
            there are: what the command means must not depend on what it finds.
    """

    continues: bool
    is_automatic: bool

    @property
    def takes_settings(self) -> bool:
        """Whether settings that were not given are taken from the folder."""
        return self.continues and not self.is_automatic


def read_resume(resume: str | None, *, out: Path | None) -> Resuming:
    """Return what `--resume` asks for.

    On several processes only the first one's answer counts, since it alone looks at the folder
    afterwards: others may see it earlier or later.

    Args:
        resume: As typed; None if it was not given, `ALONE` without a value.
        out: The folder.

    Raises:
        ValueError: If there is another value, or no folder.
        OSError: If the folder cannot be looked at.
    """
    if resume is None:
        return Resuming(continues=False, is_automatic=False)
    if resume == ALONE:
        return Resuming(continues=True, is_automatic=False)
    if resume != AUTOMATIC:
        raise ValueError(
            f"resume must be {AUTOMATIC!r} or have no value, got {resume!r}; "
            f"{FLAG} alone continues what is in --out"
        )
    if out is None:
        raise ValueError(
            f"out must be given with {FLAG} {AUTOMATIC}: the folder to begin or to continue"
        )
    return Resuming(continues=_has_begun(out), is_automatic=True)


def with_resume_value(words: Sequence[str]) -> list[str]:
    """Give `--resume` an empty value where none follows: the parser wants one for every flag.

    What follows `--` is left unchanged.

    Example:
        >>> with_resume_value(["--resume", "--out", "DIR"])
        ['--resume=', '--out', 'DIR']
        >>> with_resume_value(["--resume", "auto", "--", "train.py", "--resume"])
        ['--resume', 'auto', '--', 'train.py', '--resume']
    """
    if "--" in words:
        end = list(words).index("--")
        return [*with_resume_value(words[:end]), *words[end:]]
    with_value = list(words)
    for place, word in enumerate(words):
        following = list(words[place + 1 : place + 2])
        if word == FLAG and following != [AUTOMATIC]:
            with_value[place] = f"{FLAG}={ALONE}"
    return with_value


def _has_begun(out: Path) -> bool:
    """Say whether a command has written to a folder: its settings come first."""
    return (out / "config.yaml").is_file()
