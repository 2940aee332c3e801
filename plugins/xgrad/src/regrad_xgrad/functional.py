r"""Displacements to predicted weights, as functions of optimizer state, and AdaM3's update.

The displacements write :math:`-s\,\eta\,D` into preallocated tensors. On a CPU they run
tensor by tensor, since a pass over one tensor stays in its cache; elsewhere each
operation is one launch for all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

Scalar = float | Tensor


def _one_launch(out: Sequence[Tensor], *scalars: Sequence[Scalar]) -> bool:
    """Say whether list operations pay: off the CPU, unless a scalar lives on the device."""
    if out[0].device.type == "cpu":
        return False
    return not any(isinstance(value, Tensor) for value in chain.from_iterable(scalars))


@torch.no_grad()
def momentum_displacement_(
    out: Sequence[Tensor], momentum: Sequence[Tensor], rate: Sequence[Scalar]
) -> None:
    r"""Write the displacement along a momentum buffer, :math:`-s\eta v`.

    Args:
        out: n tensors. Overwritten.
        momentum: Buffers v, shapes of `out`. The update must be :math:`-\eta v`.
        rate: :math:`s\eta` for each, a number or a scalar tensor.

    Example:
        >>> out = [torch.empty(2)]
        >>> momentum_displacement_(out, [torch.tensor([1.0, -2.0])], [0.5])
        >>> out
        [tensor([-0.5000,  1.0000])]

    References:
        Guan, Li, Shi and Meng, 2023, "XGrad: Boosting Gradient-Based Optimizers With
        Weight Prediction", table 1.
    """
    if _one_launch(out, rate):
        torch._foreach_copy_(list(out), list(momentum))
        torch._foreach_mul_(list(out), [-float(r) for r in rate])
        return
    for target, buffer, factor in zip(out, momentum, rate, strict=True):
        torch.mul(buffer, -factor, out=target)


@torch.no_grad()
def adam_displacement_(
    out: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    rate: Sequence[Scalar],
    steps: Sequence[Scalar],
    betas: Sequence[tuple[Scalar, Scalar]],
    eps: Sequence[float],
) -> None:
    r"""Write Adam's displacement :math:`-s\eta\,\hat m/(\sqrt{\hat v}+\epsilon)`.

    With :math:`c_i = 1-\beta_i^t` it is computed as
    :math:`-s\eta\,(\sqrt{c_2}/c_1)\; m/(\sqrt v + \epsilon\sqrt{c_2})`, one pass less.

    Args:
        out: n tensors. Overwritten.
        first: First moments m, shapes of `out`.
        second: Second moments v, not negative; the largest so far under AMSGrad.
        rate: :math:`s\eta` for each.
        steps: t, steps that the moments have seen, at least 1.
        betas: Decay rates of the moments, each in [0, 1).
        eps: :math:`\epsilon`, in the units of the gradient.

    Example:
        >>> out = [torch.empty(1)]
        >>> one = [torch.ones(1)]
        >>> adam_displacement_(out, one, one, rate=[0.1], steps=[1], betas=[(0.0, 0.0)], eps=[0.0])
        >>> out
        [tensor([-0.1000])]

    References:
        Guan, 2023, "Weight Prediction Boosts the Convergence of AdamW"; Guan et al.,
        2023, "XGrad", table 1. The bias corrections are those of the step that made
        the moments, as torch applies them; the published code does the same.
    """
    root = [(1 - beta2**t) ** 0.5 for (_, beta2), t in zip(betas, steps, strict=True)]
    floor = [epsilon * r for epsilon, r in zip(eps, root, strict=True)]
    scale = [
        -factor * r / (1 - beta1**t)
        for factor, r, (beta1, _), t in zip(rate, root, betas, steps, strict=True)
    ]
    if _one_launch(out, floor, scale):
        torch._foreach_copy_(list(out), list(second))
        torch._foreach_sqrt_(list(out))
        torch._foreach_add_(list(out), [float(f) for f in floor])
        torch._foreach_reciprocal_(list(out))
        torch._foreach_mul_(list(out), list(first))
        torch._foreach_mul_(list(out), [float(s) for s in scale])
        return
    for target, m, v, f, s in zip(out, first, second, floor, scale, strict=True):
        torch.sqrt(v, out=target).add_(f)
        torch.div(m, target, out=target).mul_(s)


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
