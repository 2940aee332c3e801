r"""The flips of Bop and Bop2ndOrder, in place.

Moments are averaged as m + γ(g − m), not as (1 − γ)m + γg: the rates are small, and in float32
1 − 1e-7 is 1 − 1.19e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT_FLOOR = 1e-10  # what Bop2ndOrder adds to the root of its second moment
Rate = float | Tensor


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What Bop2ndOrder keeps of n weight tensors, of their shapes, in float32 at least.

    Attributes:
        first: m, the average of the gradients.
        second: v, the average of their squares.
    """

    first: Sequence[Tensor]
    second: Sequence[Tensor]


@torch.no_grad()
def bop_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Tensor],
    *,
    rate: Rate,
    threshold: float = 1e-8,
    maximize: bool = False,
) -> None:
    r"""Take one step of Bop, in place.

    .. math::
        m &\leftarrow (1-\gamma)\, m + \gamma g \\
        w &\leftarrow -w \text{ where } w\, m > \tau.

    Args:
        weights: n tensors of -1 and +1, none of them a shard. Overwritten.
        gradients: g, shapes of `weights`.
        moments: m, shapes of `weights`, in float32 at least; 0 at first. Overwritten.
        rate: :math:`\gamma` in [0, 1], a number or a tensor of one element.
        threshold: :math:`\tau`, in the units of the gradient, at least 0. At
            :math:`w\,m = \tau` the weight is kept.
        maximize: Climb instead of descend.

    Example:
        >>> weights, moments = [torch.tensor([1.0, -1.0])], [torch.zeros(2)]
        >>> bop_(weights, [torch.tensor([0.5, 0.5])], moments, rate=0.1, threshold=0.03)
        >>> weights
        [tensor([-1., -1.])]

    References:
        Helwegen, Widdicombe, Geiger, Liu, Cheng and Nusselder, 2019, "Latent Weights Do Not
        Exist: Rethinking Binarized Neural Network Optimization" (arXiv 1906.02107),
        algorithm 1. At :math:`w\,m = \tau` the authors' file sets +1 whatever w was.
    """
    rate = _readable(rate)
    for weight, gradient, moment in zip(weights, gradients, moments, strict=True):
        ascent = _ascent(gradient, moment.dtype, maximize)
        _average_(moment, ascent, rate)
        _flip_(weight, moment, threshold)


@torch.no_grad()
def bop2_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    evidence: Evidence,
    *,
    rate: Rate,
    second_rate: float = 1e-3,
    threshold: float = 1e-6,
    totals: Sequence[tuple[float, float]] | None = None,
    may_flip: Sequence[bool] | None = None,
    maximize: bool = False,
) -> None:
    r"""Take one step of Bop2ndOrder, in place.

    .. math::
        m &\leftarrow (1-\gamma)\, m + \gamma g \\
        v &\leftarrow (1-\sigma)\, v + \sigma g^2 \\
        w &\leftarrow -w \text{ where }
            w\, \frac{m / c_m}{\sqrt{v / c_v} + 10^{-10}} > \tau.

    Args:
        weights: n tensors of -1 and +1, none of them a shard. Overwritten.
        gradients: g, shapes of `weights`.
        evidence: m and v. Overwritten.
        rate: :math:`\gamma` in [0, 1], a number or a tensor of one element.
        second_rate: :math:`\sigma` in (0, 1].
        threshold: :math:`\tau`, without a unit, at least 0. Where the two sides are equal
            the weight is kept.
        totals: For each tensor :math:`c_m` and :math:`c_v`, the weights that the gradients
            so far have in m and v together; None for 1, the biased rule.
        may_flip: For each tensor whether it may be changed; None for all. m and v always are.
        maximize: Climb instead of descend.

    Example:
        >>> weights = [torch.tensor([1.0, -1.0])]
        >>> evidence = Evidence(first=[torch.zeros(2)], second=[torch.zeros(2)])
        >>> bop2_(weights, [torch.tensor([0.5, 9.0])], evidence, rate=0.1, second_rate=0.01)
        >>> weights
        [tensor([-1., -1.])]

    References:
        Suarez-Ramirez, Gonzalez-Mendoza, Chang, Ochoa-Ruiz and Duran-Vega, 2021, "A Bop and
        Beyond: A Second Order Optimizer for Binarized Neural Networks" (arXiv 2104.05124).
    """
    rate = _readable(rate)
    totals = totals or [(1.0, 1.0)] * len(weights)
    may_flip = may_flip or [True] * len(weights)
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        first = evidence.first[i]
        second = evidence.second[i]
        ascent = _ascent(gradient, first.dtype, maximize)
        _average_(first, ascent, rate)
        _average_(second, ascent.square(), second_rate)
        if may_flip[i]:
            total_of_first, total_of_second = totals[i]
            root = (second / total_of_second).sqrt_().add_(ROOT_FLOOR)
            _flip_(weight, (first / total_of_first).div_(root), threshold)


def _readable(rate: Rate) -> Rate:
    """Return a rate on the CPU as a number; one on a device is not read."""
    if not isinstance(rate, Tensor):
        return rate
    return rate.item() if rate.is_cpu else rate.reshape(())


def _ascent(gradient: Tensor, dtype: torch.dtype, maximize: bool) -> Tensor:
    """Return the direction in which the loss grows, in the number format of the moments."""
    wide = gradient.to(dtype)
    return -wide if maximize else wide


def _average_(moment: Tensor, value: Tensor, rate: Rate) -> None:
    """Move a moment towards a value by a share of the way, in place."""
    if isinstance(rate, Tensor):
        rate = rate.to(moment.dtype)
    moment.lerp_(value, rate)


def _flip_(weight: Tensor, evidence: Tensor, threshold: float) -> None:
    """Turn the sign, in place, of weights whose evidence against them exceeds the threshold."""
    flips = weight * evidence > threshold
    weight.copy_(torch.where(flips, -weight, weight))
