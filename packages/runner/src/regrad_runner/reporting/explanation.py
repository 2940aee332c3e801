"""An explanation for people, and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from regrad_runner.diagnostics.explaining import Cost, Explained, Explanation, TensorRow

SHOWN = 8


def as_json(explanation: Explanation) -> str:
    """Return everything, every tensor of every correction among it, as JSON."""
    return json.dumps(asdict(explanation), indent=2)


def as_text(explanation: Explanation, *, every_tensor: bool = False) -> str:
    """Return a paragraph and a table per correction, and what steps take.

    Args:
        explanation: From `regrad_runner.diagnostics.explaining.explain`.
        every_tensor: Show all tensors instead of those that change most.
    """
    lines = [
        line
        for one in explanation.corrections
        for line in (*_about(one, every_tensor=every_tensor), "")
    ]
    plain, corrected = explanation.plain_step_seconds, explanation.step_seconds
    ratio = f"{corrected / plain:.2f} times as long" if plain else "not measured"
    lines.append(
        f"a step takes {_milliseconds(corrected)} with all of them, {_milliseconds(plain)} without: {ratio}"
    )
    return "\n".join([*lines, *explanation.notes])


def _about(one: Explained, *, every_tensor: bool) -> Iterator[str]:
    yield f"{one.name}: {one.settings}, from {one.version}"
    for stage in dict.fromkeys(row["stage"] for row in one.rows):
        rows = [row for row in one.rows if row["stage"] == stage]
        yield f"  {_in_words(stage, rows)}"
        yield from (f"    {line}" for line in _table(rows, every_tensor=every_tensor))
    if one.cost is not None:
        yield f"  {_cost(one, one.cost)}"
    yield from (f"  cannot work with {name}: {reason}" for name, reason in one.refuses.items())
    yield from (f"  ordered with {name}: {declared}" for name, declared in one.ordered.items())
    yield from (f"  {note}" for note in one.notes)


def _in_words(stage: str, rows: Sequence[TensorRow]) -> str:
    """Say how many tensors change, and by how much."""
    changes = sorted(row["relative_change"] for row in rows if row["relative_change"])
    if not changes:
        return f"{stage}: changes none of {len(rows)} tensors at this step"
    span = f"{changes[0]:.2g}" if len(changes) == 1 else f"{changes[0]:.2g} to {changes[-1]:.2g}"
    return f"{stage}: changes {len(changes)} of {len(rows)} tensors, by {span} of their norm"


def _table(rows: Sequence[TensorRow], *, every_tensor: bool) -> Iterator[str]:
    """Show the tensors that change most, those that a note speaks of, and the number of the others."""
    ranked = sorted(
        rows,
        key=lambda row: (
            -row["relative_change"],
            row["why"] == "unchanged: not one of its tensors",
        ),
    )
    spoken_of = [
        row for row in ranked[SHOWN:] if not row["why"].startswith(("changed", "unchanged"))
    ]
    shown = list(rows) if every_tensor else [*ranked[:SHOWN], *spoken_of[:SHOWN]]
    width = max(len(row["tensor"]) for row in shown)
    yield f"{'tensor':<{width}}  {'shape':<14} {'change':>8} {'cosine':>8}  why"
    for row in shown:
        shape = "×".join(map(str, row["shape"])) if row["shape"] is not None else ""
        numbers = f"{row['relative_change']:>8.2g} {row['cosine']:>8.4f}"
        yield f"{row['tensor']:<{width}}  {shape:<14} {numbers}  {row['why']}"
    if len(shown) < len(rows):
        yield f"… and {len(rows) - len(shown)} more; --all shows them"


def _cost(one: Explained, cost: Cost) -> str:
    """Say what it takes; what it does in the forward and backward pass is only in the time of whole steps."""
    time = f"{_milliseconds(cost.seconds)} in its hooks, {100 * cost.share_of_step:.1f} % of a plain step"
    if {"criterion", "hidden"} & {*one.stages}:
        time += " (its work in the forward and backward pass is only in the time of whole steps)"
    window = f" and {_size(cost.window_bytes)} for the kept weights" if cost.window_bytes else ""
    return f"costs {time}; holds {_size(cost.state_bytes)}{window} from step to step"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _size(count: int) -> str:
    return (
        f"{count / 2**20:.1f} MiB"
        if count >= 2**20
        else f"{count / 2**10:.1f} KiB"
        if count
        else "nothing"
    )
