"""Which tensors GC-W acts on: the last convolution of every stage, or the layers that the user names."""

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from regrad.hooks import Call
from torch import nn

Size = tuple[int, ...]


def stage_ends(calls: Sequence[Call], convolutions: Collection[str]) -> list[str]:
    """Return the last convolution of every stage, in call order.

    A stage is a run of convolutions at one size of the image; the end of the network
    ends the last one (there the final pooling down-samples). A first convolution that
    is alone at its size is a stem, not a stage. Two kinds of convolution stand beside
    the path: one that reads a size already left (a shortcut), and one within a module
    that gives back the size it got, at another size (squeeze and excitation). Where a
    block down-samples in its middle, all of it belongs to the new stage.

    Args:
        calls: The record of the first training forward.
        convolutions: Names of the model's convolutions.

    Returns:
        Names of modules; empty where there is no stage.
    """
    spans = {call.name: (_size(call.inputs), _size(call.outputs)) for call in calls}
    stages: list[list[str]] = [[]]
    now: Size | None = None
    left: set[Size] = set()
    for name in (call.name for call in calls if call.name in convolutions):
        before, after = spans[name]
        around = [
            spans[name[:dot]]
            for dot, mark in enumerate(name)
            if mark == "." and name[:dot] in spans
        ]
        apart = any(entry == end != after for entry, end in around)
        if apart or (before in left and before != now):
            continue
        if now is not None and not before == after == now:
            block = name.rpartition(".")[0]
            same = [
                n
                for n in stages[-1]
                if spans.get(block) == (now, after) and n.startswith(block + ".")
            ]
            moved = same if len(same) < len(stages[-1]) else []
            stages[-1] = [n for n in stages[-1] if n not in moved]
            stages.append(moved)
            left.add(now)
        stages[-1].append(name)
        now = after
    return [stage[-1] for stage in (stages[1:] if len(stages[0]) == 1 else stages) if stage]


def _size(shapes: Sequence[Size]) -> Size:
    """Return the image's size of the first tensor [B, C, *size]."""
    return shapes[0][2:] if shapes else ()


def convolutions_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions of a model by name, transposed ones left out."""
    return {
        n: module
        for n, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a pattern (with `*`, `?`) is the name of a parameter or of the module that holds it.

    Example:
        >>> matches("layer1.0.conv2.weight", ["layer1.*.conv2"])
        True
        >>> matches("layer1.0.conv2.weight", ["layer1"])
        False
    """
    return any(
        fnmatchcase(n, pattern) for pattern in patterns for n in (name, name.rpartition(".")[0])
    )
