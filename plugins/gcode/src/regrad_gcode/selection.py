"""Where the stages of a network begin and end, from the record of the first training forward."""

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
    """The modules whose input and output are a stage's; the same one if it is the whole stage."""

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
        Stages; few or none if the network shows no more.
    """
    spans = {call.name: (_size(call.inputs), _size(call.outputs)) for call in reversed(calls)}
    numbered: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, span in spans.items():
        match = NUMBERED.fullmatch(name)
        if match and all(span):
            numbered[match[1]].append((int(match[2]), name))
    for prefix in sorted(numbered):
        names = [name for _, name in sorted(numbered[prefix])]
        if len(names) > 1:
            return [Stage(name, name) for name in names]
    return _runs(calls, spans, convolutions)


def _runs(
    calls: Sequence[Call], spans: Mapping[str, Span], convolutions: Collection[str]
) -> list[Stage]:
    """Return the runs of units with one output size that hold a convolution, without the stem."""
    path: list[str] = []
    for name in _units("", _children(calls, spans), spans):
        before, after = spans[name]
        is_beside = path and math.prod(before) > math.prod(spans[path[-1]][1])
        if before and after and not is_beside:
            path.append(name)
    learned = {name for name in path if any(f"{c}.".startswith(f"{name}.") for c in convolutions)}
    places = [index for index, name in enumerate(path) if name in learned]
    if len(places) < 2:
        return []
    behind_stem = path[places[1] :]
    runs = [list(run) for _, run in groupby(behind_stem, key=lambda name: spans[name][1])]
    return [Stage(run[0], run[-1]) for run in runs if learned.intersection(run)]


def _children(calls: Sequence[Call], spans: Mapping[str, Span]) -> dict[str, list[str]]:
    """Return by module the nearest modules inside it that were called, in call order."""
    children: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(call.name for call in calls):
        parent = name.rpartition(".")[0]
        while parent and parent not in spans:  # a list of modules is never called itself
            parent = parent.rpartition(".")[0]
        children[parent].append(name)
    return children


def _units(
    parent: str, children: Mapping[str, list[str]], spans: Mapping[str, Span]
) -> Iterator[str]:
    """Yield the largest modules within which the image changes its size once at most."""
    for name in children.get(parent, ()):
        before, after = spans[name]
        sizes = {span[1] for inner, span in spans.items() if inner.startswith(f"{name}.")}
        new = sizes - {before, ()}
        if len({size for size in new if math.prod(size) >= math.prod(after)}) > 1:
            yield from _units(name, children, spans)
        else:
            yield name


def _size(shapes: Sequence[Size]) -> Size:
    """Return the size [H, W] of the first tensor if it is images [B, C, H, W]."""
    return shapes[0][2:] if shapes and len(shapes[0]) == 4 else ()
