"""Every case, in the order of the table."""

from __future__ import annotations

from fnmatch import fnmatchcase

from regrad_bench.alone_cases import alone_cases
from regrad_bench.cases import Case
from regrad_bench.growth_cases import growth_cases
from regrad_bench.start_cases import start_cases
from regrad_bench.step_cases import step_cases


def chosen_cases(only: str = "*") -> list[Case]:
    """Return the cases whose names fit a pattern with the wildcards of a shell.

    Raises:
        ValueError: If none does.
    """
    cases = [*step_cases(), *alone_cases(), *growth_cases(), *start_cases()]
    chosen = [case for case in cases if fnmatchcase(case.name, only)]
    if not chosen:
        raise ValueError(
            f"only must fit the name of a case, got {only!r}; "
            f"there are {', '.join(case.name for case in cases)}"
        )
    return chosen
