"""NAdam's step, taken by an existing Adam or AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from regrad import RegradError
from regrad.optimizers import parameters_of
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

MOMENTUM_DECAY = 4e-3  # the default of torch.optim.NAdam
PRODUCT = "mu_product"  # as torch.optim.NAdam calls it in its state
NOT_POSSIBLE = ("amsgrad", "capturable", "differentiable")


class NAdamSteps:
    r"""Makes every step of torch's Adam or AdamW the step of torch's NAdam.

    Both keep the same moments. Before a step the weights are kept; after it each of them is
    computed anew, from what it was and the moments as the step left them, with
    :math:`\mu_t = \beta_1 (1 - \tfrac{1}{2}\, 0.96^{t\psi})`:

    .. math:: \theta \leftarrow \theta - \frac{\eta}{\sqrt{\hat v} + \epsilon} \left(
        \frac{(1 - \mu_t)\, g}{1 - \prod_{i \le t} \mu_i} +
        \frac{\mu_{t+1}\, m}{1 - \prod_{i \le t+1} \mu_i} \right).

    The product of the :math:`\mu_i` is kept in the optimizer's state under NAdam's name for it,
    so a script that saves and loads its optimizer resumes exactly. Learning rates, betas and decay
    are read from the groups at each step, :math:`\psi` from `momentum_decay` there if it is set.

    References:
        Dozat, 2016, "Incorporating Nesterov Momentum into Adam"; `torch.optim.NAdam`.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}

    def register(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Act on every step of an optimizer from now on, including the current one."""
        self._note(optimizer)
        return [
            optimizer.register_step_pre_hook(self._note),
            optimizer.register_step_post_hook(self._step_anew),
        ]

    def _note(self, optimizer: Optimizer, *_: object) -> None:
        self._before = {
            parameter: parameter.detach().clone()
            for parameter in parameters_of(optimizer)
            if parameter.requires_grad or parameter.grad is not None
        }

    @torch.no_grad()
    def _step_anew(self, optimizer: Optimizer, *_: object) -> None:
        before = self._before
        self._before = {}
        if bool(getattr(optimizer, "found_inf", None)):
            return  # a fused optimizer skipped the step
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in before:
                    weight = before[parameter]
                    nadam_step_(weight, parameter.grad, optimizer.state[parameter], group)
                    parameter.copy_(weight)


def check_can_be_nadam(optimizer: Optimizer) -> None:
    """Raise `RegradError` unless a live optimizer can take NAdam's steps."""
    name = type(optimizer).__name__
    if type(optimizer) not in {Adam, AdamW}:
        raise RegradError(f"only torch's Adam and AdamW can take NAdam's steps, got {name}")
    for group in optimizer.param_groups:
        for option in NOT_POSSIBLE:
            if group[option]:
                raise RegradError(
                    f"{option} must be False for NAdam's steps in a script, got {name} with "
                    f"{option}=True; make the optimizer without it"
                )


@torch.no_grad()
def nadam_step_(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]
) -> None:
    """Take NAdam's step after Adam's was taken: see `NAdamSteps`.

    Args:
        weight: As it was before the step, any shape. Overwritten.
        gradient: What the optimizer read, same shape.
        state: Of the parameter, as Adam left it. Gets the product of the momenta.
        group: The parameter's group.
    """
    rate = float(group["lr"])
    beta, second_beta = map(float, group["betas"])
    decay = group["weight_decay"]
    step = float(state["step"])
    if group["maximize"]:
        gradient = -gradient
    if group["decoupled_weight_decay"]:
        weight.mul_(1 - rate * decay)
    elif decay != 0:
        gradient = gradient.add(weight, alpha=decay)
    psi = group.get("momentum_decay", MOMENTUM_DECAY)
    momentum = _momentum(step, beta, psi)
    following = _momentum(step + 1, beta, psi)
    product = _next_product(state, step, beta, psi)
    squares = _as_real(state["exp_avg_sq"])
    scale = squares.div(1 - second_beta**step).sqrt_().add_(group["eps"])
    weight = _as_real(weight)
    share = -rate * (1 - momentum) / (1 - product)
    weight.addcdiv_(_as_real(gradient), scale, value=share)
    share = -rate * following / (1 - product * following)
    weight.addcdiv_(_as_real(state["exp_avg"]), scale, value=share)


def _momentum(step: float, beta: float, psi: float) -> float:
    """Return the momentum of a step, counted from 1."""
    return float(beta * (1 - 0.5 * 0.96 ** (step * psi)))


def _next_product(state: dict[str, Any], step: float, beta: float, psi: float) -> float:
    """Return the product of the momenta up to a step, and keep it in the state.

    Where Adam's steps came before, it is what NAdam's would have left. It is a plain number: torch
    casts tensors in a loaded state to the weights' number format.
    """
    product = state.get(PRODUCT)
    if product is None:
        product = 1.0
        for earlier in range(1, int(step)):
            product = _times(product, _momentum(earlier, beta, psi))
    state[PRODUCT] = _times(product, _momentum(step, beta, psi))
    return float(state[PRODUCT])


def _times(product: float, momentum: float) -> float:
    """Multiply in the number format that torch's NAdam keeps the product in, to round alike."""
    is_double = torch.get_default_dtype() == torch.float64
    kept = torch.tensor(product, dtype=torch.float64 if is_double else torch.float32)
    return float(kept.mul_(momentum))


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
