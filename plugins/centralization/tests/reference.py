"""The rule as in the paper: float64, loops over outputs and elements (arXiv 2004.01461, equation 1)."""

import math

import torch
from torch import nn


def outputs(module, shape):
    """Return, for each output of a layer, the indices of its weights in the flattened tensor."""
    index = torch.arange(math.prod(shape)).reshape(shape)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        size = shape[0] // module.groups
        groups = [index[g * size : (g + 1) * size] for g in range(module.groups)]
        return [group[:, o].flatten() for group in groups for o in range(shape[1])]
    return [row.flatten() for row in index]


def centralize(grad, unit_indices):
    """Subtract from every element the mean over its output."""
    flat = grad.double().flatten().tolist()
    result = list(flat)
    for unit in unit_indices:
        indices = unit.tolist()
        mean = math.fsum(flat[i] for i in indices) / len(indices)
        for i in indices:
            result[i] = flat[i] - mean
    return torch.tensor(result, dtype=torch.float64).reshape(grad.shape)
