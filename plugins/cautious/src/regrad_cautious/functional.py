"""Masks of an optimizer's step by the gradient, exact on shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from regrad.exchange import PIECE, as_rows, is_on_host, scale_
from regrad.sharding import is_sharded, locals_of, sum_over_shards
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
    (share,) = keep_agreeing_in_all_(
        [displacement], [gradient], divisor=divisor, keep=keep, maximize=[maximize]
    )
    return share


@torch.no_grad()
def keep_agreeing_in_all_(
    displacements: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    divisor: Divisor,
    keep: Keep,
    maximize: Sequence[bool],
) -> list[Tensor]:
    """Do the same to n tensors, in few passes over the memory of a CPU and few launches elsewhere.

    Args:
        displacements: n steps, plain or DTensor. Overwritten.
        gradients: Of the same shapes and layouts.
        divisor: As for `keep_agreeing_`.
        keep: As for `keep_agreeing_`.
        maximize: Whether the optimizer climbs, n of them.

    Returns:
        n times what `keep_agreeing_` returns.
    """
    together: dict[tuple[Hashable, bool], list[int]] = defaultdict(list)
    for index, (displacement, gradient) in enumerate(zip(displacements, gradients, strict=True)):
        if displacement.shape != gradient.shape:
            raise ValueError(
                f"gradient must have the shape of displacement, {[*displacement.shape]}, "
                f"got {[*gradient.shape]}"
            )
        together[_company(index, displacement), maximize[index]].append(index)
    shares: dict[int, Tensor] = {}
    for (_, climbs), indexes in together.items():
        steps = [displacements[index] for index in indexes]
        slopes = [gradients[index] for index in indexes]
        found = _keep_agreeing_in_alike_(steps, slopes, divisor=divisor, keep=keep, climbs=climbs)
        shares.update(zip(indexes, found, strict=True))
    return [shares[index] for index in range(len(displacements))]


def _company(index: int, displacement: Any) -> Hashable:
    """Return what displacements share whose counts are added over processes, or launched, at once.

    A whole tensor on a CPU has no company: it is divided while it is in the cache.
    """
    if is_sharded(displacement):
        kind = displacement.device_mesh, displacement.placements
    elif is_on_host(displacement):
        return index
    else:
        kind = None, None
    return *kind, displacement.device, displacement.dtype


def _keep_agreeing_in_alike_(
    displacements: list[Tensor],
    gradients: list[Tensor],
    *,
    divisor: Divisor,
    keep: Keep,
    climbs: bool,
) -> list[Tensor]:
    """Mask and divide steps of one layout, device and dtype; return the shares that agree."""
    parts = locals_of(displacements)
    slopes = locals_of(gradients)
    on_host = is_on_host(parts[0])
    masks = keep == "agreeing"
    if on_host:
        pairs = zip(parts, slopes, strict=True)
        counts = [_mask_in_pieces_(*pair, masks=masks, climbs=climbs) for pair in pairs]
    else:
        counts = _mask_in_launches_(parts, slopes, masks=masks, climbs=climbs)
    counts = list(sum_over_shards(torch.stack(counts), displacements[0]).unbind())
    sizes = [float(max(displacement.numel(), 1)) for displacement in displacements]
    shares = list(torch._foreach_div(counts, sizes))
    if divisor == "share":
        divisors = torch._foreach_clamp_min(shares, SMALLEST_SHARE)
    else:
        divisors = torch._foreach_div(torch._foreach_add(counts, 1), sizes)
    if on_host:
        for part, by in zip(parts, divisors, strict=True):
            part.div_(by)
    else:
        scale_(parts, torch._foreach_reciprocal(divisors))
    return shares


def _mask_in_pieces_(part: Tensor, slope: Tensor, *, masks: bool, climbs: bool) -> Tensor:
    """Count what agrees in a tensor on a CPU, and leave out the rest, in pieces of its cache."""
    wide = torch.promote_types(part.dtype, torch.float32)
    steps, slopes = as_rows(part, slope)
    length = PIECE if steps.dim() == 1 else max(1, len(steps))  # all of it where it has gaps
    agrees = torch.empty(0, dtype=wide)
    count = 0
    for step, its_slope in zip(
        torch.split(steps, length), torch.split(slopes, length), strict=True
    ):
        if agrees.shape != step.shape:
            agrees = torch.empty_like(step, dtype=wide)
        torch.mul(step, its_slope.to(wide), out=agrees)
        if climbs:
            agrees.gt_(0)
        else:
            agrees.lt_(0)
        # Exact: a piece has fewer elements than float32 has whole numbers.
        count += int(agrees.sum())
        if masks:
            step.mul_(agrees)
    return torch.tensor(count, dtype=wide)


def _mask_in_launches_(
    parts: list[Tensor], slopes: list[Tensor], *, masks: bool, climbs: bool
) -> list[Tensor]:
    """Do the same elsewhere, for many tensors at once."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    # The signs first: in half precision a product may vanish.
    agrees = list(torch._foreach_sign(parts))
    torch._foreach_mul_(agrees, slopes)
    torch._foreach_sign_(agrees)
    if not climbs:
        torch._foreach_neg_(agrees)
    torch._foreach_clamp_min_(agrees, 0)
    if masks:
        torch._foreach_mul_(parts, agrees)
    return list(torch._foreach_norm(agrees, 1, wide))
