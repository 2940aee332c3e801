"""Where the stages of a network begin and end, read from the record of the first training forward."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from regrad.hooks import Call

Size = tuple[int, ...]
Span = tuple[Size, Size]
NUMBERED = re.compile(r"(.*?)layer(\d+)")


class Stage(NamedTuple):
    """Modules by whose input and output a stage is known; one and the same, where one holds it."""

    first: str
    last: str


def find_stages(calls: Sequence[Call], convolutions: Collection[str]) -> list[Stage]:
    """Return the stages of a network, in call order.

    Modules numbered `layer1`, `layer2`, … beside each other are its stages. Otherwise a
    stage is a run of modules that give one size of the image. Those before the second
    one with a convolution at the first size are the stem; a module that reads a size
    already left stands beside the path.

    Args:
        calls: The record of the first training forward.
        convolutions: Names of the model's convolutions.

    Returns:
        Stages; few or none where the network shows no more.
    """
    spans = {call.name: (_size(call.inputs), _size(call.outputs)) for call in reversed(calls)}
    matches = ((name, NUMBERED.fullmatch(name)) for name, span in spans.items() if all(span))
    numbered = sorted((match[1], int(match[2]), name) for name, match in matches if match)
    for _, beside in groupby(numbered, key=lambda row: row[0]):
        if len(names := [name for *_, name in beside]) > 1:
            return [Stage(name, name) for name in names]
    return _runs(calls, spans, convolutions)


def _runs(
    calls: Sequence[Call], spans: Mapping[str, Span], convolutions: Collection[str]
) -> list[Stage]:
    """Return the runs of units with one output size that hold a convolution, those of the stem left out."""
    children: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(call.name for call in calls):
        parent = name.rpartition(".")[0]
        while parent and parent not in spans:  # a list of modules is never called itself
            parent = parent.rpartition(".")[0]
        children[parent].append(name)
    path: list[str] = []
    for name in _units("", children, spans):
        before, after = spans[name]
        if before and after and not (path and math.prod(before) > math.prod(spans[path[-1]][1])):
            path.append(name)
    learned = {name for name in path if any(f"{c}.".startswith(f"{name}.") for c in convolutions)}
    second = [*(index for index, name in enumerate(path) if name in learned), len(path), len(path)][
        1
    ]
    runs = [list(run) for _, run in groupby(path[second:], key=lambda name: spans[name][1])]
    return [Stage(run[0], run[-1]) for run in runs if learned.intersection(run)]


def _units(
    parent: str, children: Mapping[str, list[str]], spans: Mapping[str, Span]
) -> Iterator[str]:
    """Yield the largest modules within which the image changes its size once at most."""
    for name in children.get(parent, ()):
        before, after = spans[name]
        sizes = {size for inner, (_, size) in spans.items() if inner.startswith(f"{name}.")} - {
            before,
            (),
        }
        if len({size for size in sizes if math.prod(size) >= math.prod(after)}) > 1:
            yield from _units(name, children, spans)
        else:
            yield name


def _size(shapes: Sequence[Size]) -> Size:
    """Return the size [H, W] of the first tensor if it is images [B, C, H, W]."""
    return shapes[0][2:] if shapes and len(shapes[0]) == 4 else ()
