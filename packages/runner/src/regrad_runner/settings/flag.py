"""How a setting is given on the command line: declared once, beside the setting itself."""

from __future__ import annotations

from dataclasses import dataclass

WHAT_IS_TRAINED = "What is trained"
THE_SCRIPT = "A script of your own, after --"
HOW_IT_IS_TRAINED = "How it is trained"
WHERE_IT_GOES = "Where it goes"


@dataclass(frozen=True)
class Flag:
    """What a setting means, and how the help of a command shows it.

    Attributes:
        meaning: A sentence that names the default, if there is one whatever the workload. Of a
            setting that is on by default, what its flag `--no-…` does.
        group: Heading under which the help lists it.
        metavar: What stands for the value; None if there is none to give.
    """

    meaning: str
    group: str
    metavar: str | None = None
