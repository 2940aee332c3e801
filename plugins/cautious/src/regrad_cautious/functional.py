"""Masks of an optimizer's step by the gradient, exact on shards."""

from __future__ import annotations

from typing import Literal

import torch
from regrad.sharding import local, sum_over_shards
from torch import Tensor

Divisor = Literal["share", "count"]
Keep = Literal["agreeing", "all"]

SMALLEST_SHARE = 1e-3


@torch.no_grad()
def keep_agreeing_(
    displacement: Tensor,
    gradient: Tensor,
    *,
    divisor: Divisor = "share",
    keep: Keep = "agreeing",
    maximize: bool = False,
) -> Tensor:
    r"""Leave out, in place, what goes up the gradient in a step, and lengthen the rest.

    With the step Δ and the gradient g of one tensor of N elements,

    .. math::
        m_i = \begin{cases} 1 & \text{if } -\Delta_i g_i > 0, \\ 0 & \text{otherwise,}\end{cases}
        \qquad \Delta_i \leftarrow \frac{m_i}{\max(\bar m, 10^{-3})}\,\Delta_i,
        \qquad \bar m = \frac1N \sum_i m_i.

    Args:
        displacement: Δ, what the step adds to the weights, shape [*], plain or DTensor.
            Overwritten.
        gradient: g, same shape and layout.
        divisor: "share" divides by :math:`\max(\bar m, 10^{-3})`; "count", as published, by
            :math:`(\sum_i m_i + 1)/N`.
        keep: "agreeing"; or "all", the control: every element is divided, none is left out.
        maximize: Whether the optimizer climbs: then what goes down the gradient is left out.

    Returns:
        :math:`\bar m`, a scalar in float32 at least, in [0, 1]; 0 for a tensor without elements.

    Raises:
        ValueError: If the shapes differ, or the displacement is a pending sum over processes.

    Example:
        >>> step = torch.tensor([-1.0, 2.0, -3.0, 0.0])
        >>> keep_agreeing_(step, torch.tensor([1.0, 1.0, 2.0, 1.0]))
        tensor(0.5000)
        >>> step
        tensor([-2.,  0., -6.,  0.])

    References:
        Liang, Chen, Liu and Liu, 2024, "Cautious Optimizers: Improving Training with One Line of
        Code", algorithm 1 and its appendix. The published code divides by the count plus one;
        timm and transformers by the share, with the smallest one above, which is the default here.
    """
    if displacement.shape != gradient.shape:
        raise ValueError(
            f"gradient must have the shape of displacement, {[*displacement.shape]}, "
            f"got {[*gradient.shape]}"
        )
    part = local(displacement)
    wide = torch.promote_types(part.dtype, torch.float32)
    products = part * local(gradient).to(wide)
    agrees = products > 0 if maximize else products < 0
    count = sum_over_shards(agrees.count_nonzero(), displacement).to(wide)
    size = max(displacement.numel(), 1)
    share = count / size
    by = share.clamp(min=SMALLEST_SHARE) if divisor == "share" else (count + 1) / size
    if keep == "agreeing":
        part.mul_(agrees)
    part.div_(by)
    return share
