"""AdamW for the parameters of a binary network that are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from regrad.sharding import locals_of
from torch import Tensor, nn
from torch.optim.adam import adam


def new_real_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state before the first step, under the keys of torch's class.

    Args:
        parameter: Plain or DTensor; the moments have its shape, dtype and layout.
    """
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def step_real_(
    parameters: Sequence[nn.Parameter],
    states: Sequence[Mapping[str, Tensor]],
    options: Mapping[str, Any],
) -> None:
    """Take one step of torch's AdamW, in place.

    Args:
        parameters: Of one device and dtype, each with a gradient. Overwritten.
        states: For each what `new_real_state` returned. Overwritten.
        options: `lr`, `betas`, `eps`, `weight_decay` and `maximize` of their group.
    """
    adam(
        locals_of(parameters),
        locals_of(p.grad for p in parameters if p.grad is not None),
        locals_of(state["exp_avg"] for state in states),
        locals_of(state["exp_avg_sq"] for state in states),
        [],
        [state["step"] for state in states],
        amsgrad=False,
        decoupled_weight_decay=True,
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=options["maximize"],
    )
