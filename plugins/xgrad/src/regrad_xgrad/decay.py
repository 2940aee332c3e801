"""Which part of an optimizer's step is decay of the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrad.optimizers import stepped_by
from torch.optim import Adafactor, AdamW, Muon, Optimizer

from regrad_xgrad.optimizer import AdaM3

DECOUPLED = (AdamW, Adafactor, Muon)


def decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> float | None:
    """Return the decay rate λ of a step that contains −ηλθ.

    Args:
        optimizer: The innermost optimizer.
        group: One of its parameter groups.

    Returns:
        0 if the decay is added to the gradient, or there is none; None if it is unknown which of
        the two a foreign class does.

    Example:
        >>> import torch
        >>> optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.1)
        >>> decoupled_decay(optimizer, optimizer.param_groups[0])
        0.1
    """
    optimizer = stepped_by(optimizer)
    decay = float(group.get("weight_decay") or 0.0)
    if not decay or type(optimizer) is AdaM3:
        return decay
    library = type(optimizer).__module__.partition(".")[0]
    if library == "torch":
        is_decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, DECOUPLED))
        return decay if is_decoupled else 0.0
    # Their "fixed decay" is not multiplied by the rate.
    if library == "pytorch_optimizer" and "weight_decouple" in group:
        if not group["weight_decouple"]:
            return 0.0
        return None if group.get("fixed_decay") else decay
    return None
