"""What the optimizers refuse in the options of a parameter group, and in parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_group(group: Mapping[str, Any]) -> None:
    """Raise `ValueError` if an option of a group is out of range.

    Args:
        group: All options, defaults included, of a group that is complete.
    """
    _check_rate("lr", group["lr"], most=1.0 if group["binary"] else None)
    _check_rate("real_lr", group["real_lr"])
    _check_not_negative("threshold", group["threshold"])
    _check_not_negative("weight_decay", group["weight_decay"])
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
    if not (group["eps"] > 0 and math.isfinite(group["eps"])):
        raise ValueError(f"eps must be positive and finite, got {group['eps']!r}")
    if "second_rate" in group and not 0 < group["second_rate"] <= 1:
        raise ValueError(f"second_rate must be in (0, 1], got {group['second_rate']!r}")
    if "warmup_steps" in group:
        _check_not_negative("warmup_steps", group["warmup_steps"])


def check_parameter(parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a parameter has no rule in its group: complex, or 0/0."""
    if not parameter.is_floating_point():
        raise ValueError(f"parameters must be real and floating point, got {parameter.dtype}")
    if group["binary"]:
        return
    if torch.tensor(group["eps"], dtype=parameter.dtype) == 0:
        raise ValueError(
            f"eps must not vanish in {parameter.dtype}, got {group['eps']!r}; "
            "keep the real weights in float32"
        )


def check_dense(parameters: Iterable[Tensor]) -> None:
    """Raise `RuntimeError` if a gradient is sparse."""
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise RuntimeError(
            "gradients must be dense, got a sparse one; use sparse=False, or torch.optim.SparseAdam"
        )


def _check_rate(name: str, rate: Any, most: float | None = None) -> None:
    """Raise `ValueError` unless a rate is a tensor of one element or a number in its range."""
    if isinstance(rate, Tensor):
        if rate.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, got shape {list(rate.shape)}"
            )
        return
    if most is not None and not 0 <= rate <= most:
        raise ValueError(
            f"{name} must be in [0, {most:g}] for binary weights, whose average of gradients "
            f"it is a share of, got {rate!r}"
        )
    _check_not_negative(name, rate)


def _check_not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
