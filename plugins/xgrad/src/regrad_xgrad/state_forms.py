"""Which torch optimizer keeps what, read by exact class: other libraries use the same keys for other things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from regrad.sharding import local, locals_of
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

from regrad_xgrad.functional import Scalar, adam_displacement_, momentum_displacement_

Group = Mapping[str, Any]
StateForm = Callable[[Sequence[Tensor], Sequence[Mapping[str, Any]], Group, Sequence[Scalar]], None]
"""(out, states of n parameters of one group, the group, rates) writes n displacements."""

DECOUPLED = (AdamW, Adafactor, Muon)


def _along_momentum(
    out: Sequence[Tensor], states: Sequence[Mapping[str, Any]], group: Group, rate: Sequence[Scalar]
) -> None:
    momentum_displacement_(out, locals_of(s["momentum_buffer"] for s in states), rate)


def _along_adam(
    out: Sequence[Tensor], states: Sequence[Mapping[str, Any]], group: Group, rate: Sequence[Scalar]
) -> None:
    second = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    adam_displacement_(
        out,
        locals_of(s["exp_avg"] for s in states),
        locals_of(s[second] for s in states),
        rate=rate,
        steps=[_plain(s["step"]) for s in states],
        betas=[group["betas"]] * len(out),
        eps=[group["eps"]] * len(out),
    )


def _plain(step: Scalar) -> Scalar:
    """Return a step count that lies on the CPU as a number; reading one from a device would wait for it."""
    if isinstance(step, Tensor):
        step = local(step)
        return step.item() if step.device.type == "cpu" else step
    return step


def state_form(optimizer: Optimizer, group: Group) -> tuple[str, StateForm] | None:
    """Return the state that D is read from and the rule, or None where only the displacement form is exact.

    Args:
        optimizer: The innermost optimizer.
        group: One of its parameter groups.

    Returns:
        The key that a parameter's state has once D exists, and the rule.
    """
    kind = type(optimizer)
    if kind in (Adam, AdamW):
        return "exp_avg", _along_adam
    if kind in (SGD, RMSprop) and group["momentum"] > 0 and not group.get("nesterov"):
        return "momentum_buffer", _along_momentum
    return None


def decoupled_decay(optimizer: Optimizer, group: Group) -> float | None:
    """Return the decay rate that a step applies to the weights themselves; None where it is not known."""
    if type(optimizer).__module__.partition(".")[0] != "torch":
        return None if group.get("weight_decay") else 0.0
    if group.get("decoupled_weight_decay", isinstance(optimizer, DECOUPLED)):
        return float(group["weight_decay"])
    return 0.0


def looks_ahead(optimizer: Optimizer) -> bool:
    """Say whether the optimizer itself already takes a Nesterov step."""
    return isinstance(optimizer, NAdam) or any(group.get("nesterov") for group in optimizer.param_groups)
