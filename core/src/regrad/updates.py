"""What corrections of the update are told of a step: its gradients, and the decay in it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from regrad.errors import RegradError, RegradWarning
from regrad.hookspecs import Step, learning_rate
from regrad.optimizers import decoupled_decay
from regrad.samples import sample
from regrad.sharding import local

OVERWRITES = (
    "{optimizer} overwrites the gradients in its step, so that {name!r} cannot compare its step "
    "with them; make it with foreach=False, or leave {name!r} out"
)
UNKNOWN_DECAY = (
    "{optimizer} has a weight_decay that may be decoupled, and {names} take it for a part of the "
    "step; set 'decoupled_weight_decay' to True or False in each of its param_groups"
)


class GradientsOfStep:
    """The gradients of a step as corrections left them, also where the optimizer clears them.

    They are references. An optimizer that writes into them is noticed by a few of their values, at
    the first step at which a correction reads them.
    """

    def __init__(self) -> None:
        self._gradients: dict[Tensor, Tensor] = {}
        self._samples: dict[Tensor, Tensor] = {}
        self._are_watched = True
        self._were_read = False
        self._is_proved = False

    def keep(self, step: Step) -> None:
        """Keep the gradients that the optimizer is about to use."""
        pairs = zip(step.parameters, step.gradients, strict=True)
        self._gradients = {p: gradient for p, gradient in pairs if gradient is not None}
        self._samples = {}
        if self._are_watched and not self._is_proved:
            for parameter, gradient in self._gradients.items():
                if not gradient.is_sparse:
                    self._samples[parameter] = sample(local(gradient)).clone()

    def read(self, step: Step) -> list[Tensor | None]:
        """Return them after the update, in the order of the step's parameters.

        Raises:
            RegradError: If the optimizer has written into them.
        """
        self._were_read = True
        if self._samples:
            self._prove(step)
        return [self._gradients.get(parameter) for parameter in step.parameters]

    def forget(self) -> None:
        """Let the memory of the gradients be free again."""
        self._gradients = {}
        self._samples = {}
        self._are_watched = self._were_read

    def _prove(self, step: Step) -> None:
        """Raise unless the gradients have the values that they had. Waits for the device."""
        before = self._samples
        self._samples = {}
        after = {p: sample(local(self._gradients[p])) for p in before}
        if not all(torch.equal(_comparable(before[p]), _comparable(after[p])) for p in before):
            kind = type(step.optimizer).__name__
            raise RegradError(OVERWRITES.format(optimizer=kind, name=step.correction.name))
        # Gradients of zero prove nothing: they may have been scaled.
        self._is_proved = any(bool(values.any()) for values in before.values())


def _comparable(values: Tensor) -> Tensor:
    """Return numbers in which NaN equals NaN."""
    return torch.view_as_real(values).nan_to_num() if values.is_complex() else values.nan_to_num()


def decays_in(step: Step) -> dict[Tensor, float | Tensor]:
    """Return which share of each parameter the step takes off as decoupled weight decay."""
    of_groups: dict[int, float | Tensor] = {}
    decays: dict[Tensor, float | Tensor] = {}
    for parameter in step.parameters:
        group = step.group_of(parameter)
        if id(group) not in of_groups:
            of_groups[id(group)] = _decay_in(step.optimizer, group)
        decays[parameter] = of_groups[id(group)]
    return decays


def _decay_in(optimizer: Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """Return rate times decoupled decay of one parameter group."""
    decay = decoupled_decay(optimizer, group)
    if not decay:
        return 0.0
    rate = learning_rate(optimizer, group)
    if isinstance(rate, Tensor):
        return rate.detach().reshape(()) * decay
    return rate * decay


def warn_of_unknown_decay(optimizer: Optimizer, names: str) -> None:
    """Warn if a weight decay may be decoupled.

    Args:
        optimizer: The innermost optimizer.
        names: Of the corrections that change its update, quoted.
    """
    if any(decoupled_decay(optimizer, group) is None for group in optimizer.param_groups):
        kind = type(optimizer).__name__
        warnings.warn(
            UNKNOWN_DECAY.format(optimizer=kind, names=names), RegradWarning, stacklevel=2
        )
