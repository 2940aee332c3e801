"""Which tensors GC-W acts on: the last convolution of every stage, or the layers that are named."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from regrad.hooks import Call
from torch import nn

Size = tuple[int, ...]


def stage_ends(calls: Sequence[Call], convolutions: Collection[str]) -> list[str]:
    """Return the last convolution of every stage, in call order.

    A stage is a run of convolutions at one size of the image. The last stage ends with
    the network, where the final pooling down-samples. A first convolution that is alone at
    its size is a stem, not a stage. Two kinds of convolution stand beside the path: one
    that reads a size already left (a shortcut), and one within a module that gives back the
    size it got, at another size (squeeze and excitation). A block that down-samples in its
    middle belongs to the new stage as a whole.

    Args:
        calls: The record of the first training forward.
        convolutions: Names of the model's convolutions.

    Returns:
        Names of modules; empty if there is no stage.
    """
    spans = {call.name: (_size(call.inputs), _size(call.outputs)) for call in calls}
    stages: list[list[str]] = [[]]
    now: Size | None = None
    left: set[Size] = set()
    for call in calls:
        name = call.name
        if name not in convolutions:
            continue
        before, after = spans[name]
        is_shortcut = before in left and before != now
        if is_shortcut or _is_squeezed(name, spans):
            continue
        if now is not None and not before == after == now:
            moved: list[str] = []
            block = name.rpartition(".")[0]
            if spans.get(block) == (now, after):
                moved = [member for member in stages[-1] if member.startswith(f"{block}.")]
            if len(moved) == len(stages[-1]):  # the old stage would become empty
                moved = []
            stages[-1] = [member for member in stages[-1] if member not in moved]
            stages.append(moved)
            left.add(now)
        stages[-1].append(name)
        now = after
    has_stem = len(stages[0]) == 1
    return [stage[-1] for stage in stages[int(has_stem) :] if stage]


def _is_squeezed(name: str, spans: Mapping[str, tuple[Size, Size]]) -> bool:
    """Say whether a module around this one gives back the size it got, which is not this one's."""
    after = spans[name][1]
    for end, letter in enumerate(name):
        around = spans.get(name[:end]) if letter == "." else None
        if around is not None and around[0] == around[1] != after:
            return True
    return False


def _size(shapes: Sequence[Size]) -> Size:
    """Return the image's size of the first tensor [B, C, *size]."""
    return shapes[0][2:] if shapes else ()


def convolutions_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions of a model by name, transposed ones left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a pattern (with `*`, `?`) names a parameter or the module that holds it.

    Example:
        >>> matches("layer1.0.conv2.weight", ["layer1.*.conv2"])
        True
        >>> matches("layer1.0.conv2.weight", ["layer1"])
        False
    """
    holder = name.rpartition(".")[0]
    return any(fnmatchcase(name, pattern) or fnmatchcase(holder, pattern) for pattern in patterns)
