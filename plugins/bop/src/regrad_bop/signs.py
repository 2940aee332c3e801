"""Weights that are signs: making them, and refusing what is none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from regrad.sharding import local
from torch import Tensor, nn


@torch.no_grad()
def binarise_(weights: nn.Module | Iterable[Tensor]) -> None:
    r"""Replace every weight by its sign, in place.

    .. math:: w \leftarrow 1 \text{ if } w \ge 0, \text{ else } -1.

    Args:
        weights: Tensors of any shape, real, plain or DTensor, or a module whose parameters
            are all taken, biases too. Give it the binary layers, not a model with
            normalisations. Overwritten.

    Raises:
        ValueError: If a weight is not a number: it has no sign. Nothing is changed then.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([0.3, -2.0, 0.0]))
        >>> binarise_(layer)
        >>> layer.weight.data
        tensor([[ 1., -1.,  1.]])
    """
    tensors = weights.parameters() if isinstance(weights, nn.Module) else weights
    parts = [local(tensor) for tensor in tensors]
    for part in parts:
        if part.isnan().any():
            raise ValueError("weights must be numbers, got nan; initialise them before binarise_")
    for part in parts:
        part.copy_(torch.where(part >= 0, 1.0, -1.0))


def refuse_other_values(weight: Tensor, name: str) -> None:
    """Raise `ValueError` unless every element is -1 or +1.

    Args:
        weight: Plain or DTensor; each process looks at its own part.
        name: As the user knows the weight.
    """
    part = local(weight)
    others = part[part.abs() != 1]
    if others.numel() > 0:
        raise ValueError(
            f"parameter {name} must hold -1 and +1 alone in a group with binary=True, "
            f"got {others.flatten()[0].item():.6g}; call regrad_bop.binarise_ on it, or leave "
            "binary out for weights that are real"
        )
