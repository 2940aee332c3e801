"""Steps that only make an optimizer's state, as torch's checkpointing takes them."""

from typing import Any

import torch
from torch import Tensor, optim

from regrad import sharding
from regrad.hookspecs import Step


def only_makes_state(optimizer: optim.Optimizer) -> bool:
    """Say whether the coming step has rate zero and gradients of zero.

    A first step of a warm-up from rate zero has gradients, and counts.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    if not all(_is_zero_on_host(rate) for rate in rates):
        return False
    gradients = Step(optimizer, 0).gradients
    present = [gradient for gradient in gradients if gradient is not None]
    if not present or any(_is_sparse_or_pending(gradient) for gradient in present):
        return False
    # Asked of all shards together, so that all processes answer the same.
    differing = [(gradient != 0).to(torch.float32) for gradient in present]
    return float(sharding.total_norm(differing)) == 0


def _is_zero_on_host(rate: Any) -> bool:
    """Say whether a rate is zero, without waiting for a device that holds it."""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and float(rate) == 0
    return rate is not None and float(rate) == 0


def _is_sparse_or_pending(gradient: Tensor) -> bool:
    """Say whether a gradient has a layout that no made-up one has: sparse, or a pending sum."""
    placements = getattr(gradient, "placements", ())
    return gradient.is_sparse or any(placement.is_partial() for placement in placements)
