"""The model and the optimizer of an arm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_runner.models.heads import own_head
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import RunConfig
from regrad_runner.training.optimizers import build_optimizer
from regrad_runner.workloads.loading import make_model
from regrad_runner.workloads.workload import Workload


def build_training(
    config: RunConfig, workload: Workload, arm: Arm, *, seed: int, lr: float
) -> tuple[nn.Module, Optimizer]:
    """Return the model and the optimizer of an arm, the change of its control made.

    Args:
        config: Resolved settings.
        workload: What is trained.
        arm: Whose control is applied.
        seed: Fixes the initial weights.
        lr: Learning rate before a control changes it.

    Raises:
        ValueError: If model or optimizer cannot be made.
    """
    model = make_model(workload, str(config.model), width=config.width, norm=config.norm, seed=seed)
    control = arm.control
    if control is None:
        return model, build_optimizer(str(config.optimizer), model.parameters(), lr=lr)
    rescales = (control.head_init, control.head_lr, control.body_lr) != (1, 1, 1)
    head = own_head(model, whose=f"control {control.name!r}") if rescales else []
    with torch.no_grad():
        for parameter in head:
            parameter.mul_(control.head_init)
    groups: Any = model.parameters()
    if control.head_lr != control.body_lr or control.body_lr != 1:
        body = [p for p in model.parameters() if all(p is not h for h in head)]
        groups = [
            {"params": body, "lr": lr * control.body_lr},
            {"params": head, "lr": lr * control.head_lr},
        ]
    return model, build_optimizer(str(config.optimizer), groups, lr=lr, changes=control.optimizer)


def as_inputs(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return inputs in the number format of the weights; whole numbers, such as bytes of a text, as they are."""
    return inputs.to(dtype) if inputs.is_floating_point() else inputs
