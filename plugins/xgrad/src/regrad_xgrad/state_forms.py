"""Which optimizer keeps what, read by exact class: other libraries use the same keys for other things."""

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
    momentum_displacement_(out, locals_of(s["momentum_buffer"] for s in states), rate)


def _along_adam(
    out: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    group: Group,
    rate: Sequence[Scalar],
    *,
    second: str,
    eps: float | None = None,
) -> None:
    """Write the displacements of a rule m̂/(√v̂ + ε), where v is kept as `second` and ε is the group's or `eps`."""
    adam_displacement_(
        out,
        locals_of(s["exp_avg"] for s in states),
        locals_of(s[second] for s in states),
        rate=rate,
        steps=[_plain(s["step"] if "step" in s else group["step"]) for s in states],
        betas=[group["betas"]] * len(out),
        eps=[group["eps"] if eps is None else eps] * len(out),
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
        return "exp_avg", partial(
            _along_adam, second="max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        )
    if kind is AdaM3:  # its ε is in v already
        return "exp_avg", partial(_along_adam, second="exp_avg_sq", eps=0.0)
    if _is_adabelief(kind) and not any(group.get(key) for key in ADABELIEF_VARIANTS):
        return "exp_avg", partial(
            _along_adam, second="max_exp_avg_var" if group["ams_bound"] else "exp_avg_var"
        )
    if kind in (SGD, RMSprop) and group["momentum"] > 0 and not group.get("nesterov"):
        return "momentum_buffer", _along_momentum
    return None


def _is_adabelief(kind: type[Optimizer]) -> bool:
    """Say whether `kind` is pytorch_optimizer's AdaBelief; whoever has one has imported that library."""
    return kind is getattr(sys.modules.get(ADABELIEF_MODULE), "AdaBelief", None)


def decoupled_decay(optimizer: Optimizer, group: Group) -> float | None:
    """Return the decay rate that a step applies to the weights themselves; None where it is not known."""
    if type(optimizer).__module__.partition(".")[0] != "torch":
        return None if group.get("weight_decay") else 0.0
    if group.get("decoupled_weight_decay", isinstance(optimizer, DECOUPLED)):
        return float(group["weight_decay"])
    return 0.0
