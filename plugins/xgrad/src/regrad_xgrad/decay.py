"""Which part of an optimizer's step is decay of the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrad import optimizers
from regrad.optimizers import stepped_by
from torch.optim import Optimizer

from regrad_xgrad.optimizer import AdaM3


def decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> float | None:
    """Return the decay rate λ of a step that contains −ηλθ; that of AdaM3 is known here.

    Args:
        optimizer: The innermost optimizer.
        group: One of its parameter groups.

    Returns:
        0 if the decay is added to the gradient, or there is none; None if it is unknown which of
        the two a foreign class does.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.1)
        >>> decoupled_decay(optimizer, optimizer.param_groups[0])
        0.1
    """
    if type(stepped_by(optimizer)) is AdaM3:
        return float(group.get("weight_decay") or 0.0)
    return optimizers.decoupled_decay(optimizer, group)
