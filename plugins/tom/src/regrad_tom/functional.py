r"""Tom's update of many tensors, in place.

It allocates nothing. On a CPU it runs tensor by tensor, since a pass over one
tensor stays in its cache; elsewhere each operation is one launch for all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scalar = float | Tensor
Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Trends:
    """State of n tensors, of their shapes and dtypes.

    Attributes:
        forecast: m + r, momentum and trend, in the units of the gradient. m alone is
            never needed.
        trend: r, the smoothed change of the gradient per step.
        square: v, the second moment.
        last: The gradient of the step before; 0 at first.
    """

    forecast: Sequence[Tensor]
    trend: Sequence[Tensor]
    square: Sequence[Tensor]
    last: Sequence[Tensor]


@torch.no_grad()
def tom_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: Trends,
    *,
    lr: Scalar,
    steps: Sequence[float],
    betas: tuple[float, float, float] = (0.9, 0.99, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    correct_bias: bool = False,
    maximize: bool = False,
    foreach: bool = False,
) -> None:
    r"""Take one step of Tom, in place.

    .. math::
        m &\leftarrow \beta_1 (m + r) + (1-\beta_1)\, g \\
        r &\leftarrow \beta_2 r + (1-\beta_2)(g - g_{t-1}) \\
        v &\leftarrow \beta_3 v + (1-\beta_3)\, g^2 \\
        \theta &\leftarrow \theta - \eta\lambda\theta
            - \eta\, \frac{(m + r)/c}{\sqrt{v/(1-\beta_3^t)} + \epsilon},

    c = 1, or :math:`1-(\beta_1\beta_2)^t` with `correct_bias`.

    Args:
        weights: n tensors θ of one device and dtype, none of them a shard. Overwritten.
        gradients: g, shapes of `weights`; turned in sign under `maximize`, in a copy.
        state: m + r, r, v and :math:`g_{t-1}`. Overwritten.
        lr: :math:`\eta`, a number or a tensor of one element.
        steps: t, this step included, one for each tensor, at least 1.
        betas: :math:`\beta_1, \beta_2, \beta_3`, each in [0, 1).
        eps: :math:`\epsilon`, in the units of the gradient.
        weight_decay: :math:`\lambda`, decoupled. The authors' file couples it.
        correct_bias: Divide :math:`m + r` by :math:`1-(\beta_1\beta_2)^t`.
        maximize: Climb instead of descend.
        foreach: One launch per operation for all tensors.

    Example:
        >>> weights, zero = [torch.ones(1)], lambda: [torch.zeros(1)]
        >>> state = Trends(forecast=zero(), trend=zero(), square=zero(), last=zero())
        >>> tom_(weights, [torch.ones(1)], state, lr=1.0, steps=[1.0])
        >>> weights
        [tensor([0.8900])]

    References:
        Maiya, Sricharan, Pandey and K S, 2021, "TOM: Leveraging trend of the gradients
        for faster convergence" (arXiv 2109.03820). Decoupled decay is ours.
    """
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.is_cpu else lr.reshape(())
    if weight_decay:
        torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
    bias = [1 - (betas[0] * betas[1]) ** t if correct_bias else 1.0 for t in steps]
    stretch = [c / (1 - betas[2] ** t) ** 0.5 for c, t in zip(bias, steps, strict=True)]
    floor = [eps * c for c in bias]
    if foreach:
        gradients = torch._foreach_neg(list(gradients)) if maximize else list(gradients)
        _advance_together(gradients, state, betas)
        _move_together(list(weights), state, stretch, floor, lr)
        torch._foreach_copy_(list(state.last), gradients)
        return
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        last = state.last[i]
        ascent = -gradient if maximize else gradient
        _advance(ascent, state, i, betas)
        torch.sqrt(state.square[i], out=last).mul_(stretch[i]).add_(floor[i])
        if isinstance(lr, Tensor):
            weight.addcdiv_(state.forecast[i], last.div_(-lr))
        else:
            weight.addcdiv_(state.forecast[i], last, value=-lr)
        last.copy_(ascent)


def _advance(gradient: Tensor, state: Trends, i: int, betas: tuple[float, float, float]) -> None:
    """Update the moments of tensor i; its last gradient is scratch afterwards."""
    one, two, three = betas
    state.trend[i].lerp_(state.last[i].neg_().add_(gradient), 1 - two)
    state.forecast[i].lerp_(gradient, 1 - one).add_(state.trend[i])
    state.square[i].mul_(three).addcmul_(gradient, gradient, value=1 - three)


def _advance_together(gradients: Tensors, state: Trends, betas: tuple[float, float, float]) -> None:
    """Update the moments of all tensors; their last gradients are scratch afterwards."""
    one, two, three = betas
    forecast = list(state.forecast)
    trend = list(state.trend)
    square = list(state.square)
    last = list(state.last)
    torch._foreach_neg_(last)
    torch._foreach_add_(last, gradients)
    torch._foreach_lerp_(trend, last, 1 - two)
    torch._foreach_lerp_(forecast, gradients, 1 - one)
    torch._foreach_add_(forecast, trend)
    torch._foreach_mul_(square, three)
    torch._foreach_addcmul_(square, gradients, gradients, 1 - three)


def _move_together(
    weights: Tensors, state: Trends, stretch: list[float], floor: list[float], lr: Scalar
) -> None:
    """Move all weights along their forecasts."""
    last = list(state.last)
    torch._foreach_copy_(last, list(state.square))
    torch._foreach_sqrt_(last)
    torch._foreach_mul_(last, stretch)
    torch._foreach_add_(last, floor)
    if isinstance(lr, Tensor):
        torch._foreach_div_(last, -lr)
        torch._foreach_addcdiv_(weights, list(state.forecast), last)
    else:
        torch._foreach_addcdiv_(weights, list(state.forecast), last, -lr)
