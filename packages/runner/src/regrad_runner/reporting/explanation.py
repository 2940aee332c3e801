"""Print an explanation for people or for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from regrad_runner.diagnostics.explaining import Cost, Explained, Explanation, TensorRow

TENSORS_SHOWN = 8
NOT_ITS_OWN = "unchanged: not one of its tensors"


def as_json(explanation: Explanation) -> str:
    """Return everything as JSON, with every tensor of every correction."""
    return json.dumps(asdict(explanation), indent=2)


def as_text(explanation: Explanation, *, every_tensor: bool = False) -> str:
    """Return a paragraph and a table per correction, and what steps take.

    Args:
        explanation: From `regrad_runner.diagnostics.explaining.explain`.
        every_tensor: Show all tensors instead of those that change most.
    """
    lines: list[str] = []
    for explained in explanation.corrections:
        lines += [*_about(explained, every_tensor=every_tensor), ""]
    return "\n".join([*lines, _step_times(explanation), *explanation.notes])


def _step_times(explanation: Explanation) -> str:
    plain = explanation.plain_step_seconds
    corrected = explanation.step_seconds
    ratio = f"{corrected / plain:.2f} times as long" if plain else "not measured"
    return (
        f"a step takes {_milliseconds(corrected)} with all of them, "
        f"{_milliseconds(plain)} without: {ratio}"
    )


def _about(explained: Explained, *, every_tensor: bool) -> Iterator[str]:
    yield f"{explained.name}: {explained.settings}, from {explained.version}"
    for stage in dict.fromkeys(row["stage"] for row in explained.rows):
        rows = [row for row in explained.rows if row["stage"] == stage]
        yield f"  {_change(stage, rows)}"
        for line in _tensor_table(rows, every_tensor=every_tensor):
            yield f"    {line}"
    if explained.cost is not None:
        yield f"  {_cost(explained, explained.cost)}"
    for name, reason in explained.refuses.items():
        yield f"  cannot work with {name}: {reason}"
    for name, declared in explained.ordered.items():
        yield f"  ordered with {name}: {declared}"
    for note in explained.notes:
        yield f"  {note}"


def _change(stage: str, rows: Sequence[TensorRow]) -> str:
    """Say how many tensors change, and by how much."""
    changes = sorted(row["relative_change"] for row in rows if row["relative_change"])
    if not changes:
        return f"{stage}: changes none of {len(rows)} tensors at this step"
    span = f"{changes[0]:.2g}"
    if len(changes) > 1:
        span += f" to {changes[-1]:.2g}"
    return f"{stage}: changes {len(changes)} of {len(rows)} tensors, by {span} of their norm"


def _tensor_table(rows: Sequence[TensorRow], *, every_tensor: bool) -> Iterator[str]:
    """Yield the lines of a table of tensors, and how many tensors it leaves out."""
    shown = list(rows) if every_tensor else _most_telling(rows)
    width = max(len(row["tensor"]) for row in shown)
    yield f"{'tensor':<{width}}  {'shape':<14} {'change':>8} {'cosine':>8}  why"
    for row in shown:
        shape = "" if row["shape"] is None else "×".join(map(str, row["shape"]))
        numbers = f"{row['relative_change']:>8.2g} {row['cosine']:>8.4f}"
        yield f"{row['tensor']:<{width}}  {shape:<14} {numbers}  {row['why']}"
    if len(shown) < len(rows):
        yield f"… and {len(rows) - len(shown)} more; --all shows them"


def _most_telling(rows: Sequence[TensorRow]) -> list[TensorRow]:
    """Return the tensors that change most, and others with a reason of their own."""
    ranked = sorted(rows, key=lambda row: (-row["relative_change"], row["why"] == NOT_ITS_OWN))
    with_reason = [
        row for row in ranked[TENSORS_SHOWN:] if not row["why"].startswith(("changed", "unchanged"))
    ]
    return [*ranked[:TENSORS_SHOWN], *with_reason[:TENSORS_SHOWN]]


def _cost(explained: Explained, cost: Cost) -> str:
    """Say what a correction takes.

    Its work in the forward and backward pass shows only in the time of whole steps.
    """
    share = f"{100 * cost.share_of_step:.1f} % of a plain step"
    time = f"{_milliseconds(cost.seconds)} in its hooks, {share}"
    if "criterion" in explained.stages or "hidden" in explained.stages:
        time += " (its work in the forward and backward pass shows only in the time of whole steps)"
    window = f" and {_size(cost.window_bytes)} for the kept weights" if cost.window_bytes else ""
    return f"costs {time}; holds {_size(cost.state_bytes)}{window} from step to step"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _size(count: int) -> str:
    if count == 0:
        return "nothing"
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.1f} MiB"
