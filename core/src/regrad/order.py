"""Put corrections in the order in which they act within a stage."""

from collections.abc import Sequence

from regrad.correction import Correction
from regrad.errors import RegradError


def resolve_order(corrections: Sequence[Correction]) -> tuple[list[Correction], list[str]]:
    """Return the corrections in acting order, and why any of them was moved.

    The order given holds, unless a correction that shares a stage with another
    declares `before` or `after` it.

    Args:
        corrections: In the user's order.

    Returns:
        The acting order, and one sentence per correction that was moved.

    Raises:
        RegradError: If a name stands twice, two corrections own the same resource,
            one refuses another, or the declarations form a cycle.
    """
    _refuse_conflicts(corrections)
    behind = {c.name: _must_follow(c, corrections) for c in corrections}
    waiting, ordered, reasons = list(corrections), list[Correction](), list[str]()
    while waiting:
        done = {c.name for c in ordered}
        ready = next((c for c in waiting if behind[c.name].keys() <= done), None)
        if ready is None:
            circle = "; ".join(reason for c in waiting for reason in behind[c.name].values())
            raise RegradError(f"corrections cannot be ordered, their declarations form a cycle: {circle}")
        if ready is not waiting[0]:
            why = "; ".join(why for first, why in behind[waiting[0].name].items() if first not in done)
            reasons.append(f"{waiting[0].name!r} acts after {ready.name!r}: {why}")
        waiting.remove(ready)
        ordered.append(ready)
    return ordered, reasons


def _must_follow(correction: Correction, others: Sequence[Correction]) -> dict[str, str]:
    """Return the names that act before `correction`, each with the declaration that says so."""
    first: dict[str, str] = {}
    for other in others:
        if other is correction or not set(other.needs.stages) & set(correction.needs.stages):
            continue
        if other.name in correction.needs.after:
            first[other.name] = f"{correction.name!r} declares after {other.name!r}"
        if correction.name in other.needs.before:
            first[other.name] = f"{other.name!r} declares before {correction.name!r}"
    return first


def _refuse_conflicts(corrections: Sequence[Correction]) -> None:
    """Raise where two corrections cannot be attached together."""
    for index, one in enumerate(corrections):
        for other in corrections[:index]:
            if one.name == other.name:
                raise RegradError(f"corrections must be different, got {one.name!r} twice")
            reason = one.needs.conflicts.get(other.name) or other.needs.conflicts.get(one.name)
            if reason:
                raise RegradError(f"{other.name!r} and {one.name!r} cannot work together: {reason}")
            for resource in sorted(one.needs.resources & other.needs.resources):
                raise RegradError(f"{other.name!r} and {one.name!r} cannot work together: both own the {resource}")
