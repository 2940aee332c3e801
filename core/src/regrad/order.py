"""Put corrections in the order in which they act within a stage."""

import itertools
from collections.abc import Sequence

from regrad.correction import Correction
from regrad.errors import RegradError

OWNED = {"weights": "window", "criterion": "criterion"}


def resolve_order(
    corrections: Sequence[Correction],
) -> tuple[tuple[Correction, ...], tuple[str, ...]]:
    """Return the corrections in acting order, and why any of them was moved.

    The order given holds, unless a correction that shares a stage with another
    declares `before` or `after` it.

    Args:
        corrections: In the user's order, of different names.

    Returns:
        The acting order, and one sentence per correction that was moved.

    Raises:
        RegradError: If two corrections own the same resource, one refuses another, or
            the declarations form a cycle.
    """
    _refuse_conflicts(corrections)
    behind = {correction.name: _must_follow(correction, corrections) for correction in corrections}
    ordered = _sorted(corrections, behind)
    return tuple(ordered), tuple(_reasons(corrections, behind))


def _sorted(
    corrections: Sequence[Correction], behind: dict[str, dict[str, str]]
) -> list[Correction]:
    """Repeatedly take the first correction that has nothing left to wait for."""
    waiting = list(corrections)
    ordered: list[Correction] = []
    while waiting:
        done = {correction.name for correction in ordered}
        ready = [correction for correction in waiting if behind[correction.name].keys() <= done]
        if not ready:
            raise RegradError(_cycle(waiting, behind))
        waiting.remove(ready[0])
        ordered.append(ready[0])
    return ordered


def _cycle(waiting: Sequence[Correction], behind: dict[str, dict[str, str]]) -> str:
    """Say which declarations wait for each other."""
    declared: list[str] = []
    for correction in waiting:
        declared.extend(behind[correction.name].values())
    return f"corrections' declarations form a cycle: {'; '.join(declared)}"


def _reasons(corrections: Sequence[Correction], behind: dict[str, dict[str, str]]) -> list[str]:
    """Return a sentence on each correction that was given before one that must act first."""
    names = [correction.name for correction in corrections]
    reasons: list[str] = []
    for index, name in enumerate(names):
        later = {first: why for first, why in behind[name].items() if first in names[index:]}
        if later:
            firsts = ", ".join(map(repr, later))
            reasons.append(f"{name!r} acts after {firsts}: {'; '.join(later.values())}")
    return reasons


def _must_follow(correction: Correction, others: Sequence[Correction]) -> dict[str, str]:
    """Return the names that act before `correction`, each with the declaration that says so."""
    name = correction.name
    declared_here: dict[str, str] = {}
    declared_there: dict[str, str] = {}
    for other in others:
        shares_a_stage = not set(other.needs.stages).isdisjoint(correction.needs.stages)
        if other is correction or not shares_a_stage:
            continue
        if other.name in correction.needs.after:
            declared_here[other.name] = f"{name!r} declares after {other.name!r}"
        if name in other.needs.before:
            declared_there[other.name] = f"{other.name!r} declares before {name!r}"
    return declared_here | declared_there


def _refuse_conflicts(corrections: Sequence[Correction]) -> None:
    """Raise if two corrections cannot be attached together."""
    for one, other in itertools.combinations(corrections, 2):
        told = (one.needs.conflicts.get(other.name), other.needs.conflicts.get(one.name))
        shared = sorted(_owned(one) & _owned(other))
        owned = [f"both own the {resource}" for resource in shared]
        reasons = "; ".join(reason for reason in (*told, *owned) if reason)
        if reasons:
            raise RegradError(f"{one.name!r} and {other.name!r} cannot work together: {reasons}")


def _owned(correction: Correction) -> set[str]:
    """Return the resources that a correction shares with no other."""
    by_stage = {OWNED[stage] for stage in correction.needs.stages if stage in OWNED}
    return by_stage.union(correction.needs.exclusive)
