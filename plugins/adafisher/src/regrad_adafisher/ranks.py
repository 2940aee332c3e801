"""The sums of all ranks together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from regrad.hookspecs import Layout
from regrad.wrappers import is_kind
from torch import distributed, nn

from regrad_adafisher.layers import Layer, padded_to


def count_ranks() -> int:
    """Return how many ranks there are.

    Example:
        >>> count_ranks()
        1
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def are_parts_of_a_batch(model: nn.Module, layout: Layout | None) -> bool:
    """Say whether torch averages the gradients of the ranks, each of which has a part of a batch.

    Otherwise every rank has its own batch, or somebody averages by hand.

    Args:
        model: The innermost module.
        layout: Of the step.
    """
    if count_ranks() == 1 or layout is None:
        return False
    if layout.name in {"ddp", "zero-redundancy"}:
        return True
    # It has no wrapper, but the class of the module is another one.
    return any(is_kind(module, "composable.replicate") for module in model.modules())


def add_over_ranks(layers: Sequence[Layer], *, are_parts: bool) -> None:
    """Replace the sums and the counts by those of all ranks together.

    Collective: every rank calls it with the same layers. A rank on which a layer was not called
    adds zeros.

    Args:
        layers: Their sums are replaced.
        are_parts: Whether the ranks have parts of one batch. Otherwise the sums are divided by
            the number of ranks: what copies of one batch gave stays as it is.
    """
    if not layers or count_ranks() == 1:
        return
    lengths = _largest_lengths(layers)
    together: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        together[layer.device, layer.dtype].append(layer)
    for alike in together.values():
        _add_alike(alike, [lengths[layer.name] for layer in alike])
    if not are_parts:
        for layer in layers:
            layer.divide(count_ranks())


def _largest_lengths(layers: Sequence[Layer]) -> dict[str, int]:
    """Return how long the sums of inputs are on the rank where they are longest, by layer."""
    mine = [0 if layer.inputs is None else len(layer.inputs) for layer in layers]
    lengths = torch.tensor(mine, device=layers[0].device)
    distributed.all_reduce(lengths, op=distributed.ReduceOp.MAX)
    names = [layer.name for layer in layers]
    return dict(zip(names, lengths.tolist(), strict=True))


def _add_alike(layers: Sequence[Layer], lengths: Sequence[int]) -> None:
    """Add the sums of layers of one device and dtype, in one exchange."""
    like = torch.zeros(0, device=layers[0].device, dtype=layers[0].dtype)
    parts = [like.new_tensor([layer.rows for layer in layers])]
    for layer, length in zip(layers, lengths, strict=True):
        inputs = like if layer.inputs is None else layer.inputs
        gradients = like if layer.gradients is None else layer.gradients
        parts += [padded_to(inputs, length), padded_to(gradients, layer.outputs)]
    sums = torch.cat(parts)
    distributed.all_reduce(sums)
    rows, *vectors = torch.split(sums, [len(part) for part in parts])
    rest = iter(vectors)
    for layer, count in zip(layers, rows.tolist(), strict=True):
        layer.rows = count
        layer.inputs = next(rest)
        layer.gradients = next(rest)
