"""The trivial change that a correction must beat, made on an optimizer that lives already."""

from __future__ import annotations

from collections.abc import Sequence

import regrad
import torch
from regrad import RegradError, registry
from regrad.correction import Control
from regrad.optimizers import parameters_of
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_runner.models.heads import own_head
from regrad_runner.settings.arms import merged


def control_named(name: str, optimizer: Optimizer) -> Control:
    """Return the control of a name that an installed correction declares for an optimizer.

    Raises:
        RegradError: If none does; says which there are.
    """
    known: dict[str, Control] = {}
    for correction_name in regrad.available():
        for correction in registry.create_all([correction_name]):
            control = correction.control(optimizer)
            if control is not None:
                known.setdefault(control.name, control)
    if name not in known:
        there = ", ".join(sorted(known)) or "none"
        raise RegradError(
            f"no control named {name!r} for {type(optimizer).__name__}; there are: {there}"
        )
    return known[name]


def control_of(corrections: Sequence[str], optimizer: Optimizer) -> Control:
    """Return the one control that corrections declare together for an optimizer.

    Raises:
        RegradError: If they declare none.
    """
    made = registry.create_all(corrections)
    control = merged([correction.control(optimizer) for correction in made])
    if control is None:
        raise RegradError(
            f"{'+'.join(corrections)} declares no control on {type(optimizer).__name__}"
        )
    return control


def apply_control(control: Control, model: nn.Module, optimizer: Optimizer) -> None:
    """Change a live optimizer and its model, before the first training forward.

    Args:
        control: What to change. Its corrections are left to the caller.
        model: Its output layer is the head.
        optimizer: Its groups get the control's options. Rates of head and body act after each
            step, as a factor on how far it moved the weights: schedulers know the groups as they
            are.

    Raises:
        RegradError: If the optimizer has no such option.
        ValueError: If the model has no output layer of its own.
    """
    rescales = (control.head_init, control.head_lr, control.body_lr) != (1, 1, 1)
    head = own_head(model, whose=f"control {control.name!r}") if rescales else []
    for option in control.optimizer:
        if any(option not in group for group in optimizer.param_groups):
            raise RegradError(
                f"control {control.name!r} sets {option}, which {type(optimizer).__name__} "
                "does not have"
            )
    for group in optimizer.param_groups:
        group.update(control.optimizer)
    with torch.no_grad():
        for parameter in head:
            parameter.mul_(control.head_init)
    factors = dict.fromkeys(head, control.head_lr)
    if control.body_lr != 1:
        in_head = set(head)
        body = [parameter for parameter in parameters_of(optimizer) if parameter not in in_head]
        factors |= dict.fromkeys(body, control.body_lr)
    scaled = {parameter: factor for parameter, factor in factors.items() if factor != 1}
    if scaled:
        _ScaledSteps(scaled).register(optimizer)


class _ScaledSteps:
    """Makes steps of some parameters longer or shorter by a factor.

    A step of SGD, Adam, AdamW and their kind is proportional to the learning rate, decoupled decay
    included, so this is a rate of their own.

    Args:
        factors: By parameter.
    """

    def __init__(self, factors: dict[nn.Parameter, float]) -> None:
        self._factors = factors
        self._before: dict[nn.Parameter, Tensor] = {}

    def register(self, optimizer: Optimizer) -> None:
        """Act on every step of an optimizer from here on."""
        optimizer.register_step_pre_hook(self._note)
        optimizer.register_step_post_hook(self._scale)

    def _note(self, *_: object) -> None:
        self._before = {parameter: parameter.detach().clone() for parameter in self._factors}

    @torch.no_grad()
    def _scale(self, *_: object) -> None:
        for parameter, before in self._before.items():
            parameter.lerp_(before, 1 - self._factors[parameter])
        self._before = {}
