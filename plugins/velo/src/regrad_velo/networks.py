"""VeLO's networks: an LSTM that looks at tensors, and small MLPs that look at weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BANK_SCALE = 100.0
LAYERS = 3


def recurrent_step(
    network: Mapping[str, Tensor], features: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mixing weights and the step factor of every tensor, and the LSTM's next state.

    Args:
        network: By the names of `regrad_velo.weights.SHAPES`.
        features: (n, 30) of n tensors, which see each other through a maximum.
        hidden: (n, 512).
        cell: (n, 512).

    Returns:
        Mixing weights (n, 256), factors (n,), and the next `hidden` and `cell`.
    """
    others = torch.relu(features @ network["others.weight"] + network["others.bias"])
    own = features @ network["own.weight"] + network["own.bias"]
    inputs = own + others.max(dim=0, keepdim=True).values
    gates = torch.cat([inputs, hidden], dim=1) @ network["gates.weight"] + network["gates.bias"]
    entry, candidate, keep, out = gates.chunk(4, dim=1)
    cell = torch.sigmoid(keep + 1) * cell + torch.sigmoid(entry) * torch.tanh(candidate)
    hidden = torch.sigmoid(out) * torch.tanh(cell)
    mixing = hidden @ network["mixing.weight"] + network["mixing.bias"]
    factors = hidden @ network["factor.weight"] + network["factor.bias"]
    return mixing, factors.squeeze(1), hidden, cell


def mixed_mlp(network: Mapping[str, Tensor], mixing: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the weight and the bias of each layer of a tensor's own MLP.

    Args:
        network: By the names of `regrad_velo.weights.SHAPES`.
        mixing: (256,), one weight for each MLP of the bank.
    """
    count = mixing.numel()
    layers = []
    for layer in range(LAYERS):
        weight = torch.tensordot(mixing, network[f"bank.{layer}.weight"], dims=1)
        bias = torch.tensordot(mixing, network[f"bank.{layer}.bias"], dims=1)
        layers.append((BANK_SCALE / count * weight, BANK_SCALE / count * bias))
    return layers


def direction_and_magnitude(
    layers: list[tuple[Tensor, Tensor]], features: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a tensor's MLP says of each of its n weights.

    Args:
        layers: From `mixed_mlp`.
        features: (n, 30).

    Returns:
        Both (n,). The MLP's third output is not used.
    """
    values = features
    for place, (weight, bias) in enumerate(layers):
        values = torch.addmm(bias, values, weight)
        if place < len(layers) - 1:
            values = values.relu_()
    return values[:, 0], values[:, 1]
