"""The model, the optimizer and the loader of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from regrad.correction import Control
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_runner.models.exits import SumOverExits, exits_of
from regrad_runner.models.heads import own_head
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import RunConfig
from regrad_runner.training.optimizers import build_optimizer, of_another_class
from regrad_runner.workloads.loading import make_model
from regrad_runner.workloads.samples import TrainingLoader, training_loader
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
    optimizer = str(config.optimizer)
    control = arm.control
    if control is None:
        return model, build_optimizer(optimizer, model.parameters(), lr=lr)
    head: list[nn.Parameter] = []
    if (control.head_init, control.head_lr, control.body_lr) != (1, 1, 1):
        head = own_head(model, whose=f"control {control.name!r}")
    with torch.no_grad():
        for parameter in head:
            parameter.mul_(control.head_init)
    groups = _groups(control, model, head, lr=lr)
    if control.optimizer_class is None:
        return model, build_optimizer(optimizer, groups, lr=lr, changes=control.optimizer)
    example = build_optimizer(optimizer, groups, lr=lr)
    return model, of_another_class(example, control.optimizer_class, changes=control.optimizer)


def _groups(control: Control, model: nn.Module, head: Sequence[nn.Parameter], *, lr: float) -> Any:
    """Return the parameters for an optimizer: in two groups where the control changes a rate."""
    if control.head_lr == control.body_lr == 1:
        return model.parameters()
    in_head = {id(parameter) for parameter in head}
    body = [parameter for parameter in model.parameters() if id(parameter) not in in_head]
    return [
        {"params": body, "lr": lr * control.body_lr},
        {"params": list(head), "lr": lr * control.head_lr},
    ]


def build_criterion(workload: Workload, model: nn.Module) -> nn.Module:
    """Return the workload's loss; its sum over the exits where the model has several.

    Args:
        workload: What is trained.
        model: As `build_training` returned it.
    """
    criterion = workload.criterion()
    return SumOverExits(criterion) if exits_of(model) > 1 else criterion


def build_loader(config: RunConfig, workload: Workload, *, seed: int) -> TrainingLoader:
    """Return the loader of the training samples, in micro-batches over all processes.

    Args:
        config: Resolved settings.
        workload: Whose samples are loaded.
        seed: Fixes the order and the augmentation.
    """
    return training_loader(
        workload.train,
        batch_size=int(config.batch_size or 1) // config.accumulate,
        seed=seed,
        workers=config.workers,
    )


def as_inputs(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return inputs in the number format of the weights; whole numbers stay unchanged."""
    return inputs.to(dtype) if inputs.is_floating_point() else inputs
