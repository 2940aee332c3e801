"""Which optimizer keeps what, by exact class: other libraries use the same keys otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from regrad.sharding import local, locals_of
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer, RMSprop

from regrad_xgrad.functional import Scalar, adam_displacement_, momentum_displacement_
from regrad_xgrad.optimizer import AdaM3

Group = Mapping[str, Any]
StateForm = Callable[[Sequence[Tensor], Sequence[Mapping[str, Any]], Group, Sequence[Scalar]], None]
"""(out, states of n parameters of one group, the group, rates) writes n displacements."""

ADABELIEF_MODULE = "pytorch_optimizer.optimizer.adabelief"
ADABELIEF_VARIANTS = ("rectify", "adanorm", "adam_debias")  # other steps than −η·m̂/(√ŝ + ε)
DECOUPLED = (AdamW, Adafactor, Muon)


def _along_momentum(
    out: Sequence[Tensor], states: Sequence[Mapping[str, Any]], group: Group, rate: Sequence[Scalar]
) -> None:
    """Write the displacements along the momentum."""
    momentum_displacement_(out, locals_of(state["momentum_buffer"] for state in states), rate)


def _along_adam(
    out: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    group: Group,
    rate: Sequence[Scalar],
    *,
    second: str,
    eps: float | None = None,
) -> None:
    """Write the displacements of a rule m̂/(√v̂ + ε).

    Args:
        out: n tensors. Overwritten.
        states: States of n parameters of one group.
        group: The group.
        rate: n learning rates, times the horizon.
        second: The key under which v is kept.
        eps: ε; None takes the group's.
    """
    adam_displacement_(
        out,
        locals_of(state["exp_avg"] for state in states),
        locals_of(state[second] for state in states),
        rate=rate,
        steps=[_plain(state["step"] if "step" in state else group["step"]) for state in states],
        betas=[group["betas"]] * len(out),
        eps=[group["eps"] if eps is None else eps] * len(out),
    )


def _plain(step: Scalar) -> Scalar:
    """Return a step count on the CPU as a number; reading one from a device would wait for it."""
    if not isinstance(step, Tensor):
        return step
    step = local(step)
    return step.item() if step.device.type == "cpu" else step


def state_form(optimizer: Optimizer, group: Group) -> tuple[str, StateForm] | None:
    """Return where an optimizer keeps D, and how to read it.

    Args:
        optimizer: The innermost optimizer.
        group: One of its parameter groups.

    Returns:
        The key that a parameter's state has once D exists, and the function that writes
        displacements; None where only the displacement form is exact.
    """
    kind = type(optimizer)
    if kind in (Adam, AdamW):
        second = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        return "exp_avg", partial(_along_adam, second=second)
    if kind is AdaM3:  # its ε is in v already
        return "exp_avg", partial(_along_adam, second="exp_avg_sq", eps=0.0)
    if _is_adabelief(kind) and not any(group.get(key) for key in ADABELIEF_VARIANTS):
        second = "max_exp_avg_var" if group["ams_bound"] else "exp_avg_var"
        return "exp_avg", partial(_along_adam, second=second)
    if kind in (SGD, RMSprop) and group["momentum"] > 0 and not group.get("nesterov"):
        return "momentum_buffer", _along_momentum
    return None


def _is_adabelief(kind: type[Optimizer]) -> bool:
    """Say whether `kind` is pytorch_optimizer's AdaBelief."""
    module = sys.modules.get(ADABELIEF_MODULE)  # whoever has such an optimizer has imported it
    return kind is getattr(module, "AdaBelief", None)


def decoupled_decay(optimizer: Optimizer, group: Group) -> float | None:
    """Return the decay rate that a step applies to the weights themselves; None if unknown."""
    if type(optimizer).__module__.partition(".")[0] != "torch":
        return None if group.get("weight_decay") else 0.0
    if group.get("decoupled_weight_decay", isinstance(optimizer, DECOUPLED)):
        return float(group["weight_decay"])
    return 0.0
