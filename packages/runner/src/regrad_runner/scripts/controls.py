"""The trivial change that a correction must beat, applied to an existing optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import regrad
import torch
from regrad import RegradError, registry
from regrad.correction import Control, Correction
from regrad.optimizers import parameters_of
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer
from torch.utils.hooks import RemovableHandle

from regrad_runner.models.heads import own_head
from regrad_runner.scripts.nadam import NAdamSteps, check_can_be_nadam
from regrad_runner.settings.arms import control_of_stack


def control_named(name: str, optimizer: Optimizer) -> Control:
    """Return the control of a name that an installed correction declares for an optimizer.

    Raises:
        RegradError: If none does; the message lists the known ones.
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
    control = control_of_stack(corrections, optimizer)
    if control is None:
        raise RegradError(
            f"{'+'.join(corrections)} declares no control on {type(optimizer).__name__}"
        )
    return control


def apply_control(control: Control, model: nn.Module, optimizer: Optimizer) -> ExitStack:
    """Change a live optimizer and its model, before the first training forward.

    Args:
        control: What to change. Its corrections are left to the caller.
        model: Its output layer is the head.
        optimizer: Its groups get the control's options. Rates of head and body act after each
            step, as a factor on how far it moved the weights: schedulers see unchanged groups.
            NAdam in place of Adam acts after each step too: see `NAdamSteps`.

    Returns:
        What undoes it all when it is closed.

    Raises:
        RegradError: If the optimizer has no such option, or cannot take such steps. Nothing was
            changed then.
        ValueError: If the model has no output layer of its own.
    """
    rescales = (control.head_init, control.head_lr, control.body_lr) != (1, 1, 1)
    head = own_head(model, whose=f"control {control.name!r}") if rescales else []
    options = _options_of(control, optimizer)
    undo = ExitStack()
    for group in (optimizer.defaults, *optimizer.param_groups):
        undo.callback(_restore, group, dict(group))
        group.update(options)
    for parameter in head:
        undo.callback(_write, parameter, parameter.detach().clone())
        _write(parameter, parameter.detach() * control.head_init)
    factors = dict.fromkeys(head, control.head_lr)
    if control.body_lr != 1:
        in_head = set(head)
        body = [parameter for parameter in parameters_of(optimizer) if parameter not in in_head]
        factors |= dict.fromkeys(body, control.body_lr)
    scaled = {parameter: factor for parameter, factor in factors.items() if factor != 1}
    handles: list[RemovableHandle] = []
    if control.optimizer_class is not None:
        handles += NAdamSteps().register(optimizer)
    if scaled:
        handles += _ScaledSteps(scaled).register(optimizer)
    for handle in handles:
        undo.callback(handle.remove)
    return undo


def check_fits(control: Control, corrections: Sequence[Correction]) -> None:
    """Raise `RegradError` if a correction predicts steps that a control changes afterwards."""
    keeps_rates = control.head_lr == control.body_lr == 1
    if control.optimizer_class is None and keeps_rates:
        return
    for correction in corrections:
        if "weights" in correction.needs.stages:
            raise RegradError(
                f"control {control.name!r} changes steps after they are computed, and "
                f"{correction.name!r} predicts them; use one of the two"
            )


def _options_of(control: Control, optimizer: Optimizer) -> dict[str, Any]:
    """Return what a control sets in the groups of an optimizer, or raise `RegradError`."""
    name = type(optimizer).__name__
    if control.optimizer_class is None:
        for option in control.optimizer:
            if any(option not in group for group in optimizer.param_groups):
                raise RegradError(
                    f"control {control.name!r} sets {option}, which {name} does not have"
                )
        return dict(control.optimizer)
    if control.optimizer_class is not NAdam:
        raise RegradError(
            f"control {control.name!r} trains with {control.optimizer_class.__name__}, whose "
            f"steps a live {name} cannot take; in a script NAdam can replace Adam and AdamW"
        )
    check_can_be_nadam(optimizer)
    # "nesterov" says so to corrections that look ahead themselves, and to whoever prints it.
    return {"nesterov": True, **control.optimizer}


def _restore(group: dict[str, Any], before: dict[str, Any]) -> None:
    group.clear()
    group.update(before)


@torch.no_grad()
def _write(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.copy_(values)


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

    def register(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Act on every step of an optimizer from now on, including the current one."""
        self._note()
        return [
            optimizer.register_step_pre_hook(self._note),
            optimizer.register_step_post_hook(self._scale),
        ]

    def _note(self, *_: object) -> None:
        self._before = {parameter: parameter.detach().clone() for parameter in self._factors}

    @torch.no_grad()
    def _scale(self, *_: object) -> None:
        for parameter, before in self._before.items():
            parameter.lerp_(before, 1 - self._factors[parameter])
        self._before = {}
