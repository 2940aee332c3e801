"""Every case, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from regrad_bench.activation_cases import activation_cases
from regrad_bench.alone_cases import alone_cases
from regrad_bench.cases import Case
from regrad_bench.growth_cases import growth_cases
from regrad_bench.process_cases import process_cases
from regrad_bench.start_cases import start_cases
from regrad_bench.step_cases import memory_cases, step_cases, together_cases, transformer_cases
from regrad_bench.update_cases import update_cases

# Rough seconds of one case with 20 pairs on one thread of a server's processor.
SECONDS = {
    "step": 25,
    "alone": 8,
    "update": 15,
    "growth": 15,
    "start": 10,
    "vit": 15,
    "gpt": 4,
    "memory": 7,
    "activations": 4,
    "together": 20,
    "processes": 20,
}


def chosen_cases(only: str = "*") -> list[Case]:
    """Return the cases whose names match a pattern with shell wildcards.

    Raises:
        ValueError: If none does.
    """
    cases = [
        *step_cases(),
        *alone_cases(),
        *update_cases(),
        *growth_cases(),
        *start_cases(),
        *transformer_cases(),
        *memory_cases(),
        *activation_cases(),
        *together_cases(),
        *process_cases(),
    ]
    chosen = [case for case in cases if fnmatchcase(case.name, only)]
    if not chosen:
        raise ValueError(
            f"only must match the name of a case, got {only!r}; "
            f"there are {', '.join(case.name for case in cases)}"
        )
    return chosen


def estimated_minutes(cases: Sequence[Case], *, quick: bool) -> float:
    """Return about how long these cases take; small sizes take little longer than starting up.

    Example:
        >>> estimated_minutes(chosen_cases("start/*"), quick=False) < 1
        True
    """
    if quick:
        return 6 * len(cases) / 60
    return sum(SECONDS[case.name.partition("/")[0]] for case in cases) / 60
