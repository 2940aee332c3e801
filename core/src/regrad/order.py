"""Put corrections in the order in which they act within a stage."""

import itertools
from collections.abc import Sequence

from regrad.correction import Correction
from regrad.errors import refuse_if

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
    behind = {c.name: _must_follow(c, corrections) for c in corrections}
    waiting, ordered = list(corrections), list[Correction]()
    while waiting:
        done = {c.name for c in ordered}
        ready = next((c for c in waiting if behind[c.name].keys() <= done), waiting[0])
        circle = "; ".join(reason for c in waiting for reason in behind[c.name].values())
        refuse_if(
            not behind[ready.name].keys() <= done,
            f"corrections' declarations form a cycle: {circle}",
        )
        waiting.remove(ready)
        ordered.append(ready)
    given, reasons = [c.name for c in corrections], []
    for index, name in enumerate(given):
        later = {first: why for first, why in behind[name].items() if first in given[index:]}
        reasons += (
            [f"{name!r} acts after {', '.join(map(repr, later))}: {'; '.join(later.values())}"]
            if later
            else []
        )
    return tuple(ordered), tuple(reasons)


def _must_follow(correction: Correction, others: Sequence[Correction]) -> dict[str, str]:
    """Return the names that act before `correction`, each with the declaration that says so."""
    name, needs = correction.name, correction.needs
    sharing = [o for o in others if o is not correction and set(o.needs.stages) & set(needs.stages)]
    first = {
        o.name: f"{name!r} declares after {o.name!r}" for o in sharing if o.name in needs.after
    }
    return first | {
        o.name: f"{o.name!r} declares before {name!r}" for o in sharing if name in o.needs.before
    }


def _refuse_conflicts(corrections: Sequence[Correction]) -> None:
    """Raise where two corrections cannot be attached together."""
    for one, other in itertools.combinations(corrections, 2):
        told = (one.needs.conflicts.get(other.name), other.needs.conflicts.get(one.name))
        own, others = (
            {*c.needs.exclusive} | {OWNED[s] for s in c.needs.stages if s in OWNED}
            for c in (one, other)
        )
        owned = [f"both own the {resource}" for resource in sorted(own & others)]
        reasons = "; ".join(reason for reason in (*told, *owned) if reason)
        refuse_if(reasons, f"{one.name!r} and {other.name!r} cannot work together: {reasons}")
