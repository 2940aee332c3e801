"""The model, the optimizer and the loader of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from regrad.correction import Control
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_runner.models.binary import plain_signs
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
        ValueError: If model or optimizer cannot be made, or the optimizer flips binary weights and
            the model has none.
    """
    model = make_model(workload, str(config.model), width=config.width, norm=config.norm, seed=seed)
    optimizer = str(config.optimizer)
    control = arm.control
    binary = workload.binary_parameters(model)
    if control is None:
        groups = _with_binary_groups(model.parameters(), binary)
        made = build_optimizer(optimizer, groups, lr=lr)
        _give_signs(made, binary, optimizer)
        return model, made
    head: list[nn.Parameter] = []
    if (control.head_init, control.head_lr, control.body_lr) != (1, 1, 1):
        head = own_head(model, whose=f"control {control.name!r}")
    with torch.no_grad():
        for parameter in head:
            parameter.mul_(control.head_init)
    groups = _with_binary_groups(_groups(control, model, head, lr=lr), binary)
    if control.optimizer_class is None:
        made = build_optimizer(optimizer, groups, lr=lr, changes=control.optimizer)
        _refuse_rates_of_signs(made, control)
        _give_signs(made, binary, optimizer)
        return model, made
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


def _with_binary_groups(parameters: Iterable[Any], binary: Sequence[Tensor]) -> Any:
    """Return parameters or groups, those that are binary in groups of their own, in front."""
    if not binary:
        return parameters
    among = {id(parameter) for parameter in binary}
    given = list(parameters)
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    apart: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        members = list(group["params"])
        own = [parameter for parameter in members if id(parameter) in among]
        rest = [parameter for parameter in members if id(parameter) not in among]
        if own:
            apart.append({**group, "params": own, "binary": True})
        if rest:
            others.append({**group, "params": rest})
    return [*apart, *others]


def _holds_signs(optimizer: Optimizer) -> bool:
    """Say whether an optimizer's groups have the option `binary`, for weights of -1 and +1."""
    return "binary" in optimizer.defaults


@torch.no_grad()
def _give_signs(optimizer: Optimizer, binary: Sequence[Tensor], spec: str) -> None:
    """Let binary weights be signs from the start, if the optimizer holds signs."""
    if not _holds_signs(optimizer):
        return
    if not binary:
        raise ValueError(
            f"optimizer must suit the model, got {spec!r}, which flips binary weights, for a model "
            "without any; use --workload digits-binary"
        )
    for weight in binary:
        weight.copy_(plain_signs(weight))


def _refuse_rates_of_signs(optimizer: Optimizer, control: Control) -> None:
    """Refuse a control that sets rates by group: binary and real groups have different ones."""
    if _holds_signs(optimizer) and (control.head_lr, control.body_lr) != (1, 1):
        raise ValueError(
            f"control {control.name!r} must not set learning rates for head and body with "
            f"{type(optimizer).__name__}, whose binary and real groups have different ones; "
            "leave controls out (--no-controls)"
        )


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
