"""The rules as their authors write them: float64, loops over units, no cleverness."""

import math

import torch
from torch import nn


def units(module, name, shape):
    """Yield, for each unit of one parameter, the indices of its elements in the flattened tensor."""
    index = torch.arange(math.prod(shape)).reshape(shape)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_bias":
        third = shape[0] // 3  # query, key and value
        return [index[i * third : (i + 1) * third].flatten() for i in range(3)]
    if len(shape) < 2 or isinstance(module, nn.LayerNorm):
        return [index.flatten()]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        # weight [in, out/groups, …]: input channels of group g reach only its outputs
        size = shape[0] // module.groups
        groups = [index[g * size : (g + 1) * size] for g in range(module.groups)]
        return [group[:, o].flatten() for group in groups for o in range(shape[1])]
    layer = isinstance(
        module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding | nn.MultiheadAttention
    )
    if not layer and sum(size > 1 for size in shape) <= 1:
        return [index.flatten()]
    return [row.flatten() for row in index]


def clip_adaptive(grad, weight, unit_indices, max_ratio, weight_floor):
    """Brock et al., 2021, equation 3."""
    result, grad, weight = (
        grad.double().flatten(),
        grad.double().flatten(),
        weight.double().flatten(),
    )
    for unit in unit_indices:
        gradient_norm = math.sqrt(sum(x * x for x in grad[unit].tolist()))
        weight_norm = max(math.sqrt(sum(x * x for x in weight[unit].tolist())), weight_floor)
        if gradient_norm / weight_norm > max_ratio:
            result[unit] = grad[unit] * (max_ratio * weight_norm / gradient_norm)
    return result


def clip_norm(grads, max_norm):
    """Pascanu et al., 2013, algorithm 1, with torch's 1e-6."""
    norm = math.sqrt(sum(x * x for grad in grads for x in grad.double().flatten().tolist()))
    return [grad.double() * min(1.0, max_norm / (norm + 1e-6)) for grad in grads]


def clip_value(grad, max_value):
    """Every element on its own."""
    clipped = [min(max(x, -max_value), max_value) for x in grad.double().flatten().tolist()]
    return torch.tensor(clipped, dtype=torch.float64).reshape(grad.shape)


def clip_update(displacement, rate, max_rms):
    """Shazeer and Stern, 2018, section 6."""
    steps = displacement.double().flatten().tolist()
    rms = math.sqrt(sum((step / rate) ** 2 for step in steps) / len(steps))
    clipped = [step / max(1.0, rms / max_rms) for step in steps]
    return torch.tensor(clipped, dtype=torch.float64).reshape(displacement.shape)
