"""AdaM3's update as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor


@torch.no_grad()
def adam3_(
    weights: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    *,
    lr: Scalar,
    steps: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    r"""Take one step of AdaM3, in place.

    Each operation is one launch for all tensors, at the price of a copy.

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1)\, g, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2)\, m^2 + \epsilon \\
        \theta &\leftarrow \theta - \eta\lambda\theta
            - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}}

    Args:
        weights: n tensors θ of one device and dtype, none of them a shard. Overwritten.
        gradients: g, shapes of `weights`.
        first: m, in the units of the gradient. Overwritten.
        second: v, in the units of its square. Overwritten.
        lr: :math:`\eta`, a number or a tensor of one element.
        steps: t, this step included, one for each tensor, at least 1.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, in the units of the squared gradient.
        weight_decay: :math:`\lambda`, decoupled.
        maximize: Climb instead of descend.

    Example:
        >>> weights, m, v = [torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)]
        >>> adam3_(weights, [torch.ones(1)], m, v, lr=0.01, steps=[1.0])
        >>> weights
        [tensor([0.9000])]

    References:
        Wang, Kang, Qin, Wang, Xu, Zhang and Fu, 2023, "Momentum is All You Need for
        Data-Driven Adaptive Optimization", ICDM.
    """
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.is_cpu else lr.reshape(())
    if weight_decay:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    if maximize:
        gradients = list(torch._foreach_neg(gradients))
    torch._foreach_lerp_(first, gradients, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, first, first, 1 - betas[1])
    torch._foreach_add_(second, eps)
    root = torch._foreach_sqrt(second)
    bias = [(1 - betas[0] ** t) / (1 - betas[1] ** t) ** 0.5 for t in steps]
    torch._foreach_mul_(root, bias)
    if isinstance(lr, Tensor):
        torch._foreach_div_(root, -lr)
        torch._foreach_addcdiv_(weights, first, root)
    else:
        torch._foreach_addcdiv_(weights, first, root, -lr)
